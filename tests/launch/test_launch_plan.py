"""launch/plan.py with the TPU compiler, each plan in its own process.

No TPU is needed. libtpu reads its settings when JAX is imported.
"""

import functools
import importlib.util
import json
import re
import subprocess
import sys

import forked
import pytest
import tpu_compiler
from tpu_compiler import ENVIRONMENT, ROOT, needs_libtpu

from maskdiff.distributed import chips
from maskdiff.planner import calibration, hlo, hlo_cost
from maskdiff.planner.environment import COMPILER_ENVIRONMENT
from maskdiff.planner.fields import FIELDS
from maskdiff.planner.hlo_collectives import Machine

# 2,360,576 parameters. A model of twice the width on rows of twice the length
# takes three times as long to compile.
SMALL = (
  '--config.model.embed=256 --config.model.layers=2 --config.model.heads=2 '
  '--config.model.kv_heads=2 --config.model.head_dim=128 '
  '--config.model.mlp=512 --config.model.dtype=bfloat16 '
  '--config.data.length=256 --config.train.batch=16 --config.eval.batch=16 '
  '--config.objective.loss_chunk_tokens=128'
).split()
PARAMETERS = 4096 * 256 + 2 * (4 * 256 * 256 + 3 * 256 * 512 + 512) + 256


# Compiling an evaluation takes as long as compiling the train step.
WITHOUT_EVALUATION = """
import runpy
from maskdiff.planner import plan
plan._evaluation = lambda *args: {}
runpy.run_path('launch/plan.py', run_name='__main__')
"""


def launch(*args, evaluation=True):
  """Runs launch/plan.py, by default with the plan of an evaluation."""
  script = ['launch/plan.py'] if evaluation else ['-c', WITHOUT_EVALUATION]
  return forked.run(
    [*script, '--config', 'configs/tiny.py', *args],
    env=ENVIRONMENT | COMPILER_ENVIRONMENT,
    cwd=ROOT,
  )


def launch_as_a_user(*args):
  """Runs launch/plan.py in a process that imports JAX itself."""
  return subprocess.run(
    [sys.executable, 'launch/plan.py', '--config', 'configs/tiny.py', *args],
    env=ENVIRONMENT,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def refused(*args, path=str(ROOT)):
  """Returns the error line of a call that fails before compiling."""
  result = forked.run(
    ['launch/plan.py', '--config', 'configs/tiny.py', *args],
    env=ENVIRONMENT | COMPILER_ENVIRONMENT | {'PYTHONPATH': path},
    cwd=ROOT,
  )
  assert result.returncode == 2, result.stderr
  assert len(result.stderr.strip().splitlines()) == 1, result.stderr
  return result.stderr


def planned(tmp_path, *args, run=launch):
  """Returns the numbers of a plan that fits, and the printed table."""
  file = tmp_path / 'plan.json'
  result = run('--json', str(file), *args)
  assert result.returncode == 0, result.stderr[-4000:]
  return json.loads(file.read_text()), result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
  'args, message',
  [
    (['--topology', 'v5x:2x2'], 'give a chip of v4, v5e, v5p, v6e'),
    (['--topology', 'v5p:2x2'], 'a shape of v5p has 3 axes'),
    (
      ['--topology', 'v5e:2x2', '--sweep', '--plot', 'x.png'],
      '--sweep cannot be combined',
    ),
    (
      ['--topology', 'v5e:2x2', '--sweep', '--sweep_rows', '1,two'],
      "'two' is not a positive number",
    ),
    (
      ['--topology', 'v5e:2x2', '--sweep', '--sweep_mesh', 'tensor'],
      'write axis=size',
    ),
  ],
)
def test_a_bad_argument_is_one_error_line(args, message):
  assert message in refused(*args)


@needs_libtpu
def test_a_mesh_that_does_not_fit_the_topology_is_refused():
  error = refused('--topology', 'v5e:2x4', '--config.mesh.tensor=3')
  assert 'is not the number of devices, 8' in error


@pytest.mark.slow
@pytest.mark.parametrize('flag', ['json', 'plot'])
def test_an_unwritable_file_is_refused_before_compiling(tmp_path, flag):
  if flag == 'plot':
    pytest.importorskip('matplotlib')
  path = tmp_path / 'no' / 'plan.png'
  # The topology is wrong too, which would be reported later.
  error = refused('--topology', 'v5x:2x2', f'--{flag}={path}')
  assert f"--{flag}: cannot write '{path}'" in error


