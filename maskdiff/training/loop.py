"""The training loop, read top to bottom: open, restore, compile, loop, end.

`run` checks its inputs in this order: config, devices, tokenizer, data,
checkpoints. Then it compiles the train step and loops. The loop dispatches one
step ahead: it reads the metrics of a step after it has dispatched the next
step, so that the device never waits for the host.
"""

import contextlib
import functools
import os
import time

import jax

from maskdiff import config as config_lib
from maskdiff.checkpoints.checkpoint import Checkpointer
from maskdiff.distributed.consensus import Preemption
from maskdiff.distributed.watchdog import watch
from maskdiff.errors import Preempted, UserError, one_line
from maskdiff.monitoring import wandb_run
from maskdiff.monitoring.ledger import Ledger
from maskdiff.training import evaluation, inputs, resume
from maskdiff.training import step as step_lib
from maskdiff.training import workdir as workdir_lib
from maskdiff.training.reporter import Reporter
from maskdiff.training.run_setup import open_setup
from maskdiff.training.saver import Saver


def run(config, workdir):
  """Trains the model of a config, or resumes its training.

  Writes to the work directory: config.json, header.txt, the tokenizer,
  metrics.jsonl, tensorboard/, ledger.jsonl and checkpoints/; wandb_id and
  wandb/ with config.train.wandb_project. Running again with the same arguments
  resumes from the newest checkpoint. After an error or an interrupt, a save in
  progress is still completed.

  Args:
    config: ConfigDict with the keys of config.default().
    workdir: work directory, created if it does not exist.

  Returns:
    The metrics of the last evaluation, a dict of floats by name.

  Raises:
    UserError: the config, the data and the checkpoints do not fit together
      (raised before the step is compiled); a device has too little memory; too
      many consecutive updates were skipped; or checkpoints cannot be written.
    Preempted: the process received SIGTERM and has saved a checkpoint.
  """
  with _memory_advice(config), contextlib.ExitStack() as stack:
    return _run(config, workdir, stack)


def _run(config, workdir, stack):
  # Open.
  config_lib.validate(config)
  steps = config.train.steps
  wandb_run.require_wandb(config.train.wandb_project)
  workdir_lib.make_workdir(workdir)
  main_process = jax.process_index() == 0
  ledger = Ledger(os.path.join(workdir, 'ledger.jsonl'), main_process)
  stack.callback(ledger.close)
  preemption = stack.enter_context(Preemption())
  stack.enter_context(watch(ledger, config.train.stall_s))
  with ledger.span('init'):
    setup = open_setup(config)
  checkpointer = Checkpointer(
    os.path.join(workdir, 'checkpoints'),
    config.checkpoint.keep,
    config.checkpoint.keep_every_steps,
  )
  stack.callback(checkpointer.close)

  # Restore.
  init_key, key = jax.random.split(jax.random.key(config.seed))
  with ledger.span('restore'), jax.set_mesh(setup.mesh):
    state, start = resume.restore_or_init(config, setup, init_key, checkpointer)
  ledger.event('started', step=start.step)
  reporter = Reporter(config, setup, workdir, start, ledger)
  stack.callback(reporter.close)
  saver = Saver(config, setup, checkpointer, start, ledger, reporter.say)
  if main_process:
    reporter.say(workdir_lib.save_run_files(config, setup, workdir))
  batches, tokens = _first_batch(config, setup, start, reporter, ledger)

  # Compile.
  if start.step < steps:
    with ledger.span('compile'), jax.set_mesh(setup.mesh):
      train_step = _compile(setup, state, tokens, key, reporter.say)

  # Loop.
  evaluate = functools.partial(_evaluate, config, setup, reporter, ledger)
  stop_if_preempted = functools.partial(_stop_if_preempted, preemption, ledger)
  done, result = start.step, None
  evaluation_due = start.evaluation_due or done == 0 or done >= steps
  reporter.start_clock()
  try:
    if evaluation_due:
      result = evaluate(done, state.params, stop_if_preempted)
      evaluation_due = False
    for step in range(start.step + 1, steps + 1):
      stop_if_preempted(done)
      with ledger.span('step'):
        state, step_metrics = train_step(state, tokens, key)
      done = step
      with ledger.span('data'):
        tokens = next(batches)
      reporter.wait()
      saver.poll()
      if (step - 1) % config.train.log_every_steps == 0:
        reporter.write(step - 1)
      reporter.add(step_metrics)
      last = step == steps
      if step % config.eval.every_steps == 0 or last:
        reporter.write(step)
        evaluation_due = True
        result = evaluate(step, state.params, stop_if_preempted)
        evaluation_due = False
      if step % config.checkpoint.every_steps == 0 or last:
        reporter.write(step)  # first: a resumed run writes only later rows
        saver.save(step, state, evaluation_due)
    saver.finish()
    ledger.event('ended')
  except Preempted:
    reporter.write(done)
    saver.save_and_finish(done, state, evaluation_due)
    reporter.write_preempted(done)
    raise

  # End.
  stack.close()
  if main_process:
    print(result.conclusion)
  return result.row


def _first_batch(config, setup, start, reporter, ledger):
  """Opens the training data; returns the iterator and the first batch."""
  reporter.say(
    f'resuming at step {start.step}' if start.step else 'starting from scratch'
  )
  with ledger.span('data'):
    batches = inputs.train_batches(
      config, setup.datasets, setup.mesh, start.samples
    )
    tokens = next(batches)
    text = setup.tokenizer.decode(inputs.first_row(tokens, setup.mesh))
  reporter.write_first_row(text)
  return batches, tokens


def _compile(setup, state, tokens, key, say):
  """Compiles the train step and prints its memory per device."""
  began = time.monotonic()
  train_step = step_lib.compile_train_step(setup.c, setup.optimizer, setup.mesh)
  compiled = train_step.lower(state, tokens, key).compile()
  memory = compiled.memory_analysis()
  say(
    f'compiled the train step in {time.monotonic() - began:.0f} s; a device '
    f'holds {memory.argument_size_in_bytes / 2**30:.2f} GiB of arguments and '
    f'{memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries'
  )
  return compiled


def _evaluate(config, setup, reporter, ledger, step, params, stop_if_preempted):
  """Evaluates parameters and writes the result; returns an Evaluation."""
  with reporter.clock_stopped():
    with ledger.span('eval'), jax.set_mesh(setup.mesh):
      result = evaluation.evaluate_and_sample(
        config,
        setup.c,
        params,
        setup.tokenizer,
        setup.heldout,
        between=functools.partial(stop_if_preempted, step),
      )
    reporter.write_evaluation(step, result)
  return result


def _stop_if_preempted(preemption, ledger, done):
  """Raises Preempted if a process of the run has received SIGTERM.

  All processes must call this function the same number of times.

  Args:
    preemption: Preemption.
    ledger: Ledger. The call resets its timer for stalls.
    done: number of steps done.
  """
  ledger.beat()
  if preemption.poll():
    raise Preempted(done)


@contextlib.contextmanager
def _memory_advice(config):
  """Turns an out-of-memory error into a UserError that says what to change."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
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
