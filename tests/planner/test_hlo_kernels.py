"""FLOPs of attention kernels, computed by hand."""

import jax.numpy as jnp
import pytest

from maskdiff.distributed import chips
from maskdiff.model import masks, splash
from maskdiff.planner import hlo, hlo_kernels

# 2 rows, 3 heads, 1024 queries and keys, 128 wide.
PRODUCT = 2 * 2 * 3 * 1024 * 1024 * 128
BLOCKS = masks.block_diffusion(jnp.ones((1, 1), bool), 32).regime


def call(name, queries=1024, keys=1024, width=128, layout=None):
  array = lambda *shape: f'bf16[2,3,{shape[0]},{shape[1]}]{{3,2,1,0}}'
  order = -1 if layout == splash.splash_kernel.QKVLayout.SEQ_MINOR else 1
  of_queries, of_keys = (
    array(*(length, width)[::order]) for length in (queries, keys)
  )
  operands = ', '.join(['s8[1,2,2]{2,1,0}', of_queries, of_keys, of_keys])
  metadata = (
    ''
    if layout is None
    else (
      'frontend_attributes={kernel_metadata={\n"xprof_metadata":'
      f'"{{\\"block_q\\": 1024, \\"q_layout\\": {int(layout)}}}"\n}}}}, '
    )
  )
  return (
    f'  %{name} = {array(queries, width)} custom-call(%x), '
    'custom_call_target="tpu_custom_call", '
    f'operand_layout_constraints={{{operands}}}, {metadata}'
    'metadata={op_name="a"}\n'
  )


def module_of(name, others='', **kernel):
  return hlo.parse(
    'HloModule jit_f\nENTRY %main (x: f32[8]) -> f32[8] {\n'
    '  %x = f32[8] parameter(0)\n' + call(name, **kernel) + others + '}\n'
  )


def instruction(name, **kernel):
  return module_of(name, **kernel).computations['main'][name]


def flops(name, regime=masks.BIDIRECTIONAL, others='', **kernel):
  module = module_of(name, others, **kernel)
  i = module.computations['main'][name]
  return hlo_kernels.attention_flops(module, i, regime, 'v5p')


@pytest.mark.parametrize(
  'name, products',
  [
    ('splash_mha_fwd_segmented_residuals.2', 2),
    ('splash_mha_dkv_segmented_no_residuals', 5),
  ],
)
def test_matrix_products_of_each_kernel(name, products):
  assert flops(name) == products * PRODUCT


@pytest.mark.parametrize('width, lanes', [(64, 128), (128, 128), (192, 256)])
def test_a_head_costs_a_multiple_of_128_lanes(width, lanes):
  kernel = {'name': 'splash_mha_fwd', 'width': width}
  assert flops(**kernel) == 2 * PRODUCT * lanes / 128
  chip = chips.by_kind('TPU v6e')
  seconds = hlo_kernels.mxu_seconds(chip, instruction(**kernel), 1e12)
  of_lanes = instruction('splash_mha_fwd', width=lanes)
  assert seconds == hlo_kernels.mxu_seconds(chip, of_lanes, 1e12)


@pytest.mark.parametrize('layout', splash.splash_kernel.QKVLayout)
def test_the_layout_of_queries_and_keys_changes_no_flops(layout):
  kernel = {'queries': 2048, 'keys': 4096, 'width': 64}
  assert flops('splash_mha_fwd', layout=layout, **kernel) == 16 * PRODUCT
  call = instruction('splash_mha_fwd', layout=layout, **kernel)
  plain = instruction('splash_mha_fwd', **kernel)
  chip = chips.by_kind('TPU v6e')
  seconds = hlo_kernels.mxu_seconds(chip, call, 1e12)
  assert seconds == hlo_kernels.mxu_seconds(chip, plain, 1e12)


def test_separate_kernel_for_queries_has_three_products(monkeypatch):
  """It exists if there would be too many partial dq of 4096 keys."""
  monkeypatch.setattr(splash, 'MAX_PARTIAL_DQ', 8)
  long = {'queries': 2**16, 'keys': 2**16}
  assert flops('splash_mha_dq_segmented', **long) == 3 * 64**2 * PRODUCT
  assert flops('splash_mha_dq_segmented') is None


def test_separate_kernel_for_queries_saves_one_product():
  others = call('splash_mha_dq_segmented.1')
  assert flops('splash_mha_dkv_segmented', others=others) == 4 * PRODUCT


def test_more_keys_than_queries():
  assert flops('splash_mha_fwd', keys=2048) == 4 * PRODUCT


@pytest.mark.parametrize(
  'regime, length, tiles',
  [
    (masks.BIDIRECTIONAL, 2048, 4),
    (masks.CAUSAL, 1024, 1),
    (masks.CAUSAL, 2048, 3),
    (masks.CAUSAL, 8192, 36),
    # Of 4 x 4 tiles per copy: noisy to noisy, noisy to clean, clean to clean.
    (BLOCKS, 8192, 4 + 10 + 10),
  ],
)
@pytest.mark.parametrize('kernel, products', [('fwd', 2), ('dkv', 5)])
def test_kernels_compute_the_tiles_with_visible_pairs(
  regime, length, tiles, kernel, products
):
  """Tiles of 1024 x 1024."""
  found = flops(f'splash_mha_{kernel}', regime, queries=length, keys=length)
  assert found == products * tiles * PRODUCT


@pytest.mark.parametrize(
  'regime, tiles', [(masks.CAUSAL, 7 + 8), (BLOCKS, 2 + 3 + 4)]
)
def test_split_queries_cost_as_on_the_device_with_most_tiles(regime, tiles):
  """A quarter of 8192 queries: causally the last, in blocks the second."""
  found = flops('splash_mha_fwd', regime, queries=2048, keys=8192)
  assert found == 2 * tiles * PRODUCT


def test_other_kernels_have_no_flops():
  assert flops('some_kernel') is None
  assert flops('splash_something') is None


def test_kernels_run_at_half_of_the_peak():
  chip = chips.by_kind('TPU v5p')
  assert hlo_kernels.seconds(chip, chip.peak_flops) == 2.0


# Share of the peak of one core of Ironwood, causal pairs counted half, at
# 131,072 tokens: openxla/tokamax, microbenchmarks, 2025-11-13.
@pytest.mark.parametrize(
  'kernel, width, share',
  [
    ('fwd', 128, 0.343),
    ('dkv', 128, 0.372),
    ('fwd', 256, 0.634),
    ('dkv', 256, 0.717),
  ],
)
def test_price_by_the_matrix_unit_is_as_measured(kernel, width, share):
  chip = chips.by_kind('TPU7x')
  i = instruction(f'splash_mha_{kernel}', width=width)
  found = 1 / (hlo_kernels.mxu_seconds(chip, i, chip.peak_flops))
  assert found == pytest.approx(share, rel=0.05)


@pytest.mark.parametrize(
  'kind, width, faster',
  [
    ('TPU v5p', 128, 2),
    ('TPU v5p', 256, 2),
    ('TPU v6e', 128, 1),
    ('TPU v6e', 256, 2),
  ],
)
def test_narrow_heads_use_half_of_a_wide_matrix_unit(kind, width, faster):
  chip = chips.by_kind(kind)
  i = instruction('splash_mha_fwd', width=width)
  seconds = hlo_kernels.mxu_seconds(chip, i, chip.peak_flops)
  assert seconds == pytest.approx(2 / hlo_kernels.MXU_SHARES['fwd'] / faster)
