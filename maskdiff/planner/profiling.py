"""Traces some steps of a training and compares their time with an estimate.

`profiled` wraps a stage: after WARM_UP steps, its train step starts the
profiler, and stops it when the wanted number of steps has ended on the device.
The training then continues. The folder `profile` of the work directory holds

- plugins/profile/process_0/HOST.xplane.pb: the trace of a process and of its
  own devices, for XProf and TensorBoard;
- hlo.txt.gz: the HLO text of the train step, and parts.json: all numbers and
  the facts of the run, from which `remake` makes the table again;
- table.txt: the table that process 0 prints (tables_profile.py).
"""

import dataclasses
import gzip
import json
import pathlib
import shutil

import jax

from maskdiff.distributed.runtime import has_gpu
from maskdiff.errors import UserError
from maskdiff.files import atomic, json_text
from maskdiff.monitoring import terminal
from maskdiff.objectives.table import flops_per_token
from maskdiff.planner import comparison, copies_rl, plan, tables_profile
from maskdiff.rl import preferences, stage_config
from maskdiff.training import phases
from maskdiff.training import step as step_lib

WARM_UP = 3  # steps before the trace
FOLDER = 'profile'
# Stages of the rl room. All others train on the objective of the config.
POLICIES = ('policy optimization', preferences.NAME)


def profiled(make_stage, workdir, steps):
  """Returns a make_stage whose train step is traced; see `loop.run`.

  Args:
    make_stage: (config, RunSetup) -> Stage.
    workdir: work directory of the run.
    steps: number of steps to trace.
  """

  def make(config, setup):
    stage = make_stage(config, setup)
    compiled = False

    def compile(state, batch, key):
      nonlocal compiled
      _require_steps(config, steps, int(state.step))
      compiled = True
      train_step, line = stage.compile(state, batch, key)
      facts = facts_of(config, setup.mesh, stage, steps, int(state.step))
      return _traced(train_step, workdir, facts, setup.ledger), line

    def evaluate(step, params, average):
      # Nothing is compiled if a run resumes at its last step.
      if not compiled:
        _require_steps(config, steps, step)
      return stage.evaluate(step, params, average)

    return dataclasses.replace(stage, compile=compile, evaluate=evaluate)

  return make


def _require_steps(config, steps, done):
  left = config.train.steps - done
  if left < steps + WARM_UP:
    raise UserError(
      f'--profile={steps} needs {steps + WARM_UP} steps, of which the first '
      f'{WARM_UP} are not traced, and the run has {left} left: raise '
      f'--config.train.steps={config.train.steps}'
    )


def facts_of(config, mesh, stage, steps, done):
  """Returns the comparison.Facts of steps that are going to be traced.

  Args:
    config: ConfigDict.
    mesh: device mesh.
    stage: Stage.
    steps: number of steps to trace.
    done: number of steps before the warm-up.
  """
  flat = list(mesh.devices.flat)
  first, plans = done + WARM_UP, phases.phases(config)
  facts = comparison.Facts(
    device_kind=flat[0].device_kind,
    axes=dict(mesh.shape),
    coords=[list(d.coords) for d in flat if hasattr(d, 'coords')],
    slices=[getattr(d, 'slice_index', 0) for d in flat],
    steps=steps,
    first_step=first + 1,
  )
  if stage.name in POLICIES:
    # A plan has no utilization of such a train step either.
    network = stage_config.policy_config(config).network
    regime = copies_rl.regime(network, config.data.length)
    return dataclasses.replace(facts, regime=regime)
  phase = phases.at(plans, first)
  c = phases.with_phase(step_lib.step_config(config), phase)
  share_done, warnings = None, ()
  if len(plans) == 1:
    chunks = plan.loss_chunks(config, mesh.shape)
    share_done = plan.share_done(config, mesh.shape, chunks)
  if phases.at(plans, first + steps - 1) != phase:
    warnings = (
      'the train step changes in the trace, and the table is that of the first '
      'one: a phase of config.objective begins',
    )
  tokens = config.train.batch * c.length
  return dataclasses.replace(
    facts,
    regime=plan.training_regime(c.objective, c.length),
    flops=tokens * flops_per_token(c.objective, c.model, c.length),
    share_done=share_done,
    warnings=warnings,
  )


def _traced(train_step, workdir, facts, ledger):
  """Returns a train step that traces itself once; see `Stage.compile`."""
  folder, calls, text = pathlib.Path(workdir, FOLDER), 0, ''
  session = f'process_{jax.process_index()}'

  def traced(state, batch, key):
    nonlocal calls, text
    calls += 1
    if calls == WARM_UP + 1:
      with ledger.span('other'):
        text = train_step.as_text()
        shutil.rmtree(_session(folder, session), ignore_errors=True)
        jax.block_until_ready((state, batch))
        _start(folder, session)
    result = train_step(state, batch, key)
    if calls == WARM_UP + facts.steps:
      jax.block_until_ready(result)
      with ledger.span('other'):
        _finish(folder, session, text, facts)
    return result

  traced.as_text = train_step.as_text
  return traced


def _start(folder, session):
  options = jax.profiler.ProfileOptions()
  options.session_id = session
  options.python_tracer_level = 0  # a trace of the devices, not of Python
  jax.profiler.start_trace(str(folder), profiler_options=options)


def _finish(folder, session, text, facts):
  """Ends the trace; process 0 writes and prints the table.

  The training continues if the files cannot be written or read.
  """
  try:
    jax.profiler.stop_trace()
    if jax.process_index() == 0:
      atomic.write(folder / 'hlo.txt.gz', gzip.compress(text.encode(), 6))
      table = tabulate(folder, text, facts)
      terminal.warn(f'\n{table}\n\nprofile: {folder}')
  except (OSError, UserError, jax.errors.JaxRuntimeError) as error:
    terminal.warn(f'warning: no profile in {folder}: {error}')


def _session(folder, session):
  return folder / 'plugins' / 'profile' / session


def tabulate(folder, text, facts):
  """Writes table.txt and parts.json of a trace; returns the table.

  Args:
    folder: pathlib.Path, the folder `profile` of a work directory.
    text: HLO text of the train step.
    facts: comparison.Facts.

  Raises:
    UserError: the trace has no instructions of the train step.
    OSError: the files cannot be read or written.
  """
  (path,) = _session(folder, 'process_0').glob('*.xplane.pb')
  profile = jax.profiler.ProfileData.from_file(str(path))
  result = comparison.compare(text, profile, facts)
  table = tables_profile.format_table(result)
  parts = json_text.dumps(result, indent=1)
  atomic.write(folder / 'parts.json', parts.encode() + b'\n')
  atomic.write(folder / 'table.txt', table.encode() + b'\n')
  return table


def remake(folder):
  """Makes the table again from the files of a profile, on any machine.

  Args:
    folder: the folder `profile` of a work directory.
  """
  folder = pathlib.Path(folder)
  facts = json.loads((folder / 'parts.json').read_text())['facts']
  text = gzip.decompress((folder / 'hlo.txt.gz').read_bytes()).decode()
  return tabulate(folder, text, comparison.from_json(facts))


def without_command_buffers(environ):
  """Lets XLA launch each kernel of a GPU by itself.

  A trace does not name the instructions of a command buffer. Must be called
  before JAX starts its devices.

  Args:
    environ: environment variables, changed in place.
  """
  if has_gpu():
    flags = environ.get('XLA_FLAGS', '')
    environ['XLA_FLAGS'] = f'{flags} --xla_gpu_enable_command_buffer='.strip()
