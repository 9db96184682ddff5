"""What a config and a work directory stand for.

Between the outside (ConfigDicts, paths, files of a run) and the library (frozen
configs, arrays): each function opens one thing, checks that it fits the
others, and says in one line what is wrong if it does not.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys

import jax

from maskdiff import checkpoint, manifest, metrics, runtime
from maskdiff import config as config_lib
from maskdiff import mesh as mesh_lib
from maskdiff import model as model_lib
from maskdiff.data import pipeline, prepare, records
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError
from maskdiff.guard import GuardConfig
from maskdiff.interop import families, hf
from maskdiff.interop import leaves as leaves_lib
from maskdiff.looks import LikelihoodConfig
from maskdiff.model import TransformerConfig
from maskdiff.objective import ObjectiveConfig
from maskdiff.request import SamplerConfig
from maskdiff.schedule import Schedule
from maskdiff.step import StepConfig

READ_THREADS = 2


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
      attend_within=o.attend_within,
      predict_mask=o.predict_mask,
      mask_id=config.tokens.mask_id,
      bos_id=config.tokens.bos_id,
      eos_id=config.tokens.eos_id,
      loss_chunk_tokens=o.loss_chunk_tokens,
    ),
    length=config.data.length,
    microbatches=config.train.microbatches,
    guard=GuardConfig(config.guard.spike_sigmas),
  )


def sampler_config(config):
  """The frozen config of the sampler; autoregressive models go one by one."""
  s, causal = config.sample, config.objective.name == 'autoregressive'
  return SamplerConfig(
    steps=s.gen_length if causal else s.steps,
    block_length=1 if causal else s.block_length,
    temperature=s.temperature,
    remasking=s.remasking,
    objective=config.objective.name,
    predict_mask=config.objective.predict_mask,
    mask_id=config.tokens.mask_id,
    bos_id=config.tokens.bos_id,
    gen_length=s.gen_length,
    eos_id=config.tokens.eos_id,
    eot_id=s.eot_id,
    schedule=s.schedule,
    confidence=s.confidence,
    threshold=s.threshold,
    factor=s.factor,
    top_k=s.top_k,
    top_p=s.top_p,
    guidance=s.guidance,
    stop_at_eos=s.stop_at_eos,
    logits_eos_inf=s.logits_eos_inf,
    confidence_eos_eot_inf=s.confidence_eos_eot_inf,
    cache=s.cache,
    refresh=s.refresh,
    lookahead=s.lookahead,
  )


def likelihood_config(config, guidance, tokens_per_call):
  """The frozen config of likelihoods; see looks.LikelihoodConfig."""
  return LikelihoodConfig(
    objective=config.objective.name,
    context=config.data.length,
    guidance=guidance,
    predict_mask=config.objective.predict_mask,
    mask_id=config.tokens.mask_id,
    bos_id=config.tokens.bos_id,
    tokens_per_call=tokens_per_call,
    loss_chunk_tokens=config.objective.loss_chunk_tokens,
  )


def sampler_model(config):
  """The TransformerConfig that samples and scores.

  A kernel that the config insists on is for training: prompts are few and of
  any length, and may be answered on another kind of machine.
  """
  model = step_config(config).model
  if model.attention == 'xla':
    return model
  return dataclasses.replace(model, attention='auto')


def open_tokenizer(config):
  """Loads the tokenizer and checks it against the config.

  Raises:
    UserError: an id or the vocabulary size differs.
  """
  tokenizer = _with_ids(config, tokenizer_lib.load(config.data.tokenizer))
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
      f'config.model.vocab_size={config.model.vocab_size}; set '
      f'--config.model.vocab_size={tokenizer.vocab_size}'
    )
  return tokenizer


def _with_ids(config, tokenizer):
  """The tokenizer with ids that it does not have itself from the config."""
  absent = {
    name: value
    for name, value in config.tokens.items()
    if getattr(tokenizer, name) is None
  }
  return tokenizer_lib.with_ids(tokenizer, **absent)


def open_data(config, tokenizer, path=None):
  """The datasets of a path of the config, after a check of every shard.

  The embedded corpus is prepared on first use, by process 0 for all hosts
  that share its directory.

  Args:
    config: the config.
    tokenizer: data.tokenizer.Tokenizer.
    path: as config.data.path, which is the default.

  Returns:
    List of data.pipeline.Dataset.

  Raises:
    UserError: a directory or shard is missing or damaged, or was prepared with
      another tokenizer.
  """
  datasets = []
  for name, weight in pipeline.parse_mixture(path or config.data.path):
    directory = name
    if name == 'embedded':
      directory = runtime.main_process_first(
        functools.partial(
          prepare.embedded,
          tokenizer,
          config.data.cache_dir,
          config.data.length,
          say,
        )
      )
    manifest = records.read_manifest(directory)
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
      raise UserError(
        f'{directory} was prepared with tokenizer '
        f'{manifest.tokenizer_fingerprint}, but {config.data.tokenizer} is '
        f'{tokenizer.fingerprint}; set config.data.tokenizer to the one it was '
        f'prepared with, a copy of which is in {directory}'
      )
    if manifest.eos_id != tokenizer.eos_id:
      raise UserError(
        f'the documents of {directory} end with the eos id {manifest.eos_id}, '
        f'but config.tokens.eos_id={tokenizer.eos_id}: use the copy of the '
        f'tokenizer that is in {directory}'
      )
    # A run that puts up with damaged rows must be able to start with them.
    check = 'none' if config.data.max_damaged_rows else 'sample'
    records.verify(
      directory,
      manifest,
      rows='all' if config.data.verify == 'all' else check,
      share=(jax.process_index(), jax.process_count()),
    )
    datasets.append(pipeline.Dataset(name, str(directory), weight, manifest))
  return datasets


def say(text, file=None):
  """Prints a line, by default on standard error, once for all hosts."""
  if jax.process_index() == 0:
    print(text, file=file or sys.stderr, flush=True)


@contextlib.contextmanager
def memory_advice(config):
  """Turns want of device memory into a UserError that says what to change."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    first = ' '.join(str(error).split())[:200]
    remat = config.model.remat
    full = f', set --config.model.remat={remat} to full,'
    raise UserError(
      f'a device has too little memory ({first}): raise '
      f'--config.train.microbatches={config.train.microbatches}'
      f'{full if remat != "full" else ""} or lower '
      '--config.objective.loss_chunk_tokens='
      f'{config.objective.loss_chunk_tokens}; for a TPU, launch/plan.py '
      '--sweep finds what fits'
    ) from error


