"""Rooflines of GPU programs against counts by hand."""

import pytest

from maskdiff.distributed import chips
from maskdiff.planner import hlo, roofline

# A byte takes 1 us and a FLOP of bfloat16 1 ns.
GPU = roofline.Gpu(peak_flops=1e9, hbm_bandwidth=1e6)
BYTE_S, FLOP_S = 1e-6, 1e-9
GEMM = (
  'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
  '{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
  '"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],'
  '"rhs_batch_dimensions":[]}}}'
)


def program(lines, others=''):
  return hlo.parse(
    f'HloModule jit_f, is_scheduled=true\n\n{others}'
    'ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {\n'
    '  %a = bf16[64,32]{1,0} parameter(0)\n'
    '  %b = bf16[32,16]{1,0} parameter(1)\n'
    f'{lines}}}\n'
  )


def estimate(lines, others='', **options):
  return roofline.estimate(program(lines, others), GPU, **options)


def seconds(name, lines, others=''):
  return estimate(lines, others).instructions[name]


def bounds(lines, name, others=''):
  """Returns the FLOPs and bytes of an instruction of the entry."""
  module = program(lines, others)
  body = module.computations['main']
  i = body[name]
  return roofline.flops(body, i), roofline.nbytes(module, 'main', i)


def test_a_product_has_two_flops_per_multiplication():
  line = (
    '  %dot.1 = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, '
    'rhs_contracting_dims={0}\n'
  )
  flops, nbytes = bounds(line, 'dot.1')
  assert flops == 2 * 64 * 16 * 32
  assert nbytes == 2 * (64 * 32 + 32 * 16 + 64 * 16)
  assert seconds('dot.1', line) == pytest.approx(
    max(flops * FLOP_S, nbytes * BYTE_S)
  )


def test_a_custom_call_of_cublas_is_a_product():
  line = (
    '  %cublas-gemm.1 = (bf16[64,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), '
    f'{GEMM}\n'
  )
  assert bounds(line, 'cublas-gemm.1')[0] == 2 * 64 * 16 * 32


def test_the_longer_of_both_times_counts_and_rates_differ_by_type():
  gpu = roofline.Gpu(peak_flops=1.0, hbm_bandwidth=1e12)
  for dtype, factor in (('bf16', 1), ('f32', 2), ('s8', 0.5)):
    module = program(
      f'  %c = {dtype}[64,32]{{1,0}} convert(%a)\n'
      f'  %d = {dtype}[32,16]{{1,0}} convert(%b)\n'
      f'  %dot.1 = {dtype}[64,16]{{1,0}} dot(%c, %d), '
      'lhs_contracting_dims={1}, rhs_contracting_dims={0}\n'
    )
    found = roofline.estimate(module, gpu).instructions
    assert found['dot.1'] == 2 * 64 * 16 * 32 * factor
    assert found['c'] < 1e-6


def test_a_triton_fusion_has_the_product_inside_and_the_bytes_outside():
  inside = (
    '%gemm_fusion_dot.1_computation (p0: bf16[64,32], p1: bf16[32,16]) -> '
    'bf16[64,16] {\n'
    '  %p0 = bf16[64,32]{1,0} parameter(0)\n'
    '  %p1 = bf16[32,16]{1,0} parameter(1)\n'
    '  %dot.1 = f32[64,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, '
    'rhs_contracting_dims={0}\n'
    '  ROOT %convert.1 = bf16[64,16]{1,0} convert(%dot.1)\n}\n\n'
  )
  line = (
    '  ROOT %gemm_fusion_dot.1 = bf16[64,16]{1,0} fusion(%a, %b), '
    'kind=kCustom, calls=%gemm_fusion_dot.1_computation, backend_config={'
    '"fusion_backend_config":{"kind":"__triton_gemm"}}\n'
  )
  nbytes = 2 * (64 * 32 + 32 * 16 + 64 * 16)
  assert bounds(line, 'gemm_fusion_dot.1', inside)[1] == nbytes
  fast = roofline.Gpu(peak_flops=1.0, hbm_bandwidth=1e12)
  found = roofline.estimate(program(line, inside), fast).instructions
  assert found == {'gemm_fusion_dot.1': 2 * 64 * 16 * 32}


