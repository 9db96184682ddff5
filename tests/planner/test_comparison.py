"""Tables of estimated against measured times, on traces of each device."""

import gzip
import json
import pathlib

import made_traces
import pytest
import tpu_compiler
from jax.profiler import ProfileData

from maskdiff.distributed import chips
from maskdiff.model import masks
from maskdiff.planner import (
  comparison,
  hlo,
  hlo_cost,
  measured,
  tables_profile,
)

TRACES = pathlib.Path(__file__).parents[1] / 'traces'
CHIP = chips.by_kind('TPU v5p')
MLP = 'jit(train_step)/jvp(network(mlp down))/while/body/dot_general'
LOSS = 'jit(train_step)/jvp(part(loss))/while'


def work(name, us, op_name):
  """Returns an instruction that the compiler estimates at `us` microseconds."""
  cycles = round(us * CHIP.clock_hz / 1e6)
  return (
    f'  %{name} = f32[8] copy(%x), metadata={{op_name="{op_name}"}}, '
    f'backend_config={{"estimated_cycles":"{cycles}"}}\n'
  )


# A product, a collective, and a loop whose trip count the text does not have.
TPU_TEXT = (
  'HloModule jit_train_step, is_scheduled=true, num_partitions=2\n\n'
  '%body (x: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n'
  + work('chunk.1', 10, LOSS + '/body/part(loss: logits)/dot_general')
  + '  ROOT %r = f32[8] copy(%x)\n}\n\n'
  '%test (x: f32[8]) -> pred[] {\n  %x.1 = f32[8] parameter(0)\n'
  '  ROOT %c = pred[] convert(%x.1)\n}\n\n'
  'ENTRY %main (x: f32[8]) -> f32[8] {\n  %x.2 = f32[8] parameter(0)\n'
  + work('fusion.7', 100, MLP)
  + '  %gather.1 = bf16[8]{0:T(1024)} all-gather(%x), '
  'replica_groups={{0,1}}\n'
  '  %while.1 = f32[8] while(%x), condition=%test, body=%body, '
  f'metadata={{op_name="{LOSS}"}}\n}}\n'
)


def facts(**changes):
  return comparison.Facts(
    **{
      'device_kind': 'TPU v5p',
      'axes': {'fsdp': 2},
      'coords': [[4, 0, 0], [5, 0, 0]],
      'slices': [0, 0],
      'steps': 2,
      'first_step': 4,
    }
    | changes
  )


def tpu_trace():
  """Returns two steps of 300 us of TPU_TEXT, with 4 chunks of the loss."""
  programs, found = [], []
  for start in (0, 400_000):
    programs.append(('jit_train_step(7)', start, 300_000))
    found.append(('%fusion.7 = f32[8] fusion(%x)', start, 150_000))
    found.append(
      ('%gather.1 = bf16[8] all-gather(%x)', start + 150_000, 50_000)
    )
    found.append(('%while.1 = f32[8] while(%x)', start + 200_000, 90_000))
    for i in range(4):
      chunk = start + 201_000 + 20_000 * i
      found.append(('%chunk.1 = f32[8] fusion(%x)', chunk, 20_000))
  return made_traces.profile(made_traces.tpu(programs, found))


def rows(result):
  """Returns {part: (estimated, measured)} in microseconds."""
  us = lambda s: None if s is None else s * 1e6
  return {
    r['part']: (us(r['estimated_s']), us(r['measured_s']))
    for r in result['rows']
  }


def test_table_of_a_tpu_has_the_price_of_the_plan():
  result = comparison.compare(TPU_TEXT, tpu_trace(), facts())
  collective = 5 + 8 / CHIP.link_bandwidth * 1e6  # start and one hop
  expected = {
    'mlp down forward': (100, 150),
    # The trip count is the measured one.
    'loss: logits': (40, 80),
    comparison.COLLECTIVES: (collective, 50),
    comparison.IDLE: (0, 20),
  }
  found = rows(result)
  assert found.keys() == expected.keys()
  for part, times in expected.items():
    assert found[part] == pytest.approx(times, rel=1e-3), part
  assert result['step_s'] == pytest.approx(300e-6)
  assert result['estimated_s'] == pytest.approx((140 + collective) * 1e-6)
  assert sum(m for _, m in found.values()) == pytest.approx(300)
  assert result['period_s'] == pytest.approx(400e-6)
  assert not result['warnings']


