"""The training loop, read top to bottom.

`run` opens everything a run needs, in the order in which bad input should be
noticed: config, devices, tokenizer, data, checkpoints; then compiles the step
and loops. Nothing in the loop waits for the device: metrics are fetched after
the step that follows them has been dispatched.
"""

import collections
import dataclasses
import functools
import json
import os
import shutil
import time

import jax
import numpy as np

from maskdiff import checkpoint, metrics, sampler
from maskdiff import config as config_lib
from maskdiff import mesh as mesh_lib
from maskdiff import model as model_lib
from maskdiff import step as step_lib
from maskdiff.data import pipeline, prepare, records
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError
from maskdiff.model import TransformerConfig
from maskdiff.objective import ObjectiveConfig
from maskdiff.optimizer import OptimizerConfig, learning_rate, make_optimizer
from maskdiff.schedule import Schedule
from maskdiff.step import StepConfig, TrainState

READ_THREADS = 2


def run(config, workdir):
  """Trains, or goes on training, the model of a config.

  Writes to the work directory: config.json, tokenizer.model, metrics.jsonl,
  tensorboard/ and checkpoints/. Running again with the same arguments resumes
  from the newest checkpoint.

  Args:
    config: ConfigDict with the keys of config.default().
    workdir: directory, made if it is not there.

  Returns:
    The last evaluation, a dict of floats; see `evaluate`.

  Raises:
    UserError: something in the config, the data or the checkpoints does not
      fit; raised before anything is compiled.
  """
  config_lib.validate(config)
  c = step_config(config)
  steps, batch, length = config.train.steps, config.train.batch, c.length
  optimizer_config = OptimizerConfig(**config.optimizer)
  plan = learning_rate(optimizer_config, steps)
  main_host = jax.process_index() == 0

  mesh = mesh_lib.make_mesh(**config.mesh)
  config_lib.validate_mesh(config, mesh_lib.batch_shards(mesh))
  tokenizer = open_tokenizer(config)
  directory, manifest = open_data(config, tokenizer)
  identity = {
    'data': pipeline.fingerprint(
      manifest, 'train', seed=config.seed, length=length
    ),
    'tokenizer': tokenizer.fingerprint,
  }
  optimizer = make_optimizer(optimizer_config, steps, model_lib.axes(c.model))
  shardings = step_lib.state_shardings(c.model, optimizer, mesh)

  os.makedirs(workdir, exist_ok=True)
  checkpointer = checkpoint.Checkpointer(
    os.path.join(workdir, 'checkpoints'), config.checkpoint.keep
  )
  with jax.set_mesh(mesh):
    state, start, samples = restore_or_init(
      c, config.seed, optimizer, shardings, checkpointer, identity
    )
  writer = metrics.Writer(workdir, start, main_host)
  progress = metrics.Progress(start, steps, main_host)
  if main_host:
    save_run_files(config, tokenizer, workdir)
    progress.say(describe(config, c, shardings, mesh, directory, manifest))
  progress.say(
    f'resuming at step {start}' if start else 'starting from scratch'
  )

  sharding = mesh_lib.batch_sharding(mesh)
  to_device = functools.partial(pipeline.to_device, sharding=sharding)
  host_rows = functools.partial(pipeline.host_rows, sharding)
  batches = to_device(
    pipeline.train_batches(
      records.RowSource(directory, manifest, 'train'),
      global_batch=batch,
      length=length,
      seed=config.seed,
      start_sample=samples,
      rows=host_rows((batch, length)),
      num_threads=READ_THREADS,
    ),
    global_shape=(batch, length),
  )
  e = config.eval
  heldout = list(
    to_device(
      pipeline.heldout_batches(
        records.RowSource(directory, manifest, 'heldout'),
        batch=e.batch,
        length=length,
        num_batches=e.batches,
        rows=host_rows((e.batch, length)),
        num_threads=READ_THREADS,
      ),
      global_shape=(e.batch, length),
    )
  )
  tokens = next(batches)
  first = np.asarray(tokens.addressable_shards[0].data)[0]
  progress.say(f'first row of the first batch:\n{tokenizer.decode(first)}\n')

  key = jax.random.key(config.seed)
  began = time.monotonic()
  with jax.set_mesh(mesh):
    train_step = (
      step_lib.compile_train_step(c, optimizer, mesh)
      .lower(state, tokens, key)
      .compile()
    )
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
    row = train_row(fetched, plan, step, batch, length, step_s)
    mfu = metrics.utilization(
      row['train/tokens_per_s'], flops, mesh.devices.flatten()
    )
    row |= {} if mfu is None else {'train/mfu': mfu}
    writer.scalars(step, row)
    progress.update(
      step,
      f'loss {row["train/loss_nats_per_token"]:.3f} nats/token  '
      f'lr {row["train/learning_rate"]:.2e}  '
      f'{row["train/tokens_per_s"]:,.0f} tokens/s'
      + (f'  mfu {mfu:.1%}' if mfu else ''),
    )

  def evaluate_and_sample(step):
    """Writes the bound on held-out text, and samples."""
    nonlocal clock
    began = time.monotonic()
    split = manifest.splits['heldout']
    with jax.set_mesh(mesh):
      result = evaluate(
        c, state.params, heldout, split.tokens / split.text_bytes
      )
      texts = sample_texts(config, c, state.params, tokenizer)
    writer.scalars(step, result)
    progress.say(
      f'step {step}: held-out bound '
      f'{result["eval/loss_nats_per_token"]:.4f} '
      f'± {result["eval/stderr_nats_per_token"]:.4f} nats/token, '
      f'{result["eval/bits_per_byte"]:.4f} bits/byte'
    )
    for text in texts:
      writer.text(step, 'sample', text)
      progress.say(f'--- sample ---\n{text}\n--------------')
    progress.pause(time.monotonic() - began)
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
        **identity,
      },
    )

  result = {}
  if start == 0 or start >= steps:
    result = evaluate_and_sample(start)
  for step in range(start + 1, steps + 1):
    state, values = train_step(state, tokens, key)
    tokens = next(batches)
    if (step - 1) % config.train.log_steps == 0:
      report(step - 1)
    window.append(values)
    last = step == steps
    if step % config.eval.steps == 0 or last:
      report(step)
      result = evaluate_and_sample(step)
    if step % config.checkpoint.steps == 0 or last:
      save(step)

  checkpointer.close()
  writer.close()
  progress.close()
  if main_host:
    print(conclude(result, manifest))
  return result