def train_batches(config, datasets, mesh, start_sample):
  """Iterator of [B, L] int32 batches on the mesh, without end.

  Args:
    config: the config.
    datasets: from `open_data`.
    mesh: device mesh.
    start_sample: samples consumed so far.

  Raises:
    UserError: the length does not fit the prepared rows.
  """
  sharding = mesh_lib.batch_sharding(mesh)
  shape = (config.train.batch, config.data.length)
  batches = pipeline.train_batches(
    datasets,
    global_batch=config.train.batch,
    length=config.data.length,
    seed=config.seed,
    start_sample=start_sample,
    rows=pipeline.host_rows(sharding, shape),
    num_threads=READ_THREADS,
    max_damaged_rows=config.data.max_damaged_rows,
    skip=config.data.skip_samples,
  )
  return pipeline.to_device(batches, sharding, shape)


def read_samples(config, datasets, first, end):
  """The samples of a range, [end - first, L] int32, on the host.

  Args:
    config: the config.
    datasets: from `open_data`.
    first: number of the first sample.
    end: number of the one after the last.
  """
  batches = pipeline.train_batches(
    datasets,
    global_batch=end - first,
    length=config.data.length,
    seed=config.seed,
    start_sample=first,
    rows=range(end - first),
    num_threads=0,
    max_damaged_rows=config.data.max_damaged_rows,
  )
  return next(batches)