def test_text_names_the_row_with_the_largest_error():
  result = comparison.compare(
    TPU_TEXT, tpu_trace(), facts(flops=2 * 459e12 * 150e-6, share_done=0.9)
  )
  text = tables_profile.format_table(result)
  assert text.startswith('steps 4 to 5, mean of 1 x TPU v5p\n\n')
  lines = [line.split() for line in text.splitlines()]
  assert ['mlp', 'down', 'forward', '0.100', '0.150', '50.0%', '1.50'] in lines
  assert 'largest error: mlp down forward takes 0.050 ms more' in text
  # 150 us of work at the peak in a step of 300 us.
  assert 'MFU 50.0%, estimated 103.' in text
  assert '; 45.0% without the logits that the loss skips' in text


@pytest.mark.parametrize('regime', [masks.BIDIRECTIONAL, masks.CAUSAL])
def test_facts_survive_json(regime):
  known = facts(regime=regime, flops=1.0, warnings=('a line',))
  values = json.loads(json.dumps(known.to_json()))
  again = comparison.from_json(values)
  assert again.regime == regime
  assert again.to_json() == values


def test_coordinates_of_a_machine_begin_at_its_first_chip():
  machine = comparison.machine(CHIP, facts())
  assert machine.coords == ((0, 0, 0), (1, 0, 0))
  assert machine.shape == (2, 1, 1)
  flat = chips.by_kind('TPU v5e')
  assert comparison.machine(flat, facts()).shape == (2, 1)


GPU_TEXT = (
  'HloModule jit_train_step, is_scheduled=true\n\n'
  'ENTRY %main (a: bf16[4096,4096]) -> bf16[4096,4096] {\n'
  '  %a = bf16[4096,4096]{1,0} parameter(0)\n'
  '  %gemm.1 = (bf16[4096,4096]{1,0}, s8[4096]{0}) custom-call(%a, %a), '
  'custom_call_target="__cublas$lt$matmul", '
  f'metadata={{op_name="{MLP}"}}, '
  'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
  '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}\n'
  '  %all-reduce-start.2 = bf16[4096,4096]{1,0} all-reduce-start(%a), '
  'to_apply=%add\n'
  '  ROOT %all-reduce-done.2 = bf16[4096,4096]{1,0} '
  'all-reduce-done(%all-reduce-start.2)\n}\n'
)


def test_small_parts_and_programs_are_one_cell():
  result = comparison.compare(TPU_TEXT, tpu_trace(), facts())
  result['rows'] += [
    {'part': name, 'estimated_s': 1e-7, 'measured_s': 2e-7} for name in 'ab'
  ]
  result['programs'] = {'jit_a': 1e-7, 'jit_run': 1e-3, 'jit_b': 2e-7}
  text = tables_profile.format_table(result)
  small = '2 parts below 0.2% of the step'
  (line,) = (x for x in text.splitlines() if x.startswith(small))
  assert line[len(small) :].split() == ['0.000', '0.000', '0.1%', '2.00']
  assert (
    'other programs, per step: jit_run 1.000 ms, 2 small ones 0.000 ms' in text
  )


def gpu_result(**changes):
  steps = [
    [('gemm.1', start, 200_000) for start in (0, 400_000)],
    # The profiler leaves out -start.
    [('all-reduce.2', start + 100_000, 200_000) for start in (0, 400_000)],
  ]
  profile = made_traces.profile(made_traces.gpu(steps))
  gpu = {'device_kind': 'NVIDIA H200', 'coords': []} | changes
  return comparison.compare(GPU_TEXT, profile, facts(**gpu))


