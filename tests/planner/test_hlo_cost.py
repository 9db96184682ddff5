"""The time of schedules written by hand."""

import pytest

from maskdiff.distributed import chips
from maskdiff.planner import hlo, hlo_cost
from maskdiff.planner.hlo_collectives import (
  ICI_HOP_S,
  ICI_START_S,
  Machine,
)

CHIP = chips.by_kind('TPU v5p')
# Two chips with one link between them.
PAIR = Machine(
  CHIP, (2, 1, 1), {'fsdp': 2}, ((0, 0, 0), (1, 0, 0)), slices=(0, 0)
)
MS = CHIP.clock_hz / 1000  # cycles of a millisecond
# An all-gather that takes 10 ms: half of it is received over one link.
LATENCY_S = ICI_START_S + ICI_HOP_S
GATHERED = round(2 * CHIP.link_bandwidth * (0.010 - LATENCY_S) / 2)
LAYOUT = '{0:T(1024)}'


def work(name, ms, op='f32[8] copy', operand='x', op_name=''):
  """Returns an instruction of `ms` milliseconds."""
  return (
    f'  %{name} = {op}(%{operand}), metadata={{op_name="{op_name}"}}, '
    f'backend_config={{"estimated_cycles":"{round(ms * MS)}"}}\n'
  )


def program(lines, others=''):
  return (
    'HloModule jit_f, is_scheduled=true, num_partitions=2\n'
    + others
    + 'ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n'
    + lines
    + '}\n'
  )


def price(lines, others='', machine=PAIR, **options):
  """Returns the Cost; the times of its instructions add up to the total."""
  module = hlo.parse(program(lines, others))
  cost = hlo_cost.price(module, machine, **options)
  assert sum(cost.instructions.values()) == pytest.approx(cost.total_s)
  return cost


def gather(name='g', op='all-gather', size=GATHERED):
  kind = f'bf16[{size}]{LAYOUT}'
  if op.endswith('-start'):
    kind = f'(bf16[{size // 2}]{LAYOUT}, {kind})'
  return f'  %{name} = {kind} {op}(%x), replica_groups={{{{0,1}}}}\n'


def loop(body, name='while.1', op_name='jit(f)/while', trips=None):
  """Returns the computations of a loop over `body`, and the loop."""
  known = (
    f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    if trips
    else ''
  )
  computations = (
    f'%{name}.body (s: f32[8]) -> f32[8] {{\n'
    f'  %x = f32[8] parameter(0)\n{body}  ROOT %r = f32[8] copy(%x)\n}}\n\n'
    f'%{name}.test (s: f32[8]) -> pred[] {{\n'
    '  %s = f32[8] parameter(0)\n  ROOT %c = pred[] convert(%s)\n}\n\n'
  )
  line = (
    f'  %{name} = f32[8] while(%x), condition=%{name}.test, '
    f'body=%{name}.body, metadata={{op_name="{op_name}"}}{known}\n'
  )
  return computations, line


def test_time_is_cycles_over_the_clock_rate():
  cost = price(work('a', 2) + work('b', 3))
  assert cost.cycles == pytest.approx(5 * MS)
  assert cost.total_s == pytest.approx(0.005)
  assert cost.cycles_s == pytest.approx(0.005)
  assert not cost.exposed_s


def test_loops_multiply_their_bodies():
  inner, inner_line = loop(work('a', 1), 'while.2', trips=3)
  outer, outer_line = loop(inner_line + work('b', 2), trips=4)
  cost = price(outer_line + work('c', 5), inner + outer)
  assert cost.total_s == pytest.approx((4 * (3 * 1 + 2) + 5) / 1000)
  assert cost.cycles == pytest.approx(25 * MS)
  counts = {o.op_name: o.count for o in cost.operations.values()}
  assert counts == {'a': 12, 'b': 4, 'c': 1}


def test_data_dependent_loop_takes_the_expected_count():
  computations, line = loop(work('a', 1), op_name='jit(f)/loss/while')
  cost = price(line, computations, expected_trips={'jit(f)/loss/while': 8}.get)
  assert cost.total_s == pytest.approx(0.008)
  assert cost.loops == [('jit(f)/loss/while', 8, 'expected')]
  assert cost.unresolved == []