def step_config(config):
  """The frozen configs that the compiled step depends on."""
  o = config.objective
  return StepConfig(
    model=TransformerConfig(**config.model),
    objective=ObjectiveConfig(
      name=o.name,
      schedule=Schedule(o.schedule, o.schedule_power),
      eps=o.eps,
      time_sampling=o.time_sampling,
      random_length_fraction=o.random_length_fraction,
      predict_mask=o.predict_mask,
      mask_id=config.tokens.mask_id,
      bos_id=config.tokens.bos_id,
      loss_chunk_tokens=o.loss_chunk_tokens,
    ),
    length=config.data.length,
    microbatches=config.train.microbatches,
  )


def sampler_config(config):
  """The frozen config of the sampler; autoregressive models go one by one."""
  s, causal = config.sample, config.objective.name == 'autoregressive'
  return sampler.SamplerConfig(
    steps=s.gen_length if causal else s.steps,
    block_length=1 if causal else s.block_length,
    temperature=s.temperature,
    remasking=s.remasking,
    objective=config.objective.name,
    predict_mask=config.objective.predict_mask,
    mask_id=config.tokens.mask_id,
    bos_id=config.tokens.bos_id,
  )


def open_tokenizer(config):
  """Loads the tokenizer and checks it against the config.

  Raises:
    UserError: an id or the vocabulary size differs.
  """
  tokenizer = tokenizer_lib.load(config.data.tokenizer)
  for name, value in config.tokens.items():
    if getattr(tokenizer, name) != value:
      raise UserError(
        f'config.tokens.{name}={value}, but {config.data.tokenizer} has '
        f'{getattr(tokenizer, name)}; set --config.tokens.{name}='
        f'{getattr(tokenizer, name)} or choose another config.data.tokenizer'
      )
  if tokenizer.vocab_size > config.model.vocab_size:
    raise UserError(
      f'{config.data.tokenizer} has {tokenizer.vocab_size} pieces, more than '
      f'config.model.vocab_size={config.model.vocab_size}'
    )
  return tokenizer