def test_table_of_a_gpu_has_a_roofline_and_the_overlap_of_streams():
  result = gpu_result()
  product = 2 * 4096**3 / 989e12 * 1e6
  assert rows(result) == {
    'mlp down forward': pytest.approx((product, 200)),
    comparison.COLLECTIVES: (0, pytest.approx(200)),
    comparison.OVERLAP: (0, pytest.approx(-100)),
    comparison.IDLE: (0, pytest.approx(0, abs=1e-6)),
  }
  assert result['step_s'] == pytest.approx(300e-6)
  (warning,) = result['warnings']
  assert 'a lower bound' in warning


def test_an_unknown_device_is_measured_only():
  result = gpu_result(device_kind='NVIDIA GeForce')
  assert result['estimated_s'] is None
  text = tables_profile.format_table(result)
  assert "warning: no estimate: the peak of 'NVIDIA GeForce' is not in" in text
  assert 'estimated, ms' not in text and 'largest error' not in text


def test_recorded_trace_of_two_cpu_devices():
  """Two steps of a scan over two layers, with a sum of gradients.

  Of the trace of jaxlib 0.10.2, the events with the stat hlo_op were kept.
  """
  text, events = (
    gzip.decompress((TRACES / f'cpu.{name}.gz').read_bytes()).decode()
    for name in ('hlo', 'textproto')
  )
  profile = ProfileData.from_serialized_xspace(
    ProfileData.text_proto_to_serialized_xspace(events)
  )
  cpu = facts(device_kind='cpu', coords=[])
  result = comparison.compare(text, profile, cpu)
  found = rows(result)
  assert {'mlp down forward', 'mlp down backward', 'optimizer', 'loss'} <= (
    found.keys()
  )
  assert comparison.COLLECTIVES in found
  assert sum(m for _, m in found.values()) == pytest.approx(
    result['step_s'] * 1e6
  )
  assert (result['devices'], result['warnings']) == (2, [])
  assert list(result['programs']) == ['jit__lambda']
  module = hlo.parse(text)
  counts = measured.measure(profile, module.name, 2).counts
  loops = comparison.trips(module, counts)
  assert set(loops.values()) == {2.0} and len(loops) == 2


COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from maskdiff.planner.target import topology_devices
(device,) = topology_devices('v5e:1x1')
sharding = jax.sharding.SingleDeviceSharding(device)
def train_step(w, x):
  with jax.named_scope('network(mlp down)'):
    y = x @ w
  with jax.named_scope('part(loss)'):
    return jnp.tanh(y.astype(jnp.float32)).sum(axis=0)
shapes = [
  jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding)
  for s in ((1024, 512), (2048, 1024))
]
print(json.dumps(jax.jit(train_step).lower(*shapes).compile().as_text()))
"""


@pytest.mark.slow
@tpu_compiler.needs_libtpu
def test_trace_of_a_program_of_the_tpu_compiler():
  """Every instruction takes twice its estimate."""
  text, now, events = tpu_compiler.run(COMPILE), 0.0, []
  module = hlo.parse(text)
  one = facts(
    device_kind='TPU v5e', axes={}, coords=[[0, 0, 0]], slices=[0], steps=1
  )
  machine = comparison.machine(chips.by_kind('TPU v5e'), one)
  estimated = hlo_cost.price(module, machine).instructions
  for name in module.computations[module.entry]:
    if estimated[name]:
      ns = 2 * estimated[name] * 1e9
      events.append((f'%{name} = bf16[2048,512]{{1,0:T(8,128)}}', now, ns))
      now += ns
  profile = made_traces.profile(
    made_traces.tpu([(f'{module.name}(1)', 0, now)], events)
  )
  result = comparison.compare(text, profile, one)
  found = rows(result)
  idle = found.pop(comparison.IDLE)
  assert idle == pytest.approx((0, 0), abs=1e-3)
  # The compiler copies the weights into on-chip memory.
  assert found.keys() <= {'mlp down forward', 'loss', comparison.PREFETCHES}
  assert 'mlp down forward' in found
  for estimate, time in found.values():
    assert time == pytest.approx(2 * estimate, rel=0.01)
  assert result['step_s'] == pytest.approx(2 * result['estimated_s'], rel=0.01)
