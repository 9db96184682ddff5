"""Annealed attention: the law of its draws, its ends, and its kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import assert_equals_xla, cpu_mesh, packed, padded

from maskdiff.model import annealing, attention, masks, splash, splash_masks

L = 256
with_documents = pytest.mark.parametrize(
  'doc', [0, packed(L)], ids=['row', 'packed']
)


def annealed(share, doc=0, length=L, seed=0):
  """Returns the Labels of three rows, with padding, for a drawn mask."""
  number = annealing.draw(jax.random.key(seed), length, jnp.float32(share))
  labels = masks.bidirectional(padded(length), doc)
  return masks.annealed(labels, number)


def visible(labels):
  return np.asarray(masks.visible(labels, labels))


@with_documents
def test_share_0_is_causal_and_share_1_bidirectional(doc):
  valid = padded(L)
  np.testing.assert_array_equal(
    visible(annealed(0, doc)), visible(masks.causal(valid, doc))
  )
  np.testing.assert_array_equal(
    visible(annealed(1, doc)), visible(masks.bidirectional(valid, doc))
  )


@with_documents
def test_any_share_is_between_causal_and_bidirectional(doc):
  valid, found = padded(L), visible(annealed(0.5, doc))
  causal = visible(masks.causal(valid, doc))
  both = visible(masks.bidirectional(valid, doc))
  assert (causal <= found).all() and (found <= both).all()
  assert 0.4 < (found & ~causal).sum() / (both & ~causal).sum() < 0.6


@jax.jit
def open_pairs(key, share):
  """Returns [L, L] bool; pairs that are not of a later key have no meaning."""
  number = annealing.draw(key, L, share)
  return annealing.is_open(number[:, None], jnp.arange(L)[None])


@pytest.fixture(scope='module')
def drawn():
  """Returns 200 draws with a share of 0.3, [200, L, L] bool."""
  keys = jax.random.split(jax.random.key(0), 200)
  return np.stack([open_pairs(key, 0.3) for key in keys])


# 1e-4 is the first share of DiffuLLaMA, which anneals for 10,000 steps.
@pytest.mark.parametrize('share', [1e-4, 0.001, 0.1, 0.5, 0.997])
def test_expected_share_is_exact(share):
  keys = jax.random.split(jax.random.key(1), 100)
  found = np.mean([open_pairs(key, share).mean() for key in keys])
  # One query opens a multiple of L / LEVELS keys.
  sigma = np.sqrt(share * (1 - share) / (100 * L * L)) * 2
  assert abs(found - share) < 4 * sigma


def test_pairs_are_open_independently(drawn):
  """By query, by key, by step, and for pairs of neighbours."""
  n, p = len(drawn), 0.3
  for axes in (1, 2), (0, 2), (0, 1), (0,):
    shares = drawn.mean(axis=axes)
    count = drawn.size // shares.size
    # The variance of a mean of independent pairs. Thresholds and salts are
    # shared by the keys of a query, which adds a little.
    assert shares.std() < 1.3 * np.sqrt(p * (1 - p) / count)
    assert shares.std() > 0.7 * np.sqrt(p * (1 - p) / count)
  deviation = drawn - p
  for a, b in (
    (deviation[:, :, 1:], deviation[:, :, :-1]),
    (deviation[:, 1:], deviation[:, :-1]),
    (deviation[:, 1:, 1:], deviation[:, :-1, :-1]),
  ):
    assert abs((a * b).mean()) < 5 * p * (1 - p) / np.sqrt(n * L * L)
  # A query has the same salt in two steps with probability 1 / 256.
  repeated = (deviation[1:] * deviation[:-1]).mean() / (p * (1 - p))
  assert abs(repeated) < 1 / 256


def test_numpy_computes_the_same_hash():
  number = np.asarray(annealing.draw(jax.random.key(2), L, 0.5))[:, None]
  key = np.arange(L, dtype=np.int32)[None]
  np.testing.assert_array_equal(
    annealing.is_open(number, key), open_pairs(jax.random.key(2), 0.5)
  )


@pytest.fixture
def small_tiles(monkeypatch):
  """Sets tiles of 128 x 128, so that a row has several."""
  monkeypatch.setattr(splash, 'SMALL', splash.Tile(128, 128, 128))


def test_kernel_equals_xla_with_gradients(small_tiles):
  assert_equals_xla(
    attention.splash, annealed(0.4, packed(L)), 2, 1, interpret=True
  )


@pytest.mark.slow
@pytest.mark.parametrize('fused', [True, False])
def test_kernel_equals_xla_on_a_mesh(monkeypatch, small_tiles, fused):
  monkeypatch.setattr(splash, 'MAX_PARTIAL_DQ', 8 if fused else 1)
  labels = jax.tree.map(lambda x: x[1:], annealed(0.4, packed(L)))
  m = cpu_mesh(fsdp=2, sequence=2, tensor=2)
  assert_equals_xla(attention.splash, labels, 4, 2, m=m, interpret=True)


def test_kernel_computes_all_tiles_and_evaluates_those_above_the_diagonal(
  small_tiles,
):
  kernel = splash.make_kernel(masks.ANNEALED, 512)
  for info in kernel.fwd_mask_info, kernel.dkv_mask_info:
    kinds = np.asarray(info.block_mask)
    assert (kinds > 0).all() and (kinds == 2).sum() == 6
    assert info.partial_mask_blocks is None
  row = masks.row(masks.CAUSAL, 512)
  mask = splash_masks.make_mask(masks.ANNEALED, 512)
  np.testing.assert_array_equal(mask[:, :], masks.visible(row, row)[0])
