"""The training loop, read top to bottom.

`run` opens everything a run needs, in the order in which bad input should be
noticed: config, devices, tokenizer, data, checkpoints; then compiles the step
and loops. Nothing in the loop waits for the device: metrics are fetched after
the step that follows them has been dispatched.
"""

import collections
import contextlib
import functools
import os
import time

import jax
import numpy as np

from maskdiff import checkpoint, evaluation, metrics
from maskdiff import config as config_lib
from maskdiff import mesh as mesh_lib
from maskdiff import model as model_lib
from maskdiff import run as run_lib
from maskdiff import step as step_lib
from maskdiff.data import pipeline
from maskdiff.errors import UserError
from maskdiff.optimizer import OptimizerConfig, learning_rate, make_optimizer
from maskdiff.step import TrainState

# What the step computes does not depend on these, up to rounding.
MAY_CHANGE = (
  'model.dtype',
  'model.remat',
  'model.attention',
  'objective.loss_chunk_tokens',
)


def run(config, workdir):
  """Trains, or goes on training, the model of a config.

  Writes to the work directory: config.json, header.txt, the tokenizer,
  metrics.jsonl, tensorboard/ and checkpoints/. Running again with the same
  arguments resumes from the newest checkpoint. An error or an interrupt still
  lets a checkpoint be finished that is being written.

  Args:
    config: ConfigDict with the keys of config.default().
    workdir: directory, made if it is not there.

  Returns:
    The last evaluation, a dict of floats; see `evaluation.evaluate`.

  Raises:
    UserError: something in the config, the data or the checkpoints does not
      fit; raised before the step is compiled.
  """
  with contextlib.ExitStack() as stack:
    return _run(config, workdir, stack)


def _run(config, workdir, stack):
  config_lib.validate(config)
  c = run_lib.step_config(config)
  steps, batch, length = config.train.steps, config.train.batch, c.length
  optimizer_config = OptimizerConfig(**config.optimizer)
  # On the host, so that reporting one does not queue behind a step.
  plan = jax.vmap(learning_rate(optimizer_config, steps))
  learning_rates = np.asarray(plan(np.arange(steps)))
  main_host = jax.process_index() == 0

  mesh = mesh_lib.make_mesh(**config.mesh)
  config_lib.validate_mesh(config, mesh.shape)
  tokenizer = run_lib.open_tokenizer(config)
  datasets = run_lib.open_data(config, tokenizer)
  identity = pipeline.fingerprint(datasets, seed=config.seed, length=length)
  optimizer = make_optimizer(optimizer_config, steps, model_lib.axes(c.model))
  shardings = step_lib.state_shardings(c.model, optimizer, mesh)

  heldout = evaluation.open_heldout(
    config,
    run_lib.open_data(config, tokenizer, config.eval.path)
    if config.eval.path
    else datasets,
    mesh,
  )

  run_lib.make_workdir(workdir)
  checkpointer = checkpoint.Checkpointer(
    os.path.join(workdir, 'checkpoints'), config.checkpoint.keep
  )
  stack.callback(checkpointer.close)
  init_key, key = jax.random.split(jax.random.key(config.seed))
  with jax.set_mesh(mesh):
    state, start, samples = restore_or_init(
      config, c, init_key, optimizer, shardings, checkpointer, identity
    )
  writer = metrics.Writer(workdir, start, main_host)
  stack.callback(writer.close)
  progress = metrics.Progress(start, steps, main_host)
  stack.callback(progress.close)
  if main_host:
    header = run_lib.describe(config, c, mesh, datasets)
    run_lib.save_run_files(config, tokenizer, header, workdir)
    progress.say(header)
  progress.say(
    f'resuming at step {start}' if start else 'starting from scratch'
  )

  batches = run_lib.train_batches(config, datasets, mesh, samples)
  tokens = next(batches)
  first = tokenizer.decode(np.asarray(first_row(tokens, mesh)))
  progress.say(f'first row of the first batch:\n{first}\n')
  if start == 0:
    writer.text(0, 'first_row', first)

  train_step = step_lib.compile_train_step(c, optimizer, mesh)
  if start < steps:
    began = time.monotonic()
    with jax.set_mesh(mesh):
      train_step = train_step.lower(state, tokens, key).compile()
    memory = train_step.memory_analysis()
    progress.say(
      f'compiled the train step in {time.monotonic() - began:.0f} s; a device '
      f'holds {memory.argument_size_in_bytes / 2**30:.2f} GiB of arguments and '
      f'{memory.temp_size_in_bytes / 2**30:.2f} GiB of temporaries'
    )

  flops = model_lib.flops_per_token(
    c.model, length, causal=c.objective.name == 'autoregressive'
  )
  window, clock = collections.deque(), time.monotonic()

  def report(step):
    """Fetches and writes the metrics of the steps in the window."""
    nonlocal clock
    if not window:
      return
    fetched = [jax.device_get(window.popleft()) for _ in range(len(window))]
    now = time.monotonic()
    step_s, clock = (now - clock) / len(fetched), now
    tokens_per_s = batch * length / step_s
    mfu = metrics.utilization(tokens_per_s, flops, mesh.devices.flatten())
    row = evaluation.train_row(fetched, learning_rates[step - 1], step_s)
    row |= {'train/tokens_per_s': tokens_per_s}
    row |= {} if mfu is None else {'train/mfu': mfu}
    writer.scalars(step, row)
    progress.update(
      step,
      step_s,
      f'loss {row["train/loss_nats_per_token"]:.3f} nats/token  '
      f'lr {row["train/learning_rate"]:.2e}  '
      f'{tokens_per_s:,.0f} tokens/s' + (f'  mfu {mfu:.1%}' if mfu else ''),
    )

  def evaluate_and_sample(step):
    """Writes the bound on held-out text, and samples."""
    nonlocal clock
    began = time.monotonic()
    with jax.set_mesh(mesh):
      result = evaluation.evaluate_mixture(c, state.params, heldout)
      texts = evaluation.sample_texts(config, state.params, tokenizer)
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
      state.params,
      state.opt_state,
      {
        'config': checkpoint.config_json(config),
        'samples': samples + (step - start) * batch,
        'data': identity,
      },
    )

  result = {}
  if start == 0 or start >= steps:
    result = evaluate_and_sample(start)
  for step in range(start + 1, steps + 1):
    state, values = train_step(state, tokens, key)
    tokens = next(batches)
    if (step - 1) % config.train.log_every_steps == 0:
      report(step - 1)
    window.append(values)
    last = step == steps
    if step % config.eval.every_steps == 0 or last:
      report(step)
      result = evaluate_and_sample(step)
    if step % config.checkpoint.every_steps == 0 or last:
      report(step)  # a row that is not written by now is not written again
      save(step)

  stack.close()
  if main_host:
    print(evaluation.conclude(result, heldout))
  return result


