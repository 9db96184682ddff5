"""The training loop, read top to bottom: open, restore, compile, loop, end.

`run` trains a stage (`stage.py`), for example pretraining, and knows only the
interface of stages. It checks its inputs in this order: config, devices,
tokenizer and data of the stage, checkpoints. Then it compiles the train step
and loops. The loop dispatches one step ahead: it reads the metrics of a step
after it has dispatched the next step, so that the device never waits for the
host.
"""

import contextlib
import functools
import os
import re

import jax

from maskdiff import config as config_lib
from maskdiff.checkpoints.checkpoint import Checkpointer
from maskdiff.distributed.consensus import Preemption
from maskdiff.distributed.watchdog import watch
from maskdiff.errors import Preempted, UserError, one_line
from maskdiff.monitoring import terminal, wandb_run
from maskdiff.monitoring.ledger import Ledger
from maskdiff.training import pretraining, resume
from maskdiff.training import workdir as workdir_lib
from maskdiff.training.reporter import Reporter
from maskdiff.training.run_setup import open_setup
from maskdiff.training.saver import Saver


class _Stop(Exception):
  """A process of the run has received SIGTERM; nothing is saved yet."""


def run(config, workdir, make_stage=pretraining.make_stage):
  """Trains the model of a config, or resumes its training.

  Writes to the work directory: config.json, stage.json, header.txt, the
  tokenizer, metrics.jsonl, tensorboard/, ledger.jsonl and checkpoints/;
  wandb_id and wandb/ with config.train.wandb_project. Running again with the
  same arguments resumes from the newest checkpoint. After an error or an
  interrupt, a save in progress is still completed.

  Args:
    config: ConfigDict with the keys of config.default().
    workdir: work directory, created if it does not exist.
    make_stage: (config, RunSetup) -> Stage.

  Returns:
    The metrics of the last evaluation, a dict of floats by name.

  Raises:
    UserError: the config, the data and the checkpoints do not fit together
      (raised before the step is compiled); a device has too little memory; too
      many consecutive updates were skipped; or checkpoints cannot be written.
    InUse: another process writes to the work directory.
    Preempted: the process received SIGTERM and has saved a checkpoint.
  """
  with _memory_advice(config), contextlib.ExitStack() as stack:
    return _run(config, workdir, make_stage, stack)


def _run(config, workdir, make_stage, stack):
  # Open.
  config_lib.validate(config)
  steps = config.train.steps
  wandb_run.require_wandb(config.train.wandb_project)
  workdir_lib.make_workdir(workdir)
  check_lock = stack.enter_context(workdir_lib.locked(workdir))
  main_process = jax.process_index() == 0
  ledger = Ledger(os.path.join(workdir, 'ledger.jsonl'), main_process)
  stack.callback(ledger.close)
  preemption = stack.enter_context(Preemption())
  stack.enter_context(watch(ledger, config.train.stall_s))
  stop_if_preempted = lambda: _stop_if_preempted(preemption, ledger, check_lock)
  with ledger.span('init'):
    setup = open_setup(config, ledger, stop_if_preempted)
    stage = make_stage(config, setup)
    resume.agree_on_stage(stage)
  checkpointer = _open_checkpoints(config, workdir)
  stack.callback(checkpointer.close)

  # Restore.
  init_key, key = jax.random.split(jax.random.key(config.seed))
  with ledger.span('restore'), jax.set_mesh(setup.mesh):
    state, start = resume.restore_or_init(
      config, setup, stage, init_key, checkpointer
    )
  ledger.event('started', step=start.step)
  reporter = Reporter(config, stage, workdir, start, ledger)
  stack.callback(reporter.close)
  saver = Saver(config, stage, checkpointer, ledger, reporter.say)
  if main_process:
    reporter.say(workdir_lib.save_run_files(config, setup, stage, workdir))
  evaluate = functools.partial(_evaluate, stage, setup, reporter)
  next_batch = functools.partial(_next_batch, stage, setup)
  done, position, result = start.step, start.position, None
  evaluation_due = start.evaluation_due or done == 0 or done >= steps
  reporter.say(f'resuming at step {done}' if done else 'starting from scratch')
  try:
    # Compile.
    if done < steps:
      batch, next_position, facts = next_batch(position, state.params)
      train_step = _compile(stage, setup, reporter, state, batch, key)

    # Loop.
    reporter.start_clock()
    if evaluation_due:
      result = evaluate(done, state)
      evaluation_due = False
    for step in range(start.step + 1, steps + 1):
      stop_if_preempted()
      with ledger.span('step'):
        state, step_metrics = train_step(state, batch, key)
      reporter.add(step, step_metrics, facts)
      done, position, last = step, next_position, step == steps
      evaluation_due = step % config.eval.every_steps == 0 or last
      if not last:
        batch, next_position, facts = next_batch(position, state.params)
      reporter.wait(step - 1)
      saver.poll()
      if (step - 1) % config.train.log_every_steps == 0:
        reporter.write(step - 1)
      if evaluation_due:
        reporter.write(step)
        result = evaluate(step, state)
        evaluation_due = False
      if step % config.checkpoint.every_steps == 0 or last:
        reporter.write(step)  # first: a resumed run writes only later rows
        saver.save(step, state, position, evaluation_due)
    saver.finish()
    ledger.event('ended')
  except _Stop:
    reporter.write(done)
    saver.save_and_finish(done, state, position, evaluation_due)
    reporter.write_preempted(done)
    raise Preempted(done) from None

  # End.
  stack.close()
  if main_process:
    terminal.print_result(result.conclusion)
  return result.row


