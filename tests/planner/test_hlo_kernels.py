"""FLOPs of attention kernels, computed by hand."""

import pytest

from maskdiff.distributed import chips
from maskdiff.planner import hlo, hlo_kernels

# 2 rows, 3 heads, 1024 queries and keys, 128 wide.
PRODUCT = 2 * 2 * 3 * 1024 * 1024 * 128


def call(name, grid=(2, 2), dtype='bf16', keys=1024):
  operands = (
    f's8[1,{grid[0]},{grid[1]}]{{2,1,0}}, {dtype}[2,3,1024,128]{{3,2,1,0}}, '
    f'{dtype}[2,3,{keys},128]{{3,2,1,0}}, {dtype}[2,3,{keys},128]{{3,2,1,0}}'
  )
  return (
    f'  %{name} = bf16[2,3,1024,128] custom-call(%x), '
    'custom_call_target="tpu_custom_call", '
    f'operand_layout_constraints={{{operands}}}, metadata={{op_name="a"}}\n'
  )


def flops(name, causal=False, others='', **kernel):
  module = hlo.parse(
    'HloModule jit_f\nENTRY %main (x: f32[8]) -> f32[8] {\n'
    '  %x = f32[8] parameter(0)\n' + call(name, **kernel) + others + '}\n'
  )
  i = module.computations['main'][name]
  return hlo_kernels.attention_flops(module, i, causal)


@pytest.mark.parametrize(
  'name, products',
  [
    ('splash_mha_fwd_segmented_residuals.2', 2),
    ('splash_mha_dkv_segmented_no_residuals', 5),
    ('splash_mha_dq_segmented', 3),
  ],
)
def test_matrix_products_of_each_kernel(name, products):
  assert flops(name) == products * PRODUCT


def test_separate_kernel_for_queries_saves_one_product():
  others = call('splash_mha_dq_segmented.1')
  assert flops('splash_mha_dkv_segmented', others=others) == 4 * PRODUCT


def test_more_keys_than_queries():
  assert flops('splash_mha_fwd', keys=2048) == 4 * PRODUCT


@pytest.mark.parametrize(
  'grid, share', [((1, 1), 1), ((2, 2), 3 / 4), ((8, 8), 36 / 64)]
)
def test_causal_kernels_skip_blocks_above_the_diagonal(grid, share):
  assert flops('splash_mha_fwd', causal=True, grid=grid) == pytest.approx(
    2 * PRODUCT * share
  )


def test_other_kernels_have_no_flops():
  assert flops('some_kernel') is None
  assert flops('splash_something') is None


def test_kernels_run_at_half_of_the_peak():
  chip = chips.by_kind('TPU v5p')
  assert hlo_kernels.seconds(chip, chip.peak_flops) == 2.0
