"""Loads a trained model from a work directory or a Hugging Face folder."""

import contextlib
import dataclasses
import functools
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest, restore, weights
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.distributed import runtime
from maskdiff.errors import UserError, inline
from maskdiff.files.paths import local_path
from maskdiff.interop import (
  config_json,
  families,
  hf,
  hf_config,
  hf_tokenizer,
  mask_token,
  placement,
  start_checks,
)
from maskdiff.interop import leaves as leaves_lib
from maskdiff.model import lora, transformer
from maskdiff.model.network import Network
from maskdiff.model.trainable import join
from maskdiff.objectives.table import OBJECTIVES


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Model:
  """A loaded model: the results of `load`.

  Attributes:
    config: ConfigDict of the run.
    tokenizer: data.tokenizer.Tokenizer; None for a model without one.
    params: parameter tree, which dataclasses.replace can exchange.
    mesh: device mesh of the parameters.
  """

  config: ConfigDict
  tokenizer: Any
  params: Any
  mesh: jax.sharding.Mesh

  @property
  def network(self):
    """The model.network.Network, for sampling and scoring."""
    return network(self.config, self.params)

  @property
  def dtype(self):
    """Names of the parameters' dtypes, separated by commas."""
    names = {x.dtype.name for x in jax.tree.leaves(self.params)}
    return ', '.join(sorted(names))

  def __repr__(self):
    size = sum(x.size for x in jax.tree.leaves(self.params))
    tokenizer = self.tokenizer and self.tokenizer.path
    return (
      f'Model({self.config.objective.name}, {size:,} parameters, {self.dtype}, '
      f'tokenizer={tokenizer!r})'
    )


def load(workdir, tensor=1, dtype=None, ema=False, rope_scaling=None):
  """Loads the newest intact checkpoint of a run, for sampling and scoring.

  Args:
    workdir: work directory of launch/pretrain.py or launch/convert.py, or a
      Hugging Face folder.
    tensor: number of devices among which the heads and the mlp of every layer
      are split. The remaining devices shard the parameters and the rows.
    dtype: name of the parameters' dtype; default: as stored. Where
      config.model.dtype is bfloat16, bfloat16 parameters take half the memory
      and give the same products.
    ema: load the moving average of the weights (EMA) instead of the weights.
    rope_scaling: see config.scale_rows.

  Returns:
    - `config`: ConfigDict of the run.
    - `tokenizer`: the data.tokenizer.Tokenizer that the model was trained with.
    - `params`: parameter tree.
    - `mesh`: mesh of the parameters: the devices of this process if each
      process has room for a copy (placement.py), otherwise all devices, with
      one replica per slice.

  Raises:
    UserError: the run has no checkpoint or no moving average, or this version
      cannot read the checkpoint.
  """
  mesh_of = functools.partial(placement.mesh_of, tensor=tensor)
  if not config_json.is_published(workdir):
    config, params, identity = _load_workdir(workdir, mesh_of, dtype, ema)
    tokenizer = tokenizer_lib.load(workdir)
    _check_tokenizer(tokenizer, config, identity)
    tokenizer = tokenizer_lib.with_missing_ids(tokenizer, config.tokens)
    tokenizer = _without_lengths(tokenizer, config)
    config_lib.scale_rows(config, rope_scaling)
    return config, tokenizer, *placement.own_copy(params)
  if ema:
    raise weights.no_ema(workdir)
  published = hf.open_folder(workdir)
  tokenizer = hf_tokenizer.open_tokenizer(published)
  if tokenizer is None:
    raise UserError(
      f'{workdir} has no tokenizer: put tokenizer.json and '
      'tokenizer_config.json into it'
    )
  config, params = _load_published(published, mesh_of, dtype)
  hf_config.fill(config, published, tokenizer)
  tokenizer = _without_lengths(tokenizer, config)
  config_lib.scale_rows(config, rope_scaling)
  return config, tokenizer, *placement.own_copy(params)


def _without_lengths(tokenizer, config):
  """Returns a tokenizer that shows no token of config.data.length_tokens."""
  hidden = {i: b'' for _, i in config.data.length_tokens}
  return tokenizer_lib.with_pieces(tokenizer, hidden)


