"""The splash kernel follows the rule of masks.py and skips empty tiles.

Pallas emulates the kernel here: slow, but the same program.
"""

import functools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
  assert_equals_xla,
  cpu_mesh,
  draw,
  packed,
  padded,
  sdlm,
  value_and_gradients,
)

from maskdiff.distributed import compiler
from maskdiff.model import attention, masks, splash, splash_masks
from maskdiff.model.masks import Regime

L = 256
ROW = jnp.ones((1, 1), bool)


def block_causal(block_length):
  return masks.block_causal(ROW, block_length).regime


def block_diffusion(block_length):
  return masks.block_diffusion(ROW, block_length).regime


REGIMES = {
  'bidirectional': masks.BIDIRECTIONAL,
  'causal': masks.CAUSAL,
  'block-causal of 96': block_causal(96),
  'block-causal of 128': block_causal(128),
  'block diffusion': block_diffusion(32),
  # 128 clean positions and 4 windows of 32.
  'windows': Regime(sdlm, (128, 32, 1, 40, 77, 127)),
}
DOCUMENTS = {'row': 0, 'packed': packed(L)}
# The last block of 48 is shorter; a block of 200 is more than a row of 128.
BLOCK_LENGTHS = 1, 2, 32, 48, 128, 200
every_regime = pytest.mark.parametrize('regime', REGIMES.values(), ids=REGIMES)
with_documents = pytest.mark.parametrize(
  'doc', DOCUMENTS.values(), ids=DOCUMENTS
)


def assert_splash_equals_xla(labels, heads, kv_heads, head_dim=128, m=None):
  assert_equals_xla(
    attention.splash, labels, heads, kv_heads, head_dim, m, interpret=True
  )


def rule(regime, length):
  """Returns [L, L] bool, the rule for a row that is one document."""
  row = masks.row(regime, length)
  return masks.visible(row, row)[0]


@pytest.fixture
def small_tiles(monkeypatch):
  """Sets tiles of 128 x 128, so that a row has several."""
  monkeypatch.setattr(splash, 'SMALL', splash.Tile(128, 128, 128))


@pytest.mark.parametrize(
  'regime', [*REGIMES.values(), *map(block_diffusion, BLOCK_LENGTHS)]
)
def test_masks_equal_the_rule_in_any_slice(regime):
  mask = splash_masks.make_mask(regime, L)
  assert mask.shape == (L, L)
  for index in np.s_[:, :], np.s_[64:192, 32:], np.s_[128:136, :128]:
    np.testing.assert_array_equal(mask[index], rule(regime, L)[index])


@pytest.mark.parametrize('block_length', BLOCK_LENGTHS)
def test_spans_of_block_diffusion_are_the_visible_keys(block_length):
  mask = splash_masks.make_mask(block_diffusion(block_length), L)
  assert isinstance(mask, splash_masks.BlocksMask)
  index = np.arange(L)
  column = lambda x: np.broadcast_to(x, L)[:, None]
  seen = [(index >= column(a)) & (index < column(b)) for a, b in mask.spans]
  assert not np.logical_and(*seen).any()
  np.testing.assert_array_equal(
    np.logical_or(*seen), rule(block_diffusion(block_length), L)
  )


@every_regime
def test_masks_of_equal_regimes_are_equal(regime):
  """Otherwise the kernel computes the same tiles again for every layer."""
  mask = splash_masks.make_mask(regime, L)
  again = splash_masks.make_mask(Regime(regime.make, regime.sizes), L)
  assert mask == again and hash(mask) == hash(again)
  if isinstance(mask, splash_masks.FunctionMask):
    assert mask.mask_function == again.mask_function
    assert hash(mask.mask_function) == hash(again.mask_function)
  others = [
    splash_masks.make_mask(r, L) for r in REGIMES.values() if r != regime
  ]
  assert all(mask != other for other in others)


def test_only_windows_at_random_anchors_load_a_mask():
  loads = {
    name: splash.make_kernel(regime, L).fwd_mask_info.partial_mask_blocks
    is not None
    for name, regime in REGIMES.items()
  }
  assert [name for name in loads if loads[name]] == ['windows']


@pytest.mark.parametrize('heads, kv_heads', [(2, 2), (4, 2)])
@pytest.mark.parametrize('make', [masks.bidirectional, masks.causal])
def test_splash_equals_xla_with_gradients(make, heads, kv_heads):
  assert_splash_equals_xla(make(padded(L)), heads, kv_heads)


@pytest.mark.slow
@with_documents
@every_regime
def test_splash_equals_xla_with_empty_tiles(small_tiles, regime, doc):
  """Tiles are empty by the regime, or because the documents differ."""
  assert_splash_equals_xla(masks.make_labels(regime, padded(L), doc), 2, 2)


