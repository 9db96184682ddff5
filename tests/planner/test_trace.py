"""Times of instructions in traces of TPUs, GPUs and CPUs."""

import made_traces
import pytest

from maskdiff.errors import UserError
from maskdiff.planner import measured, trace

NS = 1e-9


def steps_of_a_tpu(*starts, device=0, work=30):
  """Returns a plane with steps of 100 ns: a loop, and a product after it."""
  programs, instructions = [], []
  for start in starts:
    programs.append(('jit_train_step(123)', start, 100))
    instructions += [
      ('%while.2 = (s32[], f32[8]) while(%tuple), body=%b', start, 60),
      ('%fusion.1 = f32[8]{0:T(8)} fusion(%x), calls=%c', start + 5, 20),
      ('%fusion.1 = f32[8]{0:T(8)} fusion(%x), calls=%c', start + 30, 20),
      ('dot.3', start + 60, work),
    ]
  return made_traces.tpu(programs, instructions, device)


def measure(planes, steps, **options):
  return measured.measure(
    made_traces.profile(planes), 'jit_train_step', steps, **options
  )


def test_self_time_is_without_nested_events():
  events = [
    trace.Event(name, '', None, start, end)
    for name, start, end in (
      ('outer', 0, 100),
      ('inner', 10, 60),
      ('leaf', 20, 50),
      ('second', 60, 100),
      ('after', 100, 110),
    )
  ]
  found = {e.name: s for e, s in trace.self_times(events)}
  assert found == pytest.approx(
    {
      'outer': 10 * NS,
      'inner': 20 * NS,
      'leaf': 30 * NS,
      'second': 40 * NS,
      'after': 10 * NS,
    }
  )


def test_steps_of_a_tpu_are_runs_of_its_program():
  planes = steps_of_a_tpu(1000, 1150)
  events = planes['/device:TPU:0']
  events['XLA Modules'].append(('jit_eval_step(7)', 2000, 500, {}))
  events['XLA Ops'].append(('fusion.1', 2100, 300, {}))
  m = measure(planes, 2, enclosing=['while.2'])
  assert (m.devices, m.steps, m.warnings) == (1, 2, [])
  assert m.step_s == pytest.approx(100 * NS)
  assert m.period_s == pytest.approx(150 * NS)
  assert m.instructions == pytest.approx(
    {'fusion.1': 40 * NS, 'dot.3': 30 * NS}
  )
  assert m.counts == {'while.2': 1, 'fusion.1': 2, 'dot.3': 1}
  assert m.busy_s == pytest.approx(70 * NS)
  assert m.programs == pytest.approx({'jit_eval_step': 250 * NS})


def test_time_of_a_loop_without_its_body_counts_unless_it_is_left_out():
  m = measure(steps_of_a_tpu(0), 1)
  assert m.instructions['while.2'] == pytest.approx(20 * NS)
  assert m.busy_s == pytest.approx(90 * NS)


def test_times_are_means_over_devices():
  planes = steps_of_a_tpu(0, 200) | steps_of_a_tpu(0, 200, device=1, work=10)
  m = measure(planes, 2)
  assert (m.devices, m.steps) == (2, 2)
  assert m.instructions['dot.3'] == pytest.approx(20 * NS)
  assert m.counts['dot.3'] == 1


def test_sparse_cores_are_not_devices():
  planes = steps_of_a_tpu(0)
  planes['/device:TPU:0 SparseCore 0'] = planes['/device:TPU:0']
  assert measure(planes, 1).devices == 1


def test_a_missing_step_is_reported():
  (warning,) = measure(steps_of_a_tpu(0), 2).warnings
  assert warning == 'the trace of /device:TPU:0 has 1 of 2 steps'


def gpu_step(start, chunks):
  """Returns the kernels of a step: two streams, a loop of some chunks."""
  work = [
    ('copy.1', start, 5),
    ('gemm.2', start + 10, 20),
    ('gemm.2', start + 30, 2),
  ]
  work += [('loss.3', start + 40 + 10 * i, 10) for i in range(chunks)]
  return work, [('all-reduce-start.4', start + 20, 15)]


def test_steps_of_a_gpu_repeat_their_first_instruction():
  first, second = gpu_step(100, chunks=1), gpu_step(300, chunks=3)
  planes = made_traces.gpu([a + b for a, b in zip(first, second, strict=True)])
  other = made_traces.gpu([[('fusion.9', 210, 50)]], module='jit_sample')
  streams = planes['/device:GPU:0']
  streams['Stream #0(Compute)'] += other['/device:GPU:0']['Stream #0(Compute)']
  streams['Stream #7(MemcpyH2D)'] = [('MemcpyH2D', 280, 10, {})]
  streams['XLA Ops'] = [('gemm.2', 0, 1000, {'hlo_op': 'gemm.2'})]
  m = measure(planes, 2)
  assert (m.devices, m.steps, m.warnings) == (1, 2, [])
  assert m.step_s == pytest.approx((50 + 70) / 2 * NS)
  assert m.period_s == pytest.approx(200 * NS)
  assert m.counts['loss.3'] == 2
  assert m.instructions == pytest.approx(
    {
      'copy.1': 5 * NS,
      'gemm.2': 22 * NS,
      'loss.3': 20 * NS,
      'all-reduce-start.4': 15 * NS,
    }
  )
  # The collective overlaps with the products from 120 to 132 ns.
  assert m.busy_s == pytest.approx((5 + 25 + 20) * NS)
  assert m.programs == pytest.approx(
    {'jit_sample': 25 * NS, 'copies and other work': 5 * NS}
  )


def test_steps_of_a_cpu_are_its_run_ids():
  def events(run, start, device):
    stats = {'hlo_module': 'jit_train_step', 'run_id': run}
    stats |= {'device_ordinal': device}
    return [
      ('copy.1', start, 10, stats | {'hlo_op': 'copy.1'}),
      ('end: copy.1', start + 10, 1, {}),
      ('dot.2', start + 15, 20, stats | {'hlo_op': 'dot.2'}),
    ]

  threads = {
    'tf_XLAPjRtCpuClient/1': events(7, 0, 0) + events(9, 100, 1),
    'tf_XLAPjRtCpuClient/2': events(8, 0, 1) + events(10, 110, 0),
    'python': [('PjitFunction(jit(train_step))', 0, 500, {})],
  }
  m = measure({'/host:CPU': threads}, 2)
  assert (m.devices, m.steps, m.warnings) == (2, 2, [])
  assert m.step_s == pytest.approx(35 * NS)
  assert m.period_s == pytest.approx(105 * NS)
  assert m.instructions == pytest.approx({'copy.1': 10 * NS, 'dot.2': 20 * NS})


def test_a_trace_without_the_program_is_an_error():
  with pytest.raises(UserError, match='no instructions of jit_train_step'):
    measure({'/host:CPU': {'python': []}}, 1)