def load_params(path, mesh, dtype=None, ema=False):
  """Loads parameters onto a mesh. Each process reads its devices' slices.

  Args:
    path: work directory or Hugging Face folder.
    mesh: device mesh, or a function from the ConfigDict to it.
    dtype: name of the parameters' dtype; default: as stored.
    ema: load the moving average of the weights (EMA) instead of the weights.

  Returns:
    - `config`: ConfigDict of the run; for a Hugging Face folder, the config of
      a run with this model. Token ids that its config.json does not give are
      -1; see hf_config.fill.
    - `params`: parameter tree.

  Raises:
    UserError: the parameters are missing or damaged, or do not fit this version
      or the mesh; or the path has no moving average.
  """
  is_mesh = isinstance(mesh, jax.sharding.Mesh)  # which is callable too
  mesh_of = (lambda config: mesh) if is_mesh else mesh
  if config_json.is_published(path):
    if ema:
      raise weights.no_ema(path)
    return _load_published(hf.open_folder(path), mesh_of, dtype)
  return _load_workdir(path, mesh_of, dtype, ema)[:2]


def network(config, params):
  """Returns the Network of a run, for sampling and scoring.

  The attention kernel of the config is meant for training. Prompts have other
  lengths and may be sampled on other hardware, so the Network has
  attention='auto', unless the config says 'xla'.

  Args:
    config: ConfigDict of the run.
    params: parameter tree.

  Raises:
    UserError: the network needs a mask token, and the config has no id for it.
  """
  objective = OBJECTIVES[config.objective.name]
  if config.tokens.mask_id < 0 and objective.has_mask_token:
    raise UserError(
      'the id of the mask token is not known: add mask_token_id to '
      'config.json, or the tokenizer to the folder'
    )
  model = transformer.from_config(config)
  if model.attention != 'xla':
    model = dataclasses.replace(model, attention='auto')
  return Network(
    config=model,
    params=params,
    objective=config.objective.name,
    predict_mask=config.objective.predict_mask,
    mask_id=config.tokens.mask_id,
    bos_id=config.tokens.bos_id,
    eos_id=config.tokens.eos_id,
    context=config.data.length,
    block_length=config.objective.block_length * objective.by_blocks,
    clean_attention=config.objective.clean_attention,
    length_ids=tuple(i for _, i in config.data.length_tokens),
    window_length=config.objective.window_length * objective.windows,
    draft_length=model.drafter.length if objective.drafts else 0,
    window_attention=config.objective.window_attention,
  )


def warm_start(config, mesh):
  """Loads the initial parameters of a run from config.init_from.

  They are float32, or have the dtype config.lora.base_dtype if adapters are
  trained; the adapters are not included. A drafter is included if its weights
  have the shapes of the run's; a line says if another one is left out.

  An autoregressive network that becomes another kind gets a mask token: its
  embedding is the mean of the output embeddings, and config.model.vocab_size
  may be larger than that of the network to make room for it. A line says so,
  and another says if the output at a position changes its meaning.

  Args:
    config: ConfigDict of the new run.
    mesh: device mesh.

  Raises:
    UserError: the stored model has another architecture, or cannot be loaded;
      or only a drafter is trained, and the model is not autoregressive.
  """
  path = str(local_path(config.init_from))
  dtype = config.lora.base_dtype if config.lora.rank else 'float32'
  stored, params = load_params(path, mesh, dtype, config.init_from_ema)
  start_checks.check(path, stored, config)
  size, mask = config.model.vocab_size, config.tokens.mask_id
  adds = _adds_mask_token(path, stored, config)
  grows = (
    adds
    and size > stored.model.vocab_size
    and (size == mask_token.grown_rows(stored.model.vocab_size, mask))
  )
  for field in families.FIELDS:
    before, now = stored.model[field], config.model[field]
    if before != now and not (
      (grows and field == 'vocab_size')
      or (field == 'rope_scaling' and config_lib.extends(before, now))
    ):
      raise UserError(
        f'--config.init_from={path} has config.model.{field}={before!r}, not '
        f'{now!r}: set --config.model.{field}={before!r}, or take the whole '
        f'model with --config configs/published.py:{path}'
      )
  if adds:
    runtime.print_once(
      f'the mask token gets the id {mask} and the mean of the output '
      'embeddings'
      + f'; the vocabulary grows from {stored.model.vocab_size} to {size} ids'
      * grows
    )
    shardings = _shapes_and_shardings(config, mesh)[1]
    ends = {name: params[name] for name in ('embed', 'head') if name in params}
    initialize = jax.jit(
      functools.partial(mask_token.initialize, mask_id=mask, vocab_size=size),
      out_shardings={name: shardings[name] for name in ends},
    )
    params = {**params, **initialize(ends)}
  of = lambda c: transformer.shapes(transformer.from_config(c)).get('drafter')
  if of(stored) != of(config):
    params.pop('drafter', None)
    if of(stored) and of(config):
      runtime.print_once(
        f'the drafter of {path} has another kind or size; the run starts with '
        'a new one'
      )
  start_checks.report_shift(stored, config)
  return params