def _open_checkpoints(config, workdir):
  """Returns the Checkpointer of a work directory."""
  return Checkpointer(
    os.path.join(workdir, 'checkpoints'),
    config.checkpoint.keep,
    config.checkpoint.keep_every_steps,
  )


def _next_batch(stage, setup, position, params):
  """Calls `Stage.next_batch`, whose time counts as `data`."""
  with setup.ledger.span('data'), jax.set_mesh(setup.mesh):
    return stage.next_batch(position, params)


def _compile(stage, setup, reporter, state, batch, key):
  """Compiles the train step; prints the first row and memory per device."""
  with jax.set_mesh(setup.mesh):
    with setup.ledger.span('data'):
      reporter.write_first_row(stage.first_row(batch))
    with setup.ledger.span('compile'):
      train_step, line = stage.compile(state, batch, key)
  reporter.say(line)
  return train_step


def _evaluate(stage, setup, reporter, step, state):
  """Evaluates a TrainState and writes the result; returns an Evaluation."""
  average = None if state.ema is None else state.ema.params
  with reporter.clock_stopped():
    with setup.ledger.span('eval'), jax.set_mesh(setup.mesh):
      result = stage.evaluate(step, state.params, average)
    reporter.write_evaluation(step, result)
  return result


def _stop_if_preempted(preemption, ledger, check_lock):
  """Raises _Stop if a process of the run has received SIGTERM.

  All processes must call this function the same number of times.

  Args:
    preemption: Preemption.
    ledger: Ledger. The call resets its timer for stalls.
    check_lock: raises InUse if another run has taken the work directory.
  """
  ledger.beat()
  check_lock()
  if preemption.poll():
    raise _Stop


@contextlib.contextmanager
def _memory_advice(config):
  """Turns an out-of-memory error into a UserError that says what to change."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    # On the CPU it is an internal error.
    if not re.search('RESOURCE_EXHAUSTED|Out of memory', str(error)):
      raise
    ways = f'raise --config.train.microbatches={config.train.microbatches}, '
    if config.model.remat != 'full':
      ways += f'set --config.model.remat={config.model.remat} to full, '
    raise UserError(
      f'a device has too little memory ({one_line(error)}): {ways}or lower '
      f'--config.objective.loss_chunk_tokens='
      f'{config.objective.loss_chunk_tokens}; for a TPU, launch/plan.py '
      '--sweep finds what fits'
    ) from error