def test_loop_without_a_count_is_listed():
  computations, line = loop(work('a', 1))
  cost = price(line, computations)
  assert cost.total_s == pytest.approx(0.001)
  assert cost.unresolved == ['jit(f)/while']


def test_call_is_part_of_the_schedule():
  called = '%f (s: f32[8]) -> f32[8] {\n' + work('a', 4) + '}\n\n'
  cost = price('  %call = f32[8] call(%x), to_apply=%f\n', called)
  assert cost.total_s == pytest.approx(0.004)


def test_branches_are_equally_likely():
  branches = ''.join(
    f'%{name} (s: f32[8]) -> f32[8] {{\n' + work('a', ms) + '}\n\n'
    for name, ms in (('yes', 4), ('no', 2))
  )
  cost = price(
    '  %c = f32[8] conditional(%x, %x, %x), branch_computations={%yes, %no}\n',
    branches,
  )
  assert cost.total_s == pytest.approx(0.003)
  assert cost.cycles == pytest.approx(3 * MS)


def test_synchronous_collective_is_exposed():
  cost = price(gather() + work('a', 3))
  assert cost.total_s == pytest.approx(0.013)
  assert cost.exposed_s['ici'] == pytest.approx(0.010)
  (traffic,) = cost.traffic.values()
  assert (traffic.kind, traffic.axes) == ('all-gather', 'fsdp')
  assert (traffic.count, traffic.sync_count) == (1, 1)
  assert traffic.nbytes == pytest.approx(GATHERED)


def test_gathered_integers_have_half_the_bytes():
  """Of bfloat16; the products themselves have the compiler's cycles."""
  cost = price(gather().replace('bf16', 's8') + work('a', 3))
  assert cost.exposed_s['ici'] == pytest.approx(0.005 + LATENCY_S / 2)
  (traffic,) = cost.traffic.values()
  assert (traffic.dtype, traffic.nbytes) == ('s8', GATHERED / 2)


@pytest.mark.parametrize('ms, exposed', [(4, 6), (10, 0), (12, 0)])
def test_asynchronous_collective_is_exposed_after_the_work(ms, exposed):
  cost = price(
    gather('s', 'all-gather-start')
    + work('a', ms)
    + '  %d = bf16[8] all-gather-done(%s)\n'
  )
  assert cost.exposed_s['ici'] == pytest.approx(exposed / 1000, abs=1e-9)
  assert cost.total_s == pytest.approx((ms + exposed) / 1000)
  (traffic,) = cost.traffic.values()
  assert (traffic.count, traffic.sync_count) == (1, 0)


def test_collectives_queue_behind_each_other():
  cost = price(
    gather('s', 'all-gather-start')
    + gather('t', 'all-gather-start')
    + work('a', 15)
    + '  %d = bf16[8] all-gather-done(%s)\n'
    + '  %e = bf16[8] all-gather-done(%t)\n'
  )
  assert cost.exposed_s['ici'] == pytest.approx(0.005)
  assert cost.busy_s['ici'] == pytest.approx(0.020)


def test_exposed_time_in_a_loop_counts_every_trip():
  computations, line = loop(gather() + work('a', 1), trips=5)
  cost = price(line, computations)
  assert cost.exposed_s['ici'] == pytest.approx(0.050)
  assert cost.total_s == pytest.approx(0.055)


def test_collective_inside_fusions_is_asynchronous():
  """The second form of an asynchronous collective of the TPU compiler."""
  others = (
    f'%start (p: bf16[8]) -> bf16[{GATHERED}] {{\n'
    + '  %x = bf16[8] parameter(0)\n'
    + gather('inner')
    + '}\n\n'
    + '%async_collective_fusion.1 (p: f32[8]) -> f32[8] {\n'
    + '  %x = f32[8] parameter(0)\n'
    + gather('continued')
    + '}\n\n'
    + '%done (p: f32[8]) -> f32[8] {\n  %q = f32[8] parameter(0)\n}\n\n'
  )
  cost = price(
    '  %async-collective-start.1 = (bf16[8], bf16[8]) fusion(%x), '
    'kind=kCustom, calls=%start\n'
    + work('fusion.5', 4, 'f32[8] fusion').replace(
      '), metadata',
      '), kind=kOutput, calls=%async_collective_fusion.1, metadata',
    )
    + '  %async-collective-done.1 = bf16[8] fusion(%fusion.5), kind=kCustom, '
    'calls=%done\n',
    others,
  )
  (traffic,) = cost.traffic.values()
  assert (traffic.count, traffic.sync_count) == (1, 0)
  assert cost.exposed_s['ici'] == pytest.approx(0.006)
  assert cost.total_s == pytest.approx(0.010)


