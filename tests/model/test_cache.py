"""Windows beside a KV cache equal whole rows, in every regime of masks.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskdiff.distributed import mesh
from maskdiff.model import cache as cache_lib
from maskdiff.model import masks, transformer
from maskdiff.model.masks import Labels

B, L, VOCAB = 3, 12, tiny.MODEL.vocab_size
VALID = np.arange(L) < np.array([[12], [9], [11]])
PARAMS = tiny.strong_params()


@functools.partial(jax.jit, static_argnums=(0, 1))
def call(config, name, *args):
  """Calls a method of the Transformer."""
  return getattr(transformer.bind(config, PARAMS), name)(*args)


def random_tokens(seed=0):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.integers(0, VOCAB, (B, L)), jnp.int32)


def part(tokens, labels, start, end):
  """Returns positions, tokens and labels of a range of positions."""
  positions = jnp.tile(jnp.arange(start, end), (B, 1))
  return positions, tokens[:, start:end], masks.take(labels, positions)


def close(actual, expected, valid, atol=2e-5):
  np.testing.assert_allclose(
    np.asarray(actual, np.float32)[valid],
    np.asarray(expected, np.float32)[valid],
    atol=atol,
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_window_beside_cache_equals_whole_row(dtype):
  """Windows have any positions, and missing ones; rows have padding."""
  config = tiny.model(dtype=dtype)
  random, size = np.random.default_rng(1), 6
  tokens, labels = random_tokens(), masks.bidirectional(VALID)
  positions = np.stack([random.permutation(9)[:size] for _ in range(B)])
  in_window = np.ones(positions.shape, bool)
  in_window[1, 4:] = False
  whole, cache = call(config, 'prefill', tokens, labels)
  outdated = np.zeros(VALID.shape, bool)
  for row in range(B):
    outdated[row, positions[row][in_window[row]]] = True
  cache = dataclasses.replace(
    cache, labels=cache_lib.hide(cache.labels, outdated)
  )
  hidden = call(
    config,
    'extend',
    jnp.take_along_axis(tokens, positions, axis=1),
    cache_lib.hide(masks.take(labels, positions), ~in_window),
    cache,
  )
  expected = jnp.take_along_axis(whole, positions[..., None], axis=1)
  close(hidden, expected, in_window, 2e-5 if dtype == 'float32' else 0.1)
  again = call(config, '__call__', tokens, labels)
  np.testing.assert_array_equal(again, whole)


def test_outdated_keys_differ_from_current_keys():
  """A token of the window affects keys outside the window from layer 2 on."""
  tokens, labels = random_tokens(2), masks.bidirectional(np.ones((B, L), bool))
  changed = tokens.at[:, 5].add(1) % VOCAB
  _, cache = call(tiny.MODEL, 'prefill', tokens, labels)
  fresh = call(tiny.MODEL, '__call__', changed, labels)
  positions, inputs, window = part(changed, labels, 4, 8)
  cache = dataclasses.replace(
    cache,
    labels=cache_lib.hide(cache.labels, jnp.isin(np.arange(L), positions)),
  )
  stale = call(tiny.MODEL, 'extend', inputs, window, cache)
  difference = np.abs(stale - fresh[:, 4:8]).max()
  assert 1e-4 < difference < np.abs(fresh[:, 4:8]).max()


DOC = np.array([[0] * 5 + [1] * 7, [0] * 12, [0] * 2 + [1] * 3 + [2] * 7])
CLEAN = {
  'causal': (masks.causal(VALID), 1),
  'causal, packed': (masks.causal(VALID, DOC), 1),
  'block-causal': (masks.block_causal(VALID, 4), 4),
}


@pytest.mark.slow
@pytest.mark.parametrize('predict_next', [False, True])
@pytest.mark.parametrize('labels, block', CLEAN.values(), ids=CLEAN)
def test_blocks_appended_one_by_one_equal_whole_rows(
  labels, block, predict_next
):
  """The cache is exact: earlier positions do not see later ones."""
  config = tiny.model(predict_next=predict_next)
  tokens = random_tokens(3)
  expected, filled = call(config, 'prefill', tokens, labels)
  cache = cache_lib.empty(config, labels)
  found = []
  for start in range(0, L, block):
    # A network that predicts the next token needs the position before.
    first = max(start - predict_next, 0)
    positions, inputs, window = part(tokens, labels, first, start + block)
    before = dataclasses.replace(
      cache, labels=cache_lib.hide(cache.labels, np.arange(L) >= first)
    )
    hidden, cache = call(config, 'append', inputs, window, before, positions)
    found.append(hidden[:, start - first :])
  close(jnp.concatenate(found, axis=1), expected, VALID)
  for a, e in zip(jax.tree.leaves(cache), jax.tree.leaves(filled), strict=True):
    assert a.shape == e.shape
  heads_last = lambda x: np.moveaxis(x, 2, -1)  # [N, B, S, K, G]
  for name in 'kv':
    actual, wanted = (heads_last(getattr(c, name)) for c in (cache, filled))
    np.testing.assert_allclose(actual[:, VALID], wanted[:, VALID], atol=2e-5)
  for field in ('doc', 'pos', 'block', 'reach'):
    np.testing.assert_array_equal(
      getattr(cache.labels, field), getattr(labels, field)
    )


def test_noisy_block_beside_clean_cache_equals_noisy_and_clean_rows():
  """Decoding by block diffusion sees what its training rows see."""
  valid, size = np.ones((B, L), bool), 4
  clean, noisy = random_tokens(4), random_tokens(5)
  both = masks.block_diffusion(valid, size)
  rows = jnp.concatenate([noisy, clean], axis=1)
  expected = call(tiny.MODEL, '__call__', rows, both)
  causal = masks.block_causal(valid, size)
  _, cache = call(tiny.MODEL, 'prefill', clean, causal)
  for start in range(0, L, size):
    _, inputs, window = part(rows, both, start, start + size)
    found = call(tiny.MODEL, 'extend', inputs, window, cache)
    close(found, expected[:, start : start + size], np.ones((B, size), bool))


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes', [dict(fsdp=4, tensor=2), dict(tensor=4, sequence=2)]
)
def test_append_on_a_mesh_equals_one_device(sizes):
  config = tiny.model(heads=4, kv_heads=2, head_dim=4)
  params = jax.tree.map(
    lambda x: jax.random.normal(jax.random.key(x.size), x.shape),
    transformer.shapes(config),
  )
  tokens, labels = random_tokens(6), masks.causal(VALID)

  @jax.jit
  def decode(params, tokens):
    model = transformer.bind(config, params)
    _, cache = model.prefill(tokens, labels)
    positions, inputs, window = part(tokens, labels, 6, 9)
    hidden_places = jnp.arange(L) >= 6
    cache = dataclasses.replace(
      cache, labels=cache_lib.hide(cache.labels, hidden_places)
    )
    return model.append(inputs, window, cache, positions)

  expected = decode(params, tokens)
  with jax.set_mesh(mesh.make_mesh(**{'fsdp': 1} | sizes)):
    actual = decode(params, tokens)
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(a, e, atol=1e-4)


def test_places_outside_of_the_cache_store_nothing():
  tokens, labels = random_tokens(7), masks.causal(VALID)
  _, cache = call(tiny.MODEL, 'prefill', tokens, labels)
  _, inputs, window = part(tokens, labels, 0, 2)
  nowhere = jnp.array([[-1, L], [L, -2], [L + 5, -1]])
  _, same = call(tiny.MODEL, 'append', inputs, window, cache, nowhere)
  for a, e in zip(jax.tree.leaves(same), jax.tree.leaves(cache), strict=True):
    np.testing.assert_array_equal(a, e)


def test_taken_labels_see_what_the_whole_rows_see():
  """Positions in any order; the regimes include [noisy ; clean] rows."""
  positions = np.array([[3, 0, 11, 5], [8, 7, 1, 2], [10, 4, 4, 9]])
  rows = np.arange(B)[:, None, None]
  for labels in (
    masks.bidirectional(VALID),
    masks.causal(VALID, DOC),
    masks.block_diffusion(VALID[:, :6], 3),
  ):
    taken = masks.take(labels, positions)
    whole = np.asarray(masks.visible(labels, labels))
    np.testing.assert_array_equal(
      masks.visible(taken, labels), whole[np.arange(B)[:, None], positions]
    )
    np.testing.assert_array_equal(
      masks.visible(taken, taken),
      whole[rows, positions[:, :, None], positions[:, None]],
    )
    by_hand = Labels(taken.doc, taken.pos, taken.block, taken.reach)
    np.testing.assert_array_equal(
      masks.visible(by_hand, by_hand), masks.visible(taken, taken)
    )
