"""The training loop, read top to bottom.

`run` opens everything a run needs, in the order in which bad input should be
noticed: config, devices, tokenizer, data, checkpoints; then compiles the step
and loops. The device never waits for the loop, which is a step ahead of it and
no more: metrics are fetched after the step that follows them was dispatched.
"""

import collections
import contextlib
import functools
import os
import time

import jax
import numpy as np

from maskdiff import config as config_lib
from maskdiff.checkpoints import checkpoint
from maskdiff.data import pipeline
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.distributed.consensus import Preemption
from maskdiff.distributed.watchdog import watch
from maskdiff.errors import Preempted, UserError
from maskdiff.model import transformer
from maskdiff.monitoring import ledger as ledger_lib
from maskdiff.monitoring import metrics, skipped, terminal, wandb_run
from maskdiff.objectives import table
from maskdiff.training import evaluation, inputs, resume
from maskdiff.training import step as step_lib
from maskdiff.training import workdir as workdir_lib
from maskdiff.training.optimizer import (
  OptimizerConfig,
  learning_rate,
  make_optimizer,
)


def run(config, workdir):
  """Trains, or goes on training, the model of a config.

  Writes to the work directory: config.json, header.txt, the tokenizer,
  metrics.jsonl, tensorboard/, ledger.jsonl and checkpoints/; wandb_id and
  wandb/ with config.train.wandb_project. Running again with the same arguments
  resumes from the newest checkpoint. An error or an interrupt still lets a
  checkpoint be finished that is being written.

  Args:
    config: ConfigDict with the keys of config.default().
    workdir: directory, made if it is not there.

  Returns:
    The last evaluation, a dict of floats; see `evaluation.evaluate`.

  Raises:
    UserError: something in the config, the data or the checkpoints does not
      fit, which is noticed before the step is compiled; the devices have too
      little memory; too many updates in a row were skipped; or checkpoints
      cannot be written.
    Preempted: the process was told to end, and a checkpoint was saved.
  """
  with workdir_lib.memory_advice(config), contextlib.ExitStack() as stack:
    return _run(config, workdir, stack)