def test_a_failed_plan_leaves_files_unchanged(tmp_path):
  (tmp_path / 'old.json').write_text('{}')
  for name in ('old.json', 'new.json'):
    error = refused('--topology', 'v5x:2x2', f'--json={tmp_path / name}')
    assert 'give a chip of' in error
  assert [f.name for f in tmp_path.iterdir()] == ['old.json']
  assert (tmp_path / 'old.json').read_text() == '{}'


def test_missing_matplotlib_is_reported_before_compiling(tmp_path):
  (tmp_path / 'matplotlib.py').write_text('raise ImportError')
  error = refused(
    *('--topology', 'v5x:2x2', f'--plot={tmp_path}/plan.png'),
    path=f'{tmp_path}:{ROOT}',
  )
  assert 'pip install matplotlib' in error


COMPILE = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from maskdiff import config
from maskdiff.planner.target import open_target

def on(topology, function, *shapes, dtype=jnp.bfloat16):
  target = open_target(config.default(), topology)
  whole = NamedSharding(target.mesh, PartitionSpec())
  shapes = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
  compiled = jax.jit(function, in_shardings=whole).lower(*shapes).compile()
  return compiled.as_text()

def layers(x, weights):
  step = lambda x, w: (jnp.tanh(x @ w), None)
  return jax.lax.scan(step, x, weights)[0]

def of_integers(a, b):
  product = jnp.matmul(a, b, preferred_element_type=jnp.int32)
  return (product.astype(jnp.float32) * 1e-4).astype(jnp.bfloat16)