@pytest.mark.parametrize(
  'target, mask, products',
  [
    ('__cudnn$fmhaSoftmax', 'NO_MASK', 2),
    ('__cudnn$fmhaSoftmax', 'CAUSAL', 1),
    ('__cudnn$fmhaSoftmaxBackward', 'NO_MASK', 5),
  ],
)
def test_attention_of_cudnn_has_two_products_forward_and_five_backward(
  target, mask, products
):
  qkv = 'bf16[2,128,4,64]{3,2,1,0}'
  lines = (
    f'  %q = {qkv} broadcast(%a), dimensions={{1,3}}\n'
    f'  %cudnn.1 = ({qkv}, f32[2,4,128]{{2,1,0}}, u8[0]{{0}}) '
    f'custom-call(%q, %q, %q), custom_call_target="{target}", '
    'backend_config={"operation_queue_id":"0","cudnn_fmha_backend_config":{'
    '"fmha_scale":0.125,"intermediate_tensor_shape":{"element_type":"BF16",'
    '"dimensions":["2","4","128","128"],"tuple_shapes":[]},'
    f'"is_flash_attention":true,"mask_type":"{mask}"}}}}\n'
  )
  pairs = 2 * 4 * 128 * 128
  assert bounds(lines, 'cudnn.1')[0] == products * 2 * pairs * 64


def test_slices_of_a_stack_count_and_not_the_stack():
  inside = (
    '%fused (p0: bf16[24,64,32], p1: s32[], p2: bf16[24,64,32]) -> '
    'bf16[24,64,32] {\n'
    '  %p0 = bf16[24,64,32]{2,1,0} parameter(0)\n'
    '  %p1 = s32[] parameter(1)\n'
    '  %p2 = bf16[24,64,32]{2,1,0} parameter(2)\n'
    '  %z = s32[] constant(0)\n'
    '  %slice.1 = bf16[1,64,32]{2,1,0} dynamic-slice(%p0, %p1, %z, %z), '
    'dynamic_slice_sizes={1,64,32}\n'
    '  %view.1 = bf16[64,32]{1,0} bitcast(%slice.1)\n'
    '  %twice = bf16[64,32]{1,0} add(%view.1, %view.1)\n'
    '  %view.2 = bf16[1,64,32]{2,1,0} bitcast(%twice)\n'
    '  ROOT %update.1 = bf16[24,64,32]{2,1,0} dynamic-update-slice(%p2, '
    '%view.2, %p1, %z, %z)\n}\n\n'
  )
  lines = (
    '  %stack = bf16[24,64,32]{2,1,0} broadcast(%a), dimensions={1,2}\n'
    '  %one = s32[] constant(1)\n'
    '  %fusion.1 = bf16[24,64,32]{2,1,0} fusion(%stack, %one, %stack), '
    'kind=kLoop, calls=%fused\n'
  )
  # One slice is read and one is written; the index has 4 bytes.
  assert bounds(lines, 'fusion.1', inside)[1] == 2 * (2 * 64 * 32) + 4


LOOP = (
  '%body (s: (s32[], bf16[64,32])) -> (s32[], bf16[64,32]) {\n'
  '  %s = (s32[], bf16[64,32]{1,0}) parameter(0)\n'
  '  %n = s32[] get-tuple-element(%s), index=0\n'
  '  %x = bf16[64,32]{1,0} get-tuple-element(%s), index=1\n'
  '  %negate.1 = bf16[64,32]{1,0} negate(%x)\n'
  '  ROOT %t = (s32[], bf16[64,32]{1,0}) tuple(%n, %negate.1)\n}\n\n'
  '%cond (s: (s32[], bf16[64,32])) -> pred[] {\n'
  '  %s.1 = (s32[], bf16[64,32]{1,0}) parameter(0)\n'
  '  ROOT %p = pred[] constant(false)\n}\n\n'
)


def loop(known=''):
  return (
    '  %zero = s32[] constant(0)\n'
    '  %init = (s32[], bf16[64,32]{1,0}) tuple(%zero, %a)\n'
    '  %while.1 = (s32[], bf16[64,32]{1,0}) while(%init), condition=%cond, '
    f'body=%body, metadata={{op_name="jit(f)/while"}}{known}\n'
  )


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
  once = 2 * 2 * 64 * 32 * BYTE_S
  known = ', backend_config={"known_trip_count":{"n":"4"}}'
  found = estimate(loop(known), LOOP)
  assert found.instructions == pytest.approx({'negate.1': 4 * once})
  found = estimate(loop(), LOOP)
  assert found.instructions == pytest.approx({'negate.1': once})
  assert found.unresolved == ['jit(f)/while']
  found = estimate(loop(), LOOP, expected_trips={'jit(f)/while': 2.5}.get)
  assert found.instructions == pytest.approx({'negate.1': 2.5 * once})
  assert not found.unresolved


def test_collectives_have_no_price():
  line = '  %all-reduce.1 = bf16[64,32]{1,0} all-reduce(%a), to_apply=%add\n'
  found = estimate(line)
  assert (found.instructions, found.unpriced) == ({}, {'all-reduce.1': 1})


def test_every_gpu_with_a_peak_has_a_bandwidth():
  tpus = {kind for chip in chips.CHIPS for kind in chip.device_kinds}
  assert chips.GPU_BANDWIDTH.keys() == chips.PEAK_FLOPS.keys() - tpus