def heldout_batches(config, dataset, mesh):
  """Iterator of the batches of an evaluation, the same every time.

  Args:
    config: the config.
    dataset: one of `open_data`.
    mesh: device mesh.

  Raises:
    UserError: there is less held-out text than asked for.
  """
  sharding = mesh_lib.batch_sharding(mesh)
  shape = (config.eval.batch, config.data.length)
  batches = pipeline.heldout_batches(
    dataset,
    batch=config.eval.batch,
    length=config.data.length,
    num_batches=config.eval.batches,
    rows=pipeline.host_rows(sharding, shape),
    num_threads=READ_THREADS,
  )
  return pipeline.to_device(batches, sharding, shape)


def load(workdir, tensor=1, dtype=None):
  """Loads the newest whole checkpoint of a run, to use the model.

  Args:
    workdir: directory given to `train.run`, or made by launch/convert.py; or a
      published folder in Hugging Face's form.
    tensor: devices that share every layer, its heads and mlp; the others split
      the parameters and the rows.
    dtype: of the parameters, by default as stored. Where config.model.dtype is
      bfloat16, they may as well be: half the memory, the same products.

  Returns:
    - `config`: ConfigDict of the run.
    - `tokenizer`: data.tokenizer.Tokenizer, the one it was trained with.
    - `params`: parameter tree, split over all devices of a slice, as stored.
    - `mesh`: the mesh it lies on, with a replica for every slice.

  Raises:
    UserError: there is no checkpoint, or it does not fit this version.
  """
  slices = mesh_lib.split_by_slice(jax.devices())
  mesh = mesh_lib.make_mesh(replica=len(slices), tensor=tensor)
  if not families.is_published(workdir):
    config, params = load_params(workdir, mesh, dtype)
    return config, _with_ids(config, tokenizer_lib.load(workdir)), params, mesh
  published = hf.open_folder(workdir)
  tokenizer = hf.open_tokenizer(published)
  if tokenizer is None:
    raise UserError(
      f'{workdir} has no tokenizer: put tokenizer.json and '
      'tokenizer_config.json into it'
    )
  config, params = _load_published(published, mesh, dtype)
  hf.fill(config, published, tokenizer)
  return config, tokenizer, params, mesh


def load_params(path, mesh, dtype=None):
  """Loads parameters onto a mesh, each process what its devices hold.

  Args:
    path: as for `load`.
    mesh: device mesh.
    dtype: of the parameters, by default as stored.

  Returns:
    - `config`: ConfigDict of the run, or of a run with this model.
    - `params`: parameter tree.

  Raises:
    UserError: there is nothing to load; or it is damaged or does not fit this
      version or the mesh.
  """
  if families.is_published(path):
    return _load_published(hf.open_folder(path), mesh, dtype)
  params_dir = os.path.join(path, leaves_lib.PARAMS)
  if not os.path.isdir(params_dir):
    return _load_checkpoint(path, mesh, dtype)
  leaves, meta = leaves_lib.open_folder(params_dir)
  config = config_lib.from_dict(meta['config'])
  shardings = manifest.flat(_shardings(config, mesh)[1])
  return config, leaves_lib.place(
    leaves, shardings, dtype, meta['leaves'], params_dir
  )


def _load_published(published, mesh, dtype):
  config = hf.run_config(published, None)
  shardings = manifest.flat(_shardings(config, mesh)[1])
  return config, leaves_lib.place(published.leaves, shardings, dtype)