@pytest.mark.slow
@every_regime
def test_splash_equals_xla_with_a_separate_dq_kernel(
  monkeypatch, small_tiles, regime
):
  monkeypatch.setattr(splash, 'MAX_PARTIAL_DQ', 1)
  sizes = splash.block_sizes(splash_masks.make_mask(regime, L), L, L, None)
  assert not sizes.use_fused_bwd_kernel
  assert_splash_equals_xla(
    masks.make_labels(regime, padded(L), packed(L)), 4, 2
  )


def test_splash_equals_xla_with_narrow_heads():
  """LLaDA 1B has heads of 64."""
  assert_splash_equals_xla(masks.bidirectional(padded(L)), 4, 2, head_dim=64)


@pytest.mark.parametrize('head_dim, padded_to', [(64, 64), (8, 64), (96, 128)])
def test_only_heads_that_the_kernel_does_not_take_are_padded(
  head_dim, padded_to, monkeypatch
):
  """Padding to 128 channels changes neither output nor gradients."""
  found = []
  for lanes in (splash.HEAD_LANES, 128):
    monkeypatch.setattr(splash, 'HEAD_LANES', lanes)
    q, k, v, g = draw(1, 128, 2, 1, head_dim)
    labels = masks.bidirectional(jnp.ones((1, 128), bool))
    attend = functools.partial(attention.splash, interpret=True)
    found.append(value_and_gradients(attend, q, k, v, g, labels))
    jaxpr = str(jax.make_jaxpr(attend)(q, k, v, labels, labels))
    assert f'2,128,{padded_to if lanes == 64 else 128}]' in jaxpr
  for ours, padded_to_128 in zip(*found, strict=True):
    np.testing.assert_allclose(ours, padded_to_128, rtol=0, atol=2e-6)


def test_splash_equals_xla_with_rows_and_heads_split_over_a_mesh():
  m = cpu_mesh(fsdp=2, tensor=2)
  assert_splash_equals_xla(masks.bidirectional(padded(L)[1:]), 4, 4, m=m)


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, documents',
  [*((name, 'packed') for name in REGIMES), ('bidirectional', 'row')],
)
def test_splash_equals_xla_with_queries_split_over_a_mesh(name, documents):
  labels = masks.make_labels(REGIMES[name], padded(L), DOCUMENTS[documents])
  assert_splash_equals_xla(labels, 4, 1, m=cpu_mesh(sequence=2))


@pytest.mark.parametrize('name', REGIMES)
def test_splash_equals_xla_with_heads_split_over_the_sequence_axis(name):
  labels = masks.make_labels(REGIMES[name], padded(L), DOCUMENTS['packed'])
  assert_splash_equals_xla(labels, 4, 2, m=cpu_mesh(sequence=2))


@pytest.mark.slow
@pytest.mark.parametrize(
  'block_length, length, parts, documents',
  [
    (1, 256, 1, False),
    (48, 256, 2, True),
    (64, 512, 4, True),
    (4, 512, 2, False),
  ],
)
def test_block_diffusion_equals_xla(
  small_tiles, block_length, length, parts, documents
):
  half = length // 2
  doc = packed(half) if documents else 0
  labels = masks.block_diffusion(padded(half), block_length, doc)
  m = cpu_mesh(sequence=parts) if parts > 1 else None
  assert_splash_equals_xla(labels, 2, 1, m=m)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('name', ['bidirectional', 'causal', 'windows'])
def test_splash_equals_xla_with_everything_split_over_8_devices(
  monkeypatch, small_tiles, name, fused
):
  monkeypatch.setattr(splash, 'MAX_PARTIAL_DQ', 8 if fused else 1)
  m = cpu_mesh(fsdp=2, sequence=2, tensor=2)
  labels = masks.make_labels(REGIMES[name], padded(L)[1:], packed(L)[1:])
  assert_splash_equals_xla(labels, 4, 2, m=m)


@pytest.mark.parametrize('make', [masks.bidirectional, masks.causal])
def test_splash_equals_xla_with_one_tile_of_queries_on_each_of_4_devices(make):
  labels = make(padded(512), packed(512))
  assert_splash_equals_xla(labels, 2, 1, m=cpu_mesh(sequence=4))


def tiles_of(dense, tile):
  """Returns [L / tile, L / tile], the number of visible pairs per tile."""
  n = len(dense) // tile
  return dense.reshape(n, tile, n, tile).sum(axis=(1, 3))


@pytest.mark.parametrize('parts', [1, 2, 4])
@pytest.mark.parametrize(
  'regime, computed',
  [
    (masks.BIDIRECTIONAL, 64),
    (masks.CAUSAL, 36),
    # 4 x 4 blocks of 2 x 2 tiles: the blocks on the diagonal and below.
    (block_causal(256), 4 * 10),
    # Noisy queries: 4 tiles on the diagonal of the noisy copy; of the clean
    # copy 4 tiles that are partly visible and 6 full ones. Clean queries: 10.
    (block_diffusion(32), 4 + 10 + 10),
    # Blocks are whole tiles, so noisy queries see no diagonal clean tile.
    (block_diffusion(128), 4 + 6 + 10),
    # The noisy copy is one block of 8 x 4 tiles.
    (block_diffusion(512), 16 + 0 + 16),
    # 11 blocks, the last one shorter, which tiles do not divide.
    (block_diffusion(48), 10 + 10 + 10),
  ],
)
def test_empty_tiles_are_skipped(small_tiles, regime, computed, parts):
  """A row of 1024 has 8 x 8 tiles, forward and backward."""
  dense = tiles_of(rule(regime, 1024), 128)
  assert (dense > 0).sum() == computed
  kernel = splash.make_kernel(regime, 1024, parts)
  for info in kernel.fwd_mask_info, kernel.dkv_mask_info:
    kinds = np.asarray(info.block_mask)
    assert (kinds > 0).sum() == computed
    assert (kinds == 2).sum() == (dense == 128 * 128).sum()


