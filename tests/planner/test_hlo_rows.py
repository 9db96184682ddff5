"""Rows of gathers and scatters, counted by hand.

The programs have the form of those of libtpu: a fusion around the instruction,
and for a sum into zeros a second fusion around the first.
"""

import pytest

from maskdiff.distributed import chips
from maskdiff.planner import hlo, hlo_cost, hlo_rows
from maskdiff.planner.hlo_collectives import Machine

CHIP = chips.by_kind('TPU v5e')
ONE = Machine(CHIP, (1, 1), {'fsdp': 1}, ((0, 0),), slices=(0,))
ROWS = 3 * 128
TABLE = 4096 * 192 * 4
MOVED = ROWS * 192 * 4  # bytes of the rows

GATHER = """
%gathered (p: f32[4096,192], q: s32[384]) -> f32[384,192] {
  %p = f32[4096,192]{1,0:T(8,128)S(1)} parameter(0)
  %q = s32[384]{0:T(1024)} parameter(1)
  %r = s32[3,128]{1,0:T(2,128)} reshape(%q)
  %g = f32[3,128,192]{2,1,0:T(8,128)} gather(%p, %r), offset_dims={2}, \
collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=2, \
slice_sizes={1,192}, metadata={op_name="jit(f)/network(embedding)/gather"}
  ROOT %s = f32[384,192]{1,0:T(8,128)} reshape(%g)
}
"""
SCATTER = """
%scattered (p: f32[4096,192], q: s32[384], u: f32[384,192]) -> f32[4096,192] {
  %p = f32[4096,192]{1,0:T(8,128)} parameter(0)
  %q = s32[384]{0:T(1024)} parameter(1)
  %r = s32[3,128]{1,0:T(2,128)} reshape(%q)
  %u = f32[384,192]{1,0:T(8,128)} parameter(2)
  %v = f32[3,128,192]{2,1,0:T(8,128)} reshape(%u)
  ROOT %s = f32[4096,192]{1,0:T(8,128)} scatter(%p, %r, %v), \
update_window_dims={2}, inserted_window_dims={0}, \
scatter_dims_to_operand_dims={0}, index_vector_dim=2, to_apply=%add
}
"""
ZEROS = """
%zeros (z: f32[]) -> f32[4096,192] {
  %z = f32[] parameter(0)
  ROOT %b = f32[4096,192]{1,0:T(8,128)} broadcast(%z), dimensions={}
}

%summed (q: s32[384], u: f32[384,192], z: f32[]) -> f32[4096,192] {
  %q = s32[384]{0:T(1024)} parameter(0)
  %u = f32[384,192]{1,0:T(8,128)} parameter(1)
  %z = f32[] parameter(2)
  %b = f32[4096,192]{1,0:T(8,128)} fusion(%z), kind=kLoop, calls=%zeros
  ROOT %s = f32[4096,192]{1,0:T(8,128)} fusion(%b, %q, %u), kind=kCustom, \
calls=%scattered
}
"""


def program(called, others, estimate=''):
  return hlo.parse(
    f'HloModule jit_f, is_scheduled=true\n{others}\n'
    'ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n'
    f'  %rows.1 = f32[4096,192]{{1,0}} fusion(%x), kind=kCustom, '
    f'calls=%{called}, metadata={{op_name="jit(f)/rows"}}{estimate}\n}}\n'
  )


@pytest.mark.parametrize(
  'called, others, nbytes',
  [
    ('gathered', GATHER, 2 * MOVED),
    # In place: updates and rows are read, rows are written.
    ('scattered', SCATTER, 3 * MOVED),
  ],
)
def test_rows_of_fusions(called, others, nbytes):
  module = program(called, others)
  found = hlo_rows.of(module, 'main', module.computations['main']['rows.1'])
  assert found == hlo_rows.Rows(ROWS, nbytes)


def test_rows_added_to_zeros_also_write_all_zeros():
  """A fusion inside a fusion: the target is an argument of the inner one."""
  module = program('summed', SCATTER + ZEROS)
  found = hlo_rows.of(module, 'main', module.computations['main']['rows.1'])
  assert found == hlo_rows.Rows(ROWS, 3 * MOVED + TABLE)


def test_single_numbers_are_rows():
  text = (
    'HloModule jit_f\nENTRY %main (x: f32[512]) -> f32[64] {\n'
    '  %x = f32[512] parameter(0)\n  %i = s32[64] parameter(1)\n'
    '  ROOT %g = f32[64] gather(%x, %i), offset_dims={}, slice_sizes={1}\n}\n'
  )
  module = hlo.parse(text)
  i = module.computations['main']['g']
  assert hlo_rows.of(module, 'main', i) == hlo_rows.Rows(64, 2 * 64 * 4)


def test_time_of_rows_is_part_of_the_step():
  cost = hlo_cost.price(program('gathered', GATHER), ONE)
  expected = ROWS * hlo_rows.ROW_S + 2 * MOVED / CHIP.hbm_bandwidth
  assert cost.rows_s == cost.total_s == pytest.approx(expected)
  assert not cost.unpriced
  (operation,) = cost.operations.values()
  assert operation.seconds == cost.rows_s


def test_estimate_of_the_compiler_comes_first():
  estimate = ', backend_config={"estimated_cycles":"1500000"}'
  cost = hlo_cost.price(program('gathered', GATHER, estimate), ONE)
  assert cost.total_s == pytest.approx(0.001)
  assert cost.rows_s == 0


@pytest.mark.parametrize('rows, measured_s', [(13e6, 0.29), (1.3e6, 0.026)])
def test_rows_take_as_long_as_measured(rows, measured_s):
  """Of one number each, on TPU v2 (pytorch/xla, issue 8720)."""
  assert rows * hlo_rows.ROW_S == pytest.approx(measured_s, rel=0.15)