def _load_checkpoint(workdir, mesh, dtype):
  def targets_of(step, meta):
    config = config_lib.from_dict(meta['config'])
    return {'params': checkpoint.targets(*_shardings(config, mesh))}

  with contextlib.closing(checkpoint.open_run(workdir)) as checkpointer:
    _, meta, (params,) = checkpoint.restore_newest(checkpointer, targets_of)
  if dtype is not None:
    params = leaves_lib.cast(params, dtype)
  return config_lib.from_dict(meta['config']), params


def _shardings(config, mesh):
  """Shapes of a config's parameters and where they lie, two trees."""
  c = step_config(config).model
  shapes = model_lib.shapes(c)
  return shapes, mesh_lib.param_shardings(mesh, model_lib.axes(c), shapes)


def warm_start(config, mesh):
  """The parameters that a run begins with, of config.init_from, in float32.

  Args:
    config: the config.
    mesh: device mesh.

  Raises:
    UserError: they are of another model.
  """
  path = config.init_from
  theirs, params = load_params(path, mesh, 'float32')
  for field in families.FIELDS:
    if theirs.model[field] != config.model[field]:
      raise UserError(
        f'--config.init_from={path} has config.model.{field}='
        f'{theirs.model[field]!r}, not {config.model[field]!r}: set '
        f'--config.model.{field}={theirs.model[field]!r}, or take the whole '
        f'model with --config configs/published.py:{path}'
      )
  return params


def carry(config, workdir):
  """Puts the small files of a published folder that a run begins with, or that
  came with it, into the run's own directory, for an export."""
  source = config.init_from
  if source and not families.is_published(source):
    source = os.path.join(source, hf.PUBLISHED)
  if source and os.path.isdir(source):
    hf.carry(source, os.path.join(workdir, hf.PUBLISHED))


def own_directory(workdir):
  """The directory, or None if it is a published folder: nothing is written
  there."""
  return None if families.is_published(workdir) else workdir


def make_workdir(workdir):
  """Makes the work directory.

  Raises:
    UserError: that cannot be, or it is not a local path.
  """
  if '://' in workdir:
    raise UserError(
      f'--workdir {workdir}: only paths of this machine are supported; mount a '
      'bucket and give the mount point'
    )
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as error:
    raise UserError(f'--workdir: cannot make {workdir!r} ({error})') from error


def save_run_files(config, tokenizer, header, workdir):
  """Puts config, header and tokenizer beside the checkpoints."""
  with open(os.path.join(workdir, 'header.txt'), 'w') as f:
    f.write(header + '\n')
  with open(os.path.join(workdir, 'config.json'), 'w') as f:
    json.dump(checkpoint.config_json(config), f, indent=2)
  tokenizer_lib.copy(tokenizer, workdir)
  carry(config, workdir)


def describe(config, c, mesh, datasets):
  """The header of a run as text: config, parameters, devices, data.

  Args:
    config: the config, and c its StepConfig.
    mesh: device mesh.
    datasets: from `open_data`.
  """
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
  processes = jax.process_count()
  sizes = ', '.join(f'{a}={mesh.shape[a]}' for a in mesh_lib.AXES)
  weights = sum(d.weight for d in datasets)
  data = []
  for d in datasets:
    train, share = d.manifest.splits['train'], d.weight / weights
    tokens = config.train.steps * config.train.batch * c.length * share
    data.append(
      f'data: {d.manifest.source}, {d.directory}: an epoch has '
      f'{train.tokens:,} tokens of {train.text_bytes / train.tokens:.2f} bytes '
      f'in {len(train.shards)} shards; this run reads '
      f'{tokens / train.tokens:.2f} epochs'
      + (f', {share:.2%} of its tokens' if len(datasets) > 1 else '')
    )
  return '\n'.join(
    [
      metrics.table([(k, repr(v)) for k, v in flat.items()]),
      '',
      metrics.table(rows),
      '',
      f'{mesh.size} x {mesh.devices.flat[0].device_kind}, {sizes}'
      + (f', {processes} processes' if processes > 1 else ''),
      *data,
    ]
  )