def test_fused_reduce_scatter_is_synchronous_and_moves_half():
  others = (
    f'%all-reduce-scatter.1 (p: bf16[{GATHERED}]) -> bf16[8] {{\n'
    '  %x = bf16[8] parameter(0)\n'
    + gather('sum', 'all-reduce')
    + '  ROOT %mine = bf16[8] dynamic-slice(%sum)\n}\n\n'
  )
  cost = price(
    '  %fusion.1 = bf16[8] fusion(%x), kind=kCustom, '
    'calls=%all-reduce-scatter.1\n' + work('a', 1),
    others,
  )
  (traffic,) = cost.traffic.values()
  assert traffic.kind == 'reduce-scatter'
  assert traffic.sync_count == 1
  assert traffic.nbytes == pytest.approx(GATHERED)
  assert cost.exposed_s['ici'] == pytest.approx(0.010)


def test_collective_on_another_thread_is_asynchronous():
  others = (
    '%offloaded (p: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n'
    + gather('inner')
    + '}\n\n'
  )
  cost = price(
    '  %s = ((f32[8]), f32[8], u32[]) async-start(%x), calls=%offloaded, '
    'async_execution_thread="sparsecore"\n'
    + work('a', 7)
    + '  %d = f32[8] async-done(%s)\n',
    others,
  )
  assert cost.exposed_s['ici'] == pytest.approx(0.003)


def test_prefetch_is_exposed_after_the_work():
  size = round(CHIP.hbm_bandwidth * 0.010 / 2)
  cost = price(
    f'  %s = (bf16[{size}]{{0:S(1)}}, bf16[{size}]{{0}}, u32[]) '
    'copy-start(%x)\n' + work('a', 4) + '  %d = bf16[8] copy-done(%s)\n'
  )
  assert cost.exposed_s['prefetch'] == pytest.approx(0.006)


def test_host_copies_overlap_in_both_directions():
  size = round(CHIP.host_bandwidth * 0.010 / 2)
  cost = price(
    f'  %o = (bf16[{size}]{{0:S(5)}}, bf16[{size}]{{0}}, u32[]) '
    'copy-start(%x)\n'
    f'  %i = (bf16[{size}]{{0}}, bf16[{size}]{{0:S(5)}}, u32[]) '
    'copy-start(%x)\n'
    + work('a', 4)
    + '  %p = bf16[8] copy-done(%o)\n  %j = bf16[8] copy-done(%i)\n'
  )
  assert cost.total_s == pytest.approx(0.010)
  assert cost.exposed_s['host_out'] == pytest.approx(0.006)
  assert cost.exposed_s['host_in'] == 0
  assert cost.host_bytes == pytest.approx(4 * size)


@pytest.mark.parametrize(
  'operands, destination, queue',
  [
    ('bf16[32,{n}]{{1,0:S(5)}}', 'bf16[1,{n}]{{1,0}}', 'host_in'),
    (
      'bf16[32,{n}]{{1,0:S(5)}}, bf16[1,{n}]{{1,0}}, s32[]',
      'bf16[32,{n}]{{1,0:S(5)}}',
      'host_out',
    ),
  ],
)
def test_only_the_slice_of_a_host_buffer_moves(operands, destination, queue):
  size = round(CHIP.host_bandwidth * 0.010 / 2)
  kind = f'(({operands}), {destination}, u32[])'.format(n=size)
  cost = price(
    f'  %s = {kind} async-start(%x)\n'
    + work('a', 4)
    + '  %d = bf16[8] async-done(%s)\n'
  )
  assert cost.exposed_s == {queue: pytest.approx(0.006)}


