"""Parsing the text of compiled programs."""

import pytest

from maskdiff.planner import hlo

TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=4

FileNames
1 "/somewhere/model.py"

%fused (param: bf16[8,128]) -> bf16[8,128] {
  %param = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %product = bf16[8,128]{1,0} convolution(%param, %param), metadata={op_name="jit(f)/bl,ld->bd/dot_general" stack_frame_id=2}
  ROOT %out = bf16[8,128]{1,0} bitcast(%product), metadata={op_name="jit(f)/reshape"}
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %kernel.1 = (f32[4]{0}, bf16[8,128]{1,0}) custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "8"
}}, metadata={op_name="jit(f)/kernel" stack_frame_id=1}
  %b = bf16[8,128]{1,0} get-tuple-element(%kernel.1), index=1
  ROOT %fusion.3 = bf16[8,128]{1,0} fusion(%b), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"1200"}}
}
"""  # noqa: E501


def test_computations_and_instructions_are_in_order():
  module = hlo.parse(TEXT)
  assert module.entry == 'main'
  assert module.num_partitions == 4
  assert list(module.computations) == ['fused', 'main']
  assert list(module.computations['main']) == ['a', 'kernel.1', 'b', 'fusion.3']
  fusion = module.roots['main']
  assert (fusion.op, fusion.operands, fusion.cycles) == ('fusion', ('b',), 1200)
  assert fusion.attribute('calls') == 'fused'
  assert fusion.attribute('to_apply') is None


def test_instruction_may_span_lines():
  kernel = hlo.parse(TEXT).computations['main']['kernel.1']
  assert kernel.op == 'custom-call'
  assert kernel.op_name == 'jit(f)/kernel'
  assert kernel.cycles == 0


def test_fusion_is_described_by_its_matrix_product():
  module = hlo.parse(TEXT)
  source = hlo.describing(module, module.roots['main'])
  assert source.op_name == 'jit(f)/bl,ld->bd/dot_general'


def test_named_instruction_describes_itself():
  module = hlo.parse(TEXT)
  kernel = module.computations['main']['kernel.1']
  assert hlo.describing(module, kernel) is kernel


@pytest.mark.parametrize(
  'kind, size',
  [
    ('bf16[8,128]{1,0:T(8,128)(2,1)S(1)}', 2048),
    ('f32[]{:T(128)}', 4),
    ('pred[3]', 3),
    ('s4[8]{0}', 4),
    ('(bf16[4]{0}, /*index=1*/f32[2]{0}, token[])', 16),
  ],
)
def test_bytes_of_a_type(kind, size):
  assert hlo.nbytes(kind) == size


def test_elements_of_a_tuple_keep_their_layouts():
  kind = '((bf16[8,4]{1,0}), f32[2]{0:T(128)S(5)}, u32[]{:S(2)})'
  assert hlo.elements(kind) == [
    '(bf16[8,4]{1,0})',
    'f32[2]{0:T(128)S(5)}',
    'u32[]{:S(2)}',
  ]
  assert hlo.elements('f32[2,2]{1,0}') == ['f32[2,2]{1,0}']


def test_text_without_entry_is_refused():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('HloModule empty\n')