shape = (4096, 4096)
topologies = 'v4:2x2x1', 'v5e:1x1', 'v5p:2x2x1', 'v6e:1x1', 'v6e:2x4'
print(json.dumps({
  'products': {t: on(t, lambda a, b: a @ b, shape, shape) for t in topologies},
  'integers': on('v5p:2x2x1', of_integers, shape, shape, dtype=jnp.int8),
  'loop': on('v5e:2x4', layers, shape, (12, *shape)),
}))
"""


@pytest.fixture(scope='module')
def texts():
  """HLO of a matrix product for several chips, and of a loop of twelve."""
  return tpu_compiler.run(COMPILE)


def price(text, topology):
  chip, shape = chips.parse_topology(topology)
  machine = Machine(chip, shape, {'fsdp': 1}, ((0,) * len(shape),), (0,))
  return hlo_cost.price(hlo.parse(text), machine)


@pytest.mark.slow
@needs_libtpu
def test_a_large_matrix_product_is_priced_near_the_peak(texts):
  for topology, text in texts['products'].items():
    chip, _ = chips.parse_topology(topology)
    share = 2 * 4096**3 / price(text, topology).total_s / chip.peak_flops
    print(f'{topology}: {share:.1%} of the peak')
    assert 0.7 < share < 1, topology


@pytest.mark.slow
@needs_libtpu
def test_a_product_of_integers_is_priced_above_the_peak_of_bfloat16(texts):
  seconds = price(texts['integers'], 'v5p:2x2x1').total_s
  share = 2 * 4096**3 / seconds / chips.by_kind('TPU v5p').peak_flops
  assert 1.4 < share < 2


@pytest.mark.slow
@needs_libtpu
def test_cycles_of_a_loop_match_a_simple_count(texts):
  """The count adds all estimates, those of the loop body twelve times."""
  cost = price(texts['loop'], 'v5e:2x4')
  assert [trips for _, trips, _ in cost.loops] in ([12], [11])  # or one peeled
  assert not cost.unresolved
  loops = re.findall(r' while\(.*body=%([\w.\-]+)', texts['loop'])
  total = 0
  for computation in re.split(r'\n\n', texts['loop']):
    cycles = sum(
      int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', computation)
    )
    name = re.match(r'(?:ENTRY )?%([\w.\-]+)', computation.strip())
    inside = name and name[1] in loops
    total += cycles * (cost.loops[0][1] if inside else 1)
  assert cost.cycles == pytest.approx(total, rel=0.02)
  flops = 12 * 2 * 4096**3
  peak = chips.by_kind('TPU v5e').peak_flops
  assert 0.6 < flops / cost.total_s / peak < 1


@pytest.mark.slow
@needs_libtpu
def test_a_plan_of_sampling(tmp_path):
  arguments = ('--topology', 'v5e:2x4', '--mode', 'sample', *SMALL)
  found, text = planned(tmp_path, *arguments, run=launch_as_a_user)
  assert found.keys() == FIELDS.keys()
  assert (found['mode'], found['status']) == ('sample', 'fits')
  assert found['length'] == 128 + 64
  # Float32 weights, an eighth on each chip.
  weights = 4 * PARAMETERS / 8 / 2**30
  assert weights < found['hbm_arguments_gib'] < 1.1 * weights
  assert found['latency_s'] == pytest.approx(64 * found['step_s'])
  assert found['tokens_per_s'] == pytest.approx(8 * 64 / found['latency_s'])
  assert found['window_step_s'] is None
  assert not any('loop' in w for w in found['warnings'])
  assert 'denoising step' in text


@needs_libtpu
@pytest.mark.slow
def test_a_plan_of_serving_with_a_cache(tmp_path):
  """Tensor parallel, weights in bfloat16, blocks of 16 slots."""
  found, text = planned(
    tmp_path,
    *('--topology', 'v5e:2x4', '--mode', 'sample'),
    *('--tensor', '2', '--dtype', 'bfloat16'),
    '--config.sample.cache=dual',
    '--config.sample.block_length=16',
    *SMALL,
  )
  assert found['mesh'] == 'replica=1,fsdp=4,sequence=1,tensor=2'
  weights = 2 * PARAMETERS / 8 / 2**30
  # Less than 64 bytes per position for the state of the loop, with padding.
  state = 64 * 8 * (128 + 64) / 2**30
  assert weights < found['hbm_arguments_gib'] < weights + state
  assert found['window_step_s'] < found['step_s']
  assert found['latency_s'] == pytest.approx(
    4 * found['step_s'] + 60 * found['window_step_s']
  )
  assert 'step with a cache' in text


@needs_libtpu
@pytest.mark.slow
def test_a_plan_of_training(tmp_path):
  image = tmp_path / 'plan.png'
  plots = importlib.util.find_spec('matplotlib') is not None
  found, text = planned(
    tmp_path,
    '--topology',
    'v5e:2x2',
    '--config.optimizer.name=adamw',
    '--config.model.remat=full',
    *(['--plot', str(image)] if plots else []),
    *SMALL,
  )
  assert found.keys() == FIELDS.keys()
  assert (found['status'], found['fits']) == ('fits', True)
  assert found['parameters'] == PARAMETERS
  # Parameters and two moments in float32, a quarter on each chip.
  state = 3 * 4 * PARAMETERS / 4 / 2**30
  assert state < found['hbm_arguments_gib'] < 1.1 * state
  # An evaluation has 16 rows as the step, but stores no activations.
  total = found['hbm_total_gib']
  assert found['hbm_arguments_gib'] < found['hbm_evaluation_gib'] < total
  # Half of the 4 x 256 tokens of a chip plus 39, in chunks of 128.
  assert found['loss_chunks'] == 5
  assert not any('loop' in w for w in found['warnings'])
  # The step time is the sum of its parts, and slower than at the peak.
  parts = [
    'cycles_s',
    'attention_s',
    'rows_s',
    'exposed_ici_s',
    'exposed_dcn_s',
    'exposed_host_s',
    'exposed_prefetch_s',
  ]
  assert found['step_s'] == pytest.approx(sum(found[p] for p in parts))
  assert 0.02 < found['mfu'] < 1
  step_tokens = 16 * 256
  assert found['tokens_per_s'] == pytest.approx(step_tokens / found['step_s'])
  assert found['total_tokens'] == 1100 * step_tokens
  assert found['chip_hours'] == pytest.approx(24 * 4 * found['days'])
  assert {c['axes'] for c in found['collectives']} == {'fsdp'}
  names = {o['part'] for o in found['operations']}
  assert {
    'mlp gate/up forward',
    'mlp gate/up recomputed',
    'mlp down backward',
    'attention query forward',
    'attention kernel forward',
    'attention kernel backward',
    'normalisation forward',
    'loss: logits',
    'optimizer',
  } <= names
  assert text.count('FITS') == 2  # the step and an evaluation
  assert image.exists() == plots


@needs_libtpu
@pytest.mark.slow
def test_a_plan_of_policy_optimization(tmp_path):
  """A config that sets keys of config.policy needs no --mode."""
  found, text = planned(
    tmp_path,
    *('--topology', 'v5e:1x1'),
    *('--config.policy.prompts=4', '--config.policy.group=4'),
    *('--config.policy.inner_steps=2', '--config.sample.steps=32'),
    *('--config.sample.gen_length=32', '--config.sample.block_length=32'),
    *SMALL,
    '--config.model.layers=1',
    '--config.optimizer.name=adamw',
    '--config.data.length=128',
  )
  assert found.keys() == FIELDS.keys()
  assert (found['mode'], found['status']) == ('rl', 'fits')
  copy, sampling, fixed, training = found['programs']
  assert all(p['hbm_buffers_gib'] >= 0 < p['run_s'] for p in found['programs'])
  parameters = 4 * found['parameters'] / 2**30  # float32
  assert found['hbm_parameters_gib'] == pytest.approx(parameters, rel=0.01)
  assert found['hbm_optimizer_gib'] == pytest.approx(2 * parameters, rel=0.01)
  assert found['hbm_reference_gib'] == found['hbm_parameters_gib']
  assert found['hbm_copy_gib'] == pytest.approx(parameters / 2, rel=0.01)
  held = sum(found[f'hbm_{x}_gib'] for x in ('optimizer', 'reference'))
  assert training['hbm_total_gib'] >= held + found['hbm_parameters_gib']
  # A parameter is gathered into a buffer of its own.
  assert copy['hbm_buffers_gib'] <= found['hbm_copy_gib']
  assert sampling['run_s'] == pytest.approx(32 * sampling['step_s'])
  # 4 copies of two networks for 2 steps; a step of 4 copies, with gradients.
  assert 1 < fixed['run_s'] / training['run_s'] < 4
  times = found['sampling_s'], found['fixed_s'], found['training_s']
  assert found['round_s'] == pytest.approx(sum(times))
  assert times[2] == pytest.approx(2 * found['step_s'])
  assert not any('loop' in w for w in found['warnings'])
  assert 'fixed log-probabilities' in text


@needs_libtpu
@pytest.mark.slow
def test_a_plan_of_two_slices_and_integers(tmp_path):
  found, text = planned(
    tmp_path,
    '--topology',
    'v5p:2x2x1',
    '--num_slices',
    '2',
    '--config.mesh.replica=2',
    '--config.model.quantization=int8',
    *SMALL,
    run=functools.partial(launch, evaluation=False),
  )
  # Matrices of the layers are gathered in both directions.
  matrices = 2 * (4 * 256 * 256 + 3 * 256 * 512)
  integers = [c for c in found['collectives'] if c['dtype'] == 's8']
  assert {c['kind'] for c in integers} == {'all-gather'}
  gathered = sum(c['gb'] for c in integers) * 1e9
  assert 0.7 < gathered / (2 * matrices * 3 / 4) < 1.5
  assert calibration.INT8_WARNING in found['warnings']
  assert 'of the peak in bfloat16' in text
  assert (found['chips'], found['num_slices']) == (8, 2)
  between = [c for c in found['collectives'] if c['network'] == 'dcn']
  assert between and all(c['axes'] == 'replica' for c in between)
  # Gradients of a quarter of the parameters, at least in bfloat16.
  assert sum(c['gb'] for c in between) > 2 * PARAMETERS / 4 / 1e9
  assert all(
    c['axes'] == 'fsdp' for c in found['collectives'] if c['network'] == 'ici'
  )


@needs_libtpu
@pytest.mark.slow
def test_a_sweep_ranks_what_fits(tmp_path):
  file = tmp_path / 'sweep.json'
  result = launch(
    '--topology',
    'v6e:1x1',
    '--sweep',
    '--sweep_rows',
    '8,16384',
    '--sweep_remat',
    'none',
    '--sweep_mesh',
    'fsdp=-1',
    '--sweep_mesh',
    'tensor=2',
    '--json',
    str(file),
    *SMALL,
    evaluation=False,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  fits, *rest = json.loads(file.read_text())
  assert (fits['status'], fits['rows_per_chip']) == ('fits', 8)
  assert {p['status'] for p in rest} == {'does not fit', 'does not compile'}
  over = next(p for p in rest if p['status'] == 'does not fit')
  assert over['hbm_total_gib'] > over['hbm_capacity_gib']
  assert len(result.stdout.splitlines()) == 4  # a header and three candidates


@needs_libtpu
@pytest.mark.slow
def test_a_step_that_does_not_fit():
  result = launch(
    '--topology',
    'v5e:1x1',
    *SMALL,
    '--config.model.remat=none',
    '--config.train.batch=8192',
    '--config.eval.batch=32',
  )
  assert result.returncode == 1, result.stderr[-4000:]
  assert 'DOES NOT FIT' in result.stdout
  assert '--config.train.microbatches=2' in result.stdout