def first_row(tokens, mesh):
  """Row 0 of a batch, whole on every host; all must call it."""
  whole = mesh_lib.replicated(mesh)
  return jax.jit(lambda tokens: tokens[0], out_shardings=whole)(tokens)


def restore_or_init(
  config, c, key, optimizer, shardings, checkpointer, identity
):
  """Restores the newest checkpoint, or draws fresh parameters if there is none.

  Args:
    config: the config, and c its StepConfig.
    key: PRNG key of fresh parameters.
    optimizer: from make_optimizer.
    shardings: TrainState of shardings.
    checkpointer: Checkpointer of the run.
    identity: fingerprint of the data.

  Returns:
    The TrainState, the steps done and the samples seen.

  Raises:
    UserError: the checkpoint saw other data, or is of another model or
      objective.
  """
  init = functools.partial(step_lib.init_state, c.model, optimizer)
  step = checkpointer.latest_step()
  if step is None:
    return jax.jit(init, out_shardings=shardings)(key), 0, 0
  meta = checkpointer.restore_meta(step)
  was = config_lib.flatten(config_lib.from_dict(meta['config']))
  for name, now in identity.items():
    before = meta['data'].get(name)
    if before == now:
      continue
    differs = (
      f'{checkpointer.directory}/{step} was trained on data with {name}='
      f'{before}, not {now}'
    )
    if not config.data.allow_change:
      raise UserError(
        f'{differs}; use that again or another --workdir, or '
        '--config.data.allow_change=True to go on from here'
      )
    run_lib.say(differs)
  for name, now in config_lib.flatten(config).items():
    section = name.partition('.')[0]
    if section not in ('model', 'objective', 'tokens') or name in MAY_CHANGE:
      continue
    if was[name] != now:
      raise UserError(
        f'{checkpointer.directory}/{step} was trained with config.{name}='
        f'{was[name]!r}, not {now!r}; use that again or another --workdir'
      )
  targets = checkpoint.targets(jax.eval_shape(init, key), shardings)
  params, opt_state = checkpointer.restore(
    step, params=targets.params, opt_state=targets.opt_state
  )
  count = jax.device_put(np.int32(step), shardings.step)
  return TrainState(count, params, opt_state), step, meta['samples']