def test_grid_shrinks_to_the_longest_line_of_tiles(
  small_tiles,
):
  """In block diffusion a query sees at most 5 of 8 tiles of keys."""
  kernel = splash.make_kernel(block_diffusion(32), 1024)
  assert kernel.fwd_mask_info.block_mask.shape == (1, 8, 5)


@pytest.mark.parametrize('chip', ['v4', 'v5e', 'v5p', 'v6e', None])
@pytest.mark.parametrize(
  'length, parts',
  [(length, 1) for length in (128, 512, 640, 1152, 3072, 8192, 32768)]
  + [(length, 2) for length in (512, 3072, 8192, 32768)]
  + [(640, 5), (1152, 3), (32768, 16)],
)
def test_tiles_divide_every_length(length, parts, chip):
  queries = length // parts
  for regime in masks.BIDIRECTIONAL, masks.CAUSAL, REGIMES['block diffusion']:
    sizes = splash.block_sizes(
      splash_masks.make_mask(regime, length), queries, length, chip
    )
    of_queries = [sizes.block_q, sizes.block_q_dkv]
    of_keys = [
      (sizes.block_kv, sizes.block_kv_compute),
      (sizes.block_kv_dkv, sizes.block_kv_dkv_compute),
    ]
    if not sizes.use_fused_bwd_kernel:
      of_queries.append(sizes.block_q_dq)
      of_keys.append((length, sizes.block_kv_dq))
    for block in of_queries:
      assert queries % block == 0 and block % splash.LANES == 0
    for block, compute in of_keys:
      assert length % block == block % compute == compute % splash.LANES == 0
    partial_dq = length // sizes.block_kv_dkv
    assert sizes.use_fused_bwd_kernel == (partial_dq <= splash.MAX_PARTIAL_DQ)


def test_tiles_of_odd_lengths_are_as_large_as_possible():
  sizes = splash.block_sizes(
    splash_masks.make_mask(masks.BIDIRECTIONAL, 3072), 3072, 3072, 'v5p'
  )
  assert (sizes.block_q, sizes.block_kv, sizes.block_kv_compute) == (
    1024,
    1536,
    512,
  )
  assert (sizes.block_q_dkv, sizes.block_kv_dkv) == (1024, 3072)


@pytest.mark.parametrize(
  'length, forward, backward',
  [
    (512, 512, 512),
    (8192, 1024, 1024),
    (16384, 1024, 2048),  # at most 8 partial dq
    (32768, 1024, 4096),
    (31 * 128, 128, 31 * 128),
  ],
)
@pytest.mark.parametrize('regime', [masks.CAUSAL, REGIMES['block diffusion']])
def test_key_tiles_are_smaller_if_some_are_skipped(
  regime, length, forward, backward
):
  mask = splash_masks.make_mask(regime, length)
  sizes = splash.block_sizes(mask, length, length, 'v5p')
  assert (sizes.block_kv, sizes.block_kv_dkv) == (forward, backward)
  assert sizes.use_fused_bwd_kernel


@pytest.mark.parametrize(
  'parts, tiles', [(1, 4 + 10 + 10), (2, 2 * (4 + 10)), (4, 4 * (2 + 3 + 4))]
)
def test_computed_share_is_that_of_the_device_with_most_tiles(parts, tiles):
  """Rows of 4096 tokens in two copies have 8 x 8 tiles of 1024 x 1024."""
  shares = splash.computed_share(block_diffusion(32), 8192, parts, 'v5p')
  assert shares == {'fwd': tiles / 64, 'dkv': tiles / 64}


def test_tiles_of_block_diffusion_are_found_without_a_square_array():
  """The rule for all pairs of 8192 positions takes 64 MiB."""
  splash.computed_share(block_diffusion(16), 8192)  # caches the labels
  tracemalloc.start()
  kernel = splash.make_kernel(block_diffusion(16), 8192, chip='v5p')
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 4 * 2**20
  for info in kernel.fwd_mask_info, kernel.dkv_mask_info:
    assert info.partial_mask_blocks is None
    assert max(x.size for x in info if x is not None) == 8192


def test_large_backward_tiles_need_a_larger_vmem_limit():
  """compiler.py raises the limit for exactly the chips of TILES."""
  assert splash.TILES.keys() == compiler.OPTIONS.keys()