def open_data(config, tokenizer):
  """The directory of prepared rows, and its manifest.

  The embedded corpus is prepared on first use.

  Raises:
    UserError: the directory is missing, or was prepared with another
      tokenizer.
  """
  directory = config.data.path
  if directory == 'embedded':
    directory = prepare.embedded(
      tokenizer, os.path.expanduser(config.data.cache_dir), config.data.length
    )
  manifest = records.read_manifest(directory)
  if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
    raise UserError(
      f'{directory} was prepared with tokenizer '
      f'{manifest.tokenizer_fingerprint}, but {config.data.tokenizer} is '
      f'{tokenizer.fingerprint}; set config.data.tokenizer to the one it was '
      'prepared with'
    )
  return directory, manifest


def restore_or_init(c, seed, optimizer, shardings, checkpointer, identity):
  """Returns the TrainState, the steps done and the samples seen.

  Raises:
    UserError: the newest checkpoint saw other data, or does not fit the model.
  """
  init = functools.partial(step_lib.init_state, c.model, optimizer)
  key = jax.random.fold_in(jax.random.key(seed), 0)
  step = checkpointer.latest_step()
  if step is None:
    return jax.jit(init, out_shardings=shardings)(key), 0, 0
  meta = checkpointer.restore_meta(step)
  for name, value in identity.items():
    if meta[name] != value:
      raise UserError(
        f'{checkpointer.directory}/{step} was trained on another {name}: '
        f'{meta[name]}, now {value}; use the same one or another --workdir'
      )
  targets = checkpoint.targets(jax.eval_shape(init, key), shardings)
  params, opt_state = checkpointer.restore(
    step, params=targets.params, opt_state=targets.opt_state
  )
  count = jax.device_put(np.int32(step), shardings.step)
  return TrainState(count, params, opt_state), step, meta['samples']


def evaluate(c, params, batches, tokens_per_byte):
  """The bound on held-out text, under noise that is the same every time.

  Args:
    c: StepConfig.
    params: parameter tree.
    batches: list of [B, L] int32.
    tokens_per_byte: of the held-out text, for bits per byte.

  Returns:
    loss in nats per token with its standard error over batches, bits per byte,
    and the nll of masked tokens by mask ratio.
  """
  objective = dataclasses.replace(c.objective, random_length_fraction=0.0)
  c = dataclasses.replace(c, objective=objective)
  keys = jax.random.split(jax.random.key(0), len(batches))
  sums = [
    _eval_step(c, params, tokens, key)
    for tokens, key in zip(batches, keys, strict=True)
  ]
  sums = jax.device_get(sums)
  total = jax.tree.map(lambda *x: np.sum(x, axis=0), *sums)
  means = [s['weighted_nll'] / s['num_tokens'] for s in sums]
  loss = float(total['weighted_nll'] / total['num_tokens'])
  return {
    'eval/loss_nats_per_token': loss,
    'eval/stderr_nats_per_token': float(np.std(means) / len(means) ** 0.5),
    'eval/bits_per_byte': loss * tokens_per_byte / float(np.log(2)),
    **by_ratio('eval', total),
  }


_eval_step = functools.partial(jax.jit, static_argnums=0)(step_lib.eval_step)