def _run(config, workdir, stack):
  config_lib.validate(config)
  wandb_run.require_wandb(config.train.wandb_project)
  c = step_lib.step_config(config)
  steps, batch, length = config.train.steps, config.train.batch, c.length
  optimizer_config = OptimizerConfig(**config.optimizer)
  # On the host, so that reporting one does not queue behind a step.
  plan = jax.vmap(learning_rate(optimizer_config, steps))
  learning_rates = np.asarray(plan(np.arange(steps)))
  main_host = jax.process_index() == 0

  workdir_lib.make_workdir(workdir)
  ledger = ledger_lib.Ledger(os.path.join(workdir, 'ledger.jsonl'), main_host)
  stack.callback(ledger.close)
  preemption = stack.enter_context(Preemption())
  stack.enter_context(watch(ledger, config.train.stall_s))

  with ledger.span('init'):
    mesh = mesh_lib.make_mesh(**config.mesh)
    config_lib.validate_mesh(config, mesh.shape)
    tokenizer = inputs.open_tokenizer(config)
    datasets = inputs.open_data(config, tokenizer)
    identity = pipeline.fingerprint(datasets, seed=config.seed, length=length)
    resume.agree(config, identity)
    optimizer = make_optimizer(
      optimizer_config, steps, transformer.axes(c.model)
    )
    shardings = step_lib.state_shardings(c.model, optimizer, mesh)
    heldout = evaluation.open_heldout(
      config,
      inputs.open_data(config, tokenizer, config.eval.path)
      if config.eval.path
      else datasets,
      mesh,
    )

  checkpointer = checkpoint.Checkpointer(
    os.path.join(workdir, 'checkpoints'),
    config.checkpoint.keep,
    config.checkpoint.keep_every_steps,
  )
  stack.callback(checkpointer.close)
  init_key, key = jax.random.split(jax.random.key(config.seed))
  with ledger.span('restore'), jax.set_mesh(mesh):
    state, start, meta = resume.restore_or_init(
      config, c, init_key, optimizer, shardings, checkpointer, identity
    )
  ledger.event('started', step=start)
  project = config.train.wandb_project if start < steps else ''
  writer = metrics.Writer(workdir, start, main_host, project, config.to_dict())
  stack.callback(writer.close)
  progress = terminal.Progress(start, steps, main_host)
  stack.callback(progress.close)
  if main_host:
    header = workdir_lib.describe(config, c, mesh, datasets)
    workdir_lib.save_run_files(config, tokenizer, header, workdir)
    progress.say(header)
  progress.say(
    f'resuming at step {start}' if start else 'starting from scratch'
  )

  def first_sample(step):
    """The number of the first sample that comes after a step."""
    return int(
      pipeline.sample_number(
        meta.get('samples', 0),
        (step - start) * batch,
        config.data.skip_samples,
      )
    )

  with ledger.span('data'):
    batches = inputs.train_batches(
      config, datasets, mesh, meta.get('samples', 0)
    )
    tokens = next(batches)
    first = tokenizer.decode(np.asarray(first_row(tokens, mesh)))
  progress.say(f'first row of the first batch:\n{first}\n')
  if start == 0:
    writer.text(0, 'first_row', first)

  train_step = step_lib.compile_train_step(c, optimizer, mesh)
  if start < steps:
    began = time.monotonic()
    with ledger.span('compile'), jax.set_mesh(mesh):
      train_step = train_step.lower(state, tokens, key).compile()
    memory = train_step.memory_analysis()
    progress.say(
      f'compiled the train step in {time.monotonic() - began:.0f} s; a device '
      f'holds {memory.argument_size_in_bytes / 2**30:.2f} GiB of arguments and '
      f'{memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries'
    )

  flops = table.flops_per_token(c.objective.name, c.model, length)
  window, clock = collections.deque(), time.monotonic()
  streak = collections.deque(maxlen=config.guard.max_in_a_row)

  def report(step):
    """Fetches and writes the metrics of the steps in the window."""
    nonlocal clock
    if not window:
      return
    with ledger.span('step'):
      fetched = [jax.device_get(window.popleft()) for _ in range(len(window))]
    now = time.monotonic()
    step_s, clock = (now - clock) / len(fetched), now
    tokens_per_s = batch * length / step_s
    mfu = metrics.utilization(tokens_per_s, flops, mesh.devices.flatten())
    made = step - 1 - int(fetched[-1]['skipped_before'])
    row = evaluation.train_row(fetched, learning_rates[made], step_s)
    row |= {'train/tokens_per_s': tokens_per_s}
    row |= {} if mfu is None else {'train/mfu': mfu}
    writer.scalars(step, row)
    ledger.write(step)
    loss = row.get('train/loss_nats_per_token', float('nan'))
    progress.update(
      step,
      step_s,
      f'loss {loss:.3f} nats/token  '
      f'lr {row["train/learning_rate"]:.2e}  '
      f'{tokens_per_s:,.0f} tokens/s' + (f'  mfu {mfu:.1%}' if mfu else ''),
    )
    for update in skipped.find(step, fetched, first_sample):
      ledger.event('skipped', **update)
      progress.say(skipped.describe(update))
      streak.append(update)
      if update['in_a_row'] >= config.guard.max_in_a_row:
        last = list(streak)[-update['in_a_row'] :]
        raise UserError(skipped.give_up(workdir, last, main_host and texts_of))

  def texts_of(first, end):
    rows = inputs.read_samples(config, datasets, first, end)
    return [tokenizer.decode(row) for row in rows]

  def evaluate_and_sample(step):
    """Writes the bound on held-out text, and samples."""
    nonlocal clock, evaluation_due
    evaluation_due = True
    began = time.monotonic()
    with ledger.span('eval'), jax.set_mesh(mesh):
      result = evaluation.evaluate_mixture(
        c, state.params, heldout, between=end_if_preempted
      )
      texts = evaluation.sample_texts(config, state.params, tokenizer)
    evaluation_due = False
    if start < steps:  # a finished run has this row already
      writer.scalars(step, result)
    progress.say(
      f'step {step}: held-out bound '
      f'{result["eval/loss_nats_per_token"]:.4f} '
      f'± {result["eval/stderr_nats_per_token"]:.4f} nats/token, '
      f'{result["eval/bits_per_byte"]:.4f} bits/byte'
    )
    for i, text in enumerate(texts):
      if start < steps:
        writer.text(step, f'sample/{i}', text)
      progress.say(f'--- sample ---\n{text}\n--------------')
    clock += time.monotonic() - began
    return result

  def save(step):
    checkpointer.save(
      step,
      {
        'params': state.params,
        'opt_state': state.opt_state,
        'guard': state.guard,
      },
      {
        'config': checkpoint.config_json(config),
        'samples': first_sample(step),
        'data': identity,
        'evaluation_due': evaluation_due,
      },
    )

  def settle(act, tolerant=True):
    """Takes note of a checkpoint that has come to the disk, or has not."""
    nonlocal failures
    try:
      durable = act()
    except checkpoint.SaveError as error:
      failures += 1
      ledger.event('not_saved', step=error.step, cause=str(error))
      if jax.process_count() > 1 and not error.disk_full:
        raise  # another process may be lost: no error of the user
      if (
        not tolerant
        or failures > config.checkpoint.max_failures
        or jax.process_count() > 1
      ):
        raise UserError(
          f'{error}; the newest whole checkpoint is that of step '
          f'{checkpointer.durable_step}'
        ) from error
      progress.say(f'warning: {error}; the run goes on')
      return
    if durable is not None:
      failures = 0
      ledger.event('durable', step=durable)

  def end_if_preempted():
    ledger.beat()
    if preemption.poll():
      raise Preempted(done)

  done, result, failures = start, {}, 0
  evaluation_due = meta.get('evaluation_due', False)
  try:
    if start == 0 or start >= steps or evaluation_due:
      result = evaluate_and_sample(start)
    for step in range(start + 1, steps + 1):
      end_if_preempted()
      with ledger.span('step'):
        state, values = train_step(state, tokens, key)
      done = step
      with ledger.span('data'):
        tokens = next(batches)
      if window:
        # One step is always queued behind the one that runs; more would have to
        # end before a checkpoint of this moment could be taken.
        with ledger.span('step'):
          jax.block_until_ready(window[-1])
      settle(checkpointer.poll)
      if (step - 1) % config.train.log_every_steps == 0:
        report(step - 1)
      window.append(values)
      last = step == steps
      if step % config.eval.every_steps == 0 or last:
        report(step)
        result = evaluate_and_sample(step)
      if step % config.checkpoint.every_steps == 0 or last:
        report(step)  # a row that is not written by now is not written again
        with ledger.span('save'):
          settle(checkpointer.finish)
          settle(functools.partial(save, step))
    with ledger.span('save'):
      settle(checkpointer.finish, tolerant=False)
    ledger.event('ended')
  except Preempted:
    report(done)
    with ledger.span('save'):
      settle(checkpointer.finish)
      if checkpointer.durable_step != done:
        settle(functools.partial(save, done), tolerant=False)
        settle(checkpointer.finish, tolerant=False)
    ledger.event('preempted')
    progress.say(f'told to end: step {done} is saved')
    raise

  stack.close()
  if main_host:
    print(evaluation.conclude(result, heldout))
  return result


def first_row(tokens, mesh):
  """Row 0 of a batch, whole on every host; all must call it."""
  whole = mesh_lib.replicated(mesh)
  return jax.jit(lambda tokens: tokens[0], out_shardings=whole)(tokens)