def test_collectives_between_slices_run_from_send_to_recv_done():
  machine = Machine(
    CHIP,
    (2, 1, 1),
    {'replica': 2, 'fsdp': 2},
    ((0, 0, 0), (1, 0, 0)) * 2,
    slices=(0, 0, 1, 1),
  )
  size = round(CHIP.dcn_bandwidth * 0.010 / 2)
  marks = (
    'is_host_transfer=true, frontend_attributes={'
    '_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_host_transfer_rendezvous="all-reduce.1_0",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}\n'
  )
  cost = price(
    f'  %s = (bf16[{size}], u32[], token[]) send(%x, %x), {marks}'
    f'  %r = (bf16[{size}], u32[], token[]) recv(%x), {marks}'
    + work('a', 4)
    + '  %sd = token[] send-done(%s)\n'
    '  %rd = (bf16[8], token[]) recv-done(%r)\n',
    machine=machine,
  )
  (traffic,) = cost.traffic.values()
  assert (traffic.kind, traffic.axes) == ('all-reduce', 'replica')
  assert (traffic.network, traffic.count, traffic.sync_count) == ('dcn', 1, 0)
  assert cost.exposed_s['dcn'] == pytest.approx(0.006, rel=0.01)
  assert cost.exposed_s['ici'] == 0


@pytest.mark.parametrize(
  'shares, ms', [(None, 2.0), ((0.75, 0.25), 1.5), ((0.0, 1.0), 3.0)]
)
@pytest.mark.parametrize(
  'attributes',
  [
    'branch_computations={%no, %yes}',
    'true_computation=%yes, false_computation=%no',
  ],
)
def test_branches_run_equally_often_or_by_their_shares(attributes, shares, ms):
  """The branch of False takes 1 ms and the other one 3 ms."""
  branches = ''.join(
    f'%{name} (s: f32[8]) -> f32[8] {{\n  %x = f32[8] parameter(0)\n'
    f'{work("w" + name, ms)}}}\n\n'
    for name, ms in (('no', 1), ('yes', 3))
  )
  line = (
    f'  %c = f32[8] conditional(%x, %x, %x), {attributes}, '
    'metadata={op_name="jit(f)/cond"}\n'
  )
  cost = price(line, branches, branch_shares={'jit(f)/cond': shares}.get)
  assert cost.total_s == pytest.approx(ms / 1000)


KERNEL = (
  '  %{name} = bf16[1,1,1024,128] custom-call(%x), '
  'custom_call_target="tpu_custom_call", '
  'operand_layout_constraints={{bf16[1,1,1024,128]{{3,2,1,0}}, '
  'bf16[1,1,1024,128]{{3,2,1,0}}}}, metadata={{op_name="{op_name}"}}\n'
)


def test_attention_kernels_reach_half_of_the_peak():
  cost = price(KERNEL.format(name='splash_mha_fwd.1', op_name='jit(f)/fwd'))
  flops = 2 * 2 * 1024 * 1024 * 128
  assert cost.kernel_flops == flops
  assert cost.kernel_s == pytest.approx(2 * flops / CHIP.peak_flops)
  assert cost.total_s == cost.kernel_s
  assert cost.cycles == 0
  (operation,) = cost.operations.values()
  assert operation.op_name == 'jit(f)/fwd'


def test_other_kernels_are_listed():
  computations, line = loop(KERNEL.format(name='mine.4', op_name=''), trips=3)
  cost = price(line, computations)
  assert dict(cost.unpriced) == {'mine': 3}
  assert cost.total_s == 0


def test_large_scatters_without_an_estimate_are_listed():
  called = '%f (s: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n}\n\n'
  computations, line = loop(
    '  %scatter_fusion.3 = f32[1024,512] fusion(%x), calls=%f\n'
    '  %gather_fusion.3 = f32[1024] fusion(%x), calls=%f\n',
    trips=4,
  )
  cost = price(line, called + computations)
  assert dict(cost.unpriced) == {'scatter_fusion': 4}  # the other is small


def test_operations_with_one_name_add_up():
  cost = price(
    work('fusion.1', 1, op_name='jit(f)/mul')
    + work('fusion.2', 2, op_name='jit(f)/mul')
    + work('copy.3', 4)
  )
  found = {
    o.op_name: (round(o.seconds * 1e3, 6), o.count)
    for o in cost.operations.values()
  }
  assert found == {'jit(f)/mul': (3, 2), 'copy': (4, 1)}