def by_ratio(prefix, sums):
  """Mean nll of the predicted tokens in each bucket of the mask ratio."""
  buckets = zip(sums['ratio_nll'], sums['ratio_count'], strict=True)
  return {
    f'{prefix}/nll_at_mask_ratio_{(i + 0.5) / step_lib.RATIO_BUCKETS:.1f}': (
      float(nll / count)
    )
    for i, (nll, count) in enumerate(buckets)
    if count > 0
  }


def train_row(fetched, plan, step, batch, length, step_s):
  """The metrics of a window of steps, by name."""
  total = jax.tree.map(lambda *x: np.sum(x, axis=0), *fetched)
  return {
    'train/loss_nats_per_token': float(
      total['weighted_nll'] / total['num_tokens']
    ),
    'train/grad_norm': float(max(f['grad_norm'] for f in fetched)),
    'train/param_norm': float(fetched[-1]['param_norm']),
    'train/learning_rate': float(plan(step - 1)),
    'train/masked_share': float(total['num_predicted'] / total['num_tokens']),
    'train/step_s': step_s,
    'train/tokens_per_s': batch * length / step_s,
    **by_ratio('train', total),
  }


def sample_texts(config, c, params, tokenizer):
  """Continues the configured prompts; returns texts with prompts."""
  if not config.sample.prompts:
    return []
  s = sampler_config(config)
  prompts = [tokenizer.encode(p) for p in config.sample.prompts]
  canvas, fill, valid = sampler.continue_prompts(
    prompts, config.sample.gen_length, config.tokens.pad_id
  )
  out = sampler.generate(
    c.model, s, params, canvas, fill, valid, seeds=range(len(prompts))
  )
  out = np.asarray(out)
  return [
    tokenizer.decode(row[ok]) for row, ok in zip(out, valid, strict=True)
  ]


def save_run_files(config, tokenizer, workdir):
  """Puts the config and the tokenizer beside the checkpoints."""
  with open(os.path.join(workdir, 'config.json'), 'w') as f:
    json.dump(checkpoint.config_json(config), f, indent=2)
  shutil.copyfile(tokenizer.path, os.path.join(workdir, 'tokenizer.model'))


def describe(config, c, shardings, mesh, directory, manifest):
  """The header of a run: config, parameters, devices, data."""
  shapes, axes = model_lib.shapes(c.model), model_lib.axes(c.model)
  rows = [('parameter', 'shape', 'axes', 'number')]
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
  for (path, leaf), axis_names in zip(leaves, names, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    rows.append((name, leaf.shape, ' '.join(axis_names), leaf.size))
  everything, inner = model_lib.num_params(c.model)
  rows.append(('total', '', '', everything))
  rows.append(('without vocabulary', '', '', inner))
  flat = config_lib.flatten(config)
  train = manifest.splits['train']
  sizes = ', '.join(f'{a}={mesh.shape[a]}' for a in mesh_lib.AXES)
  epochs = config.train.steps * config.train.batch * c.length / train.tokens
  return '\n'.join(
    [
      metrics.table([(k, repr(v)) for k, v in flat.items()]),
      '',
      metrics.table(rows),
      '',
      f'{mesh.size} x {mesh.devices.flat[0].device_kind}, {sizes}',
      f'data: {directory}: {train.tokens:,} tokens of '
      f'{train.text_bytes / train.tokens:.2f} bytes; this run reads '
      f'{epochs:.2f} epochs',
    ]
  )


def conclude(result, manifest):
  """Compares the last bound with the entropy of single tokens."""
  split = manifest.splits['heldout']
  to_bits = split.tokens / split.text_bytes / np.log(2)
  unigram = split.unigram_entropy_nats
  return (
    f'held-out bound   {result["eval/loss_nats_per_token"]:.4f} nats/token  '
    f'{result["eval/bits_per_byte"]:.4f} bits/byte\n'
    f'unigram entropy  {unigram:.4f} nats/token  '
    f'{unigram * to_bits:.4f} bits/byte'
  )