def _adds_mask_token(path, stored, config):
  """Returns whether a warm start adds a mask token to the network.

  It does if an autoregressive network becomes another kind, unless the network
  has this mask token: in its config.json, or in a byte-level tokenizer. The
  mask token of a SentencePiece model was no input of the network.

  Args:
    path: work directory or Hugging Face folder of the network.
    stored: ConfigDict of the network.
    config: ConfigDict of the new run.
  """
  before, now = (OBJECTIVES[c.objective.name] for c in (stored, config))
  if not now.has_mask_token or before.has_mask_token:
    return False
  named = set()
  if hf_tokenizer.has_tokenizer(path):
    tokenizer = tokenizer_lib.load(path)
    if hasattr(tokenizer.processor, 'token_to_id'):  # not SentencePiece
      named.add(tokenizer.mask_id)
  subfolder = '' if config_json.is_published(path) else hf.PUBLISHED
  if os.path.lexists(os.path.join(path, subfolder, config_json.CONFIG)):
    named.add(config_json.read_config(path, subfolder).get('mask_token_id'))
  return config.tokens.mask_id not in named


def _load_published(published, mesh_of, dtype):
  config = hf_config.weights_config(published)
  shardings = manifest.flat(_shapes_and_shardings(config, mesh_of(config))[1])
  return config, leaves_lib.place(published.leaves, shardings, dtype)


def _load_workdir(path, mesh_of, dtype, ema):
  """Returns config, parameters and identity of a work directory.

  The identity is that of the stage of the checkpoint, {} for a conversion.
  """
  params_dir = os.path.join(path, leaves_lib.PARAMS)
  if not os.path.isdir(params_dir):
    return _load_checkpoint(path, mesh_of, dtype, ema)
  if ema:
    raise weights.no_ema(path)
  leaves, meta = leaves_lib.open_folder(params_dir)
  config = config_lib.from_dict(meta.config)
  hf.check_leaves(leaves, config.model, params_dir)
  shardings = manifest.flat(_shapes_and_shardings(config, mesh_of(config))[1])
  params = leaves_lib.place(leaves, shardings, dtype, meta.leaves, params_dir)
  return config, params, {}


def _check_tokenizer(tokenizer, config, identity):
  """Raises UserError if a tokenizer is not the one of the training."""
  problem = None
  known = (identity or {}).get('tokenizer')  # fingerprints of pretraining
  if tokenizer.vocab_size > config.model.vocab_size:
    problem = (
      f'has {tokenizer.vocab_size} ids, but the model has '
      f'{config.model.vocab_size}'
    )
  elif isinstance(known, list) and known:
    if tokenizer.fingerprint not in known:
      problem = 'is not the file that the model was trained with'
  if problem:
    raise UserError(
      f'{inline(tokenizer.path)} {problem}: replace it by the tokenizer of the '
      'run'
    )


def _load_checkpoint(workdir, mesh_of, dtype, ema):
  """Returns what `_load_workdir` does; adapters are merged into the base."""
  mesh = None

  def targets_of(step, meta):
    nonlocal mesh
    config = config_lib.from_dict(meta.config)
    mesh = mesh_of(config)
    params = restore.targets(*_shapes_and_shardings(config, mesh))
    replicated, source = mesh_lib.replicated(mesh), f'step {step} of {workdir}'
    return weights.targets(meta.leaves, params, ema, replicated, source)

  with contextlib.closing(restore.open_run(workdir)) as checkpointer:
    _, meta, (tree,) = restore.newest(checkpointer, targets_of)
  params = weights.restored(tree, ema)
  config = config_lib.from_dict(meta.config)
  adapters = lora.trained(params) if config.lora.rank else None
  params = lora.base(params)
  if dtype is not None:
    params = leaves_lib.cast(params, dtype)
  if adapters:
    params = _merge(config, params, adapters, mesh)
  return config, params, meta.identity


def _merge(config, params, adapters, mesh):
  """Returns parameters with merged adapters; sets config.lora.rank to 0."""
  c = transformer.from_config(config).lora
  config.lora.rank = 0
  merge = jax.jit(
    lambda params, adapters: lora.merge(c, join(params, adapters)),
    out_shardings=_shapes_and_shardings(config, mesh)[1],
    donate_argnums=0,
  )
  return merge(params, adapters)


def _shapes_and_shardings(config, mesh):
  """Returns the trees of shapes and of shardings of a config's parameters."""
  c = transformer.from_config(config)
  shapes = transformer.shapes(c)
  return shapes, mesh_lib.param_shardings(mesh, transformer.axes(c), shapes)
