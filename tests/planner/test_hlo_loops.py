"""Trip counts of loops written by hand."""

import pytest

from maskdiff.planner import hlo, hlo_loops


def counting(first='0', limit='32', step='1', direction='LT', update='add'):
  """Returns a program whose only loop counts from first to limit."""
  return f"""HloModule jit_f
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8] get-tuple-element(%s), index=1
  %one = s32[] constant({step})
  %next = s32[] {update}(%i, %one)
  %copied = s32[] copy(%next)
  ROOT %out = (s32[], f32[8]) tuple(%copied, %x)
}}

%condition (s: (s32[], f32[8])) -> pred[] {{
  %s.1 = (s32[], f32[8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %limit = s32[] constant({limit})
  ROOT %test = pred[] compare(%i.1, %limit), direction={direction}
}}

ENTRY %main (x: f32[8]) -> f32[8] {{
  %x.2 = f32[8] parameter(0)
  %zero = s32[] constant({first})
  %start = (s32[], f32[8]) tuple(%zero, %x.2)
  %while.1 = (s32[], f32[8]) while(%start), condition=%condition, body=%body
  ROOT %r = f32[8] get-tuple-element(%while.1), index=1
}}
"""


def trips(text, computation='main', name='while.1'):
  module = hlo.parse(text)
  loop = module.computations[computation][name]
  return hlo_loops.trip_count(module, computation, loop)


@pytest.mark.parametrize(
  'loop, count',
  [
    ({}, 32),
    ({'first': '2'}, 30),
    ({'step': '3'}, 11),
    ({'direction': 'LE'}, 33),
    ({'direction': 'NE'}, 32),
    ({'first': '9', 'limit': '0', 'direction': 'GT', 'update': 'subtract'}, 9),
    ({'first': '9', 'limit': '0', 'direction': 'GE', 'step': '-1'}, 10),
    ({'first': '40'}, 0),
  ],
)
def test_counter_against_a_constant(loop, count):
  assert trips(counting(**loop)) == count


def test_limit_may_be_the_first_operand():
  text = counting().replace('compare(%i.1, %limit)', 'compare(%limit, %i.1)')
  assert trips(text.replace('direction=LT', 'direction=GT')) == 32


def test_stated_count_is_used():
  text = counting(limit='7').replace(
    'body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"5"}}'
  )
  assert trips(text) == 5


def test_loop_invariant_limit():
  text = counting().replace('(s32[], f32[8])', '(s32[], f32[8], s32[])')
  text = text.replace(
    '%limit = s32[] constant(32)',
    '%limit = s32[] get-tuple-element(%s.1), index=2',
  )
  text = text.replace('tuple(%copied, %x)', 'tuple(%copied, %x, %kept)')
  text = text.replace(
    '  %one =', '  %kept = s32[] get-tuple-element(%s), index=2\n  %one ='
  )
  carried = text.replace('tuple(%zero, %x.2)', 'tuple(%zero, %x.2, %n)')
  constant = carried.replace('  %start', '  %n = s32[] constant(12)\n  %start')
  assert trips(constant) == 12
  # The same loop with a limit that data decides.
  data = carried.replace('  %start', '  %n = s32[] convert(%x.2)\n  %start')
  assert trips(data) is None


def test_inner_loop_takes_its_limit_from_the_outer_loop():
  inner = counting(limit='4').replace('ENTRY %main', '%unused')
  inner = inner.replace('%while.1', '%while.0')
  outer = """
%outer_body (t: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %t = (s32[], f32[8], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %y = f32[8] get-tuple-element(%t), index=1
  %first = s32[] get-tuple-element(%t), index=2
  %begin = (s32[], f32[8]) tuple(%first, %y)
  %while.2 = (s32[], f32[8]) while(%begin), condition=%condition, body=%body
  %y2 = f32[8] get-tuple-element(%while.2), index=1
  %two = s32[] constant(2)
  %j2 = s32[] add(%two, %j)
  ROOT %t2 = (s32[], f32[8], s32[]) tuple(%j2, %y2, %first)
}

%outer_test (t: (s32[], f32[8], s32[])) -> pred[] {
  %t.1 = (s32[], f32[8], s32[]) parameter(0)
  %j.1 = s32[] get-tuple-element(%t.1), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%j.1, %ten), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x.3 = f32[8] parameter(0)
  %zero.3 = s32[] constant(0)
  %one.3 = s32[] constant(1)
  %start.3 = (s32[], f32[8], s32[]) tuple(%zero.3, %x.3, %one.3)
  %while.1 = (s32[], f32[8], s32[]) while(%start.3), condition=%outer_test, body=%outer_body
  ROOT %r.3 = f32[8] get-tuple-element(%while.1), index=1
}
"""  # noqa: E501
  assert trips(inner + outer) == 5
  # From 1, which the outer loop carries, to 4.
  assert trips(inner + outer, 'outer_body', 'while.2') == 3


@pytest.mark.parametrize(
  'old, new',
  [
    ('%next = s32[] add(%i, %one)', '%next = s32[] multiply(%i, %one)'),
    ('%next = s32[] add(%i, %one)', '%next = s32[] add(%i, %i)'),
    ('%zero = s32[] constant(0)', '%zero = s32[] convert(%x.2)'),
    ('direction=LT', 'direction=EQ'),
    ('pred[] compare(%i.1, %limit), direction=LT', 'pred[] and(%i.1, %limit)'),
  ],
)
def test_unknown_count_is_none(old, new):
  assert old in counting()
  assert trips(counting().replace(old, new)) is None
