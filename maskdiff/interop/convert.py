"""Converts Hugging Face folders to work directories and back; compares logits.

A converted work directory has these files:

    config.json   config of a run, so that scripts accept the directory
    params/       the parameters, see leaves.py
    published/    config.json and the other small files of the source folder
    tokenizer.json and the files that belong to it, or tokenizer.model

A conversion writes to a temporary directory and renames it at the end, so that
an interrupted conversion leaves no incomplete result.
"""

import contextlib
import json
import math
import os

import jax
import numpy as np

from maskdiff.checkpoints import manifest
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.data import tokenizer_files
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError, inline
from maskdiff.files import atomic, new_folder
from maskdiff.interop import (
  config_export,
  config_json,
  families,
  hf,
  hf_config,
  hf_tokenizer,
  load,
  mask_token,
  permissions,
  reference,
  run_leaves,
  safetensors,
  sentencepiece_json,
)
from maskdiff.interop import leaves as leaves_lib
from maskdiff.model import masks, transformer
from maskdiff.model.transformer import TransformerConfig
from maskdiff.objectives.table import OBJECTIVES

# Largest difference of a logit, relative to the largest logit. Rounding errors
# of float32 over many layers stay below it.
TOLERANCE = 1e-4
CHECK_LENGTH = 24  # tokens


def from_hf(folder, workdir, dtype=None, mask_id=None, with_tokenizer=True):
  """Converts a Hugging Face folder to a work directory.

  Args:
    folder: Hugging Face folder.
    workdir: directory to create.
    dtype: name of the dtype to store; default: the dtype of the folder.
    mask_id: id of the mask token, for a network that was trained without one;
      default: an id that no text uses.
    with_tokenizer: whether to convert the tokenizer.

  Returns:
    list of lines to print.

  Raises:
    UserError: the folder cannot be opened, see hf.open_folder; or workdir
      exists and is not empty.
  """
  published = hf.open_folder(folder)
  notes = list(published.notes)
  tokenizer = None
  if with_tokenizer:
    tokenizer = hf_tokenizer.open_tokenizer(published, mask_id)
    if tokenizer is None:
      notes.append(
        f'{inline(folder)} has no tokenizer: converted the weights only'
      )
  config = hf_config.run_config(published, tokenizer, mask_id)
  with new_folder.new_folder(workdir) as new:
    with safetensors.writing(new):
      params = os.path.join(new, leaves_lib.PARAMS)
      os.mkdir(params)
      with open(os.path.join(new, 'config.json'), 'w') as f:
        json.dump(manifest.config_json(config), f, indent=2)
    hf.copy_published_files(folder, os.path.join(new, hf.PUBLISHED))
    if tokenizer is not None:
      permissions.copy_tokenizer(tokenizer, new)
    leaves_lib.write(
      params,
      published.leaves,
      manifest.Meta(config=manifest.config_json(config)),
      dtype,
    )
    permissions.narrow(
      params, {tensor.path for tensor in published.tensors.values()}
    )
  leaves = published.leaves.values()
  num_params = sum(math.prod(leaf.shape) for leaf in leaves)
  num_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
  ids = dict(config.tokens)
  if config.sample.eot_id >= 0:
    ids['eot_id'] = config.sample.eot_id
  ids = ', '.join(f'{k}={v}' for k, v in ids.items())
  return [
    *notes,
    f'{inline(workdir)}: {num_params:,} parameters, {num_bytes / 1e9:.2f} GB '
    f'as published, {published.family.name}, {config.objective.name}, {ids}',
  ]


def to_hf(workdir, folder, dtype=None, family=None, max_bytes=None, ema=False):
  """Writes the model of a work directory as a Hugging Face folder.

  Args:
    workdir: work directory of a run, or one that `from_hf` made.
    folder: directory to create.
    dtype: name of the dtype to write; default: the dtype of the parameters.
    family: name of the family to write; default: the family of the source
      folder, or the first family that fits.
    max_bytes: most bytes of data per file of weights; default:
      hf.MAX_SHARD_BYTES.
    ema: write the moving average of the weights (EMA) instead of the weights.

  Returns:
    list of lines to print.

  Raises:
    UserError: the model does not fit the family, or any family; the work
      directory has no intact checkpoint, or no moving average; or the folder
      exists and is not empty.
  """
  with contextlib.ExitStack() as stack:
    config, leaves, source = run_leaves.open_workdir(workdir, stack, ema, dtype)
    published_files = os.path.join(workdir, hf.PUBLISHED)
    original = source_family = note = None
    if os.path.lexists(os.path.join(published_files, config_json.CONFIG)):
      original = config_json.read_config(workdir, hf.PUBLISHED)
    chosen = choose_family(config, original, family)
    if original is not None:
      source_family = config_json.detect(original, published_files)
      original = original if source_family == chosen else None
    stored = dtype or leaves['embed'].dtype.name
    written = config_export.published_config(
      chosen,
      config.model,
      config.tokens,
      config.data.length,
      stored,
      original,
      _block_length(config),
    )
    for key, value in hf_config.own_keys(config, chosen).items():
      written.pop(key, None)  # of the source folder
      if value is not None:
        written[key] = value
    with new_folder.new_folder(folder) as new:
      tokenizer = None
      if hf_tokenizer.has_tokenizer(workdir):
        tokenizer = tokenizer_lib.load(workdir)
      if os.path.isdir(published_files):
        leave_out = hf_tokenizer.TOKENIZERS if tokenizer else ()
        hf.copy_published_files(workdir, new, leave_out, hf.PUBLISHED)
      hf.copy_chat_files(workdir, new)
      if written != original:
        path = os.path.join(new, config_json.CONFIG)
        with safetensors.writing(path):
          atomic.write(path, as_text(written))
      if tokenizer:
        permissions.copy_tokenizer(tokenizer, new)
        if os.path.exists(os.path.join(new, tokenizer_files.MODEL)):
          sentencepiece_json.write(new, tokenizer, config.data.length)
        # The tokenizer of a network that had a mask token stays as it is.
        if not (source_family and source_family.has_mask_token):
          note = mask_token.extend_tokenizer(new, tokenizer, config)
      hf.write_weights(new, chosen, leaves, dtype, max_bytes)
      permissions.narrow(new, leaves_lib.files(workdir, leaves))
  architecture = chosen.architectures[0]
  lines = [f'{inline(folder)}: {architecture} from {inline(source)}, {stored}']
  if note:
    lines.append(note)
  if config.objective.name != chosen.objective:
    lines.append(
      f'note: the model was trained with {config.objective.name}, but code '
      f'that loads {architecture} applies {chosen.objective} attention'
    )
  return lines


def choose_family(config, original, name):
  """Returns the Family to write a model as.

  Args:
    config: ConfigDict of the run.
    original: config.json of the folder that the model came from, or None.
    name: name of the family to write, or None for the first that fits.

  Raises:
    UserError: the model does not fit the named family, or any family.
  """
  model, o = config.model, config.objective
  if name is not None:
    family = families.BY_NAME[name]
    if reason := config_export.misfit(family, model):
      raise UserError(f'--family {name} does not support {reason}')
    return family
  ordered = families.FAMILIES
  if original:
    ordered = (config_json.detect(original, config_json.CONFIG), *ordered)
  reasons = {}
  for family in ordered:
    reason = config_export.misfit(family, model)
    if reason is None and family.objective != o.name:
      reason = f'config.objective.name={o.name!r}'
    windows = OBJECTIVES[family.objective].windows
    if reason is None and windows and o.window_attention == 'causal':
      reason = "config.objective.window_attention='causal'"
    if reason is None and o.clean_attention == 'causal':
      # Published networks see whole blocks in the blocks before.
      reason = "config.objective.clean_attention='causal'"
    if reason is None and family.predict_next != model.predict_next:
      reason = f'config.model.predict_next={model.predict_next}'
    if reason is None:
      return family
    reasons[family.name] = reason
  raise UserError(
    'no published architecture fits: '
    + '; '.join(f'{n} does not fit {reason}' for n, reason in reasons.items())
    + '; set --family to write the weights as an architecture with another '
    'objective'
  )


def _block_length(config):
  """Returns the block length, or window length, for a config.json."""
  o = config.objective
  if OBJECTIVES[o.name].windows:
    return o.window_length
  return reference.attention_block(o.name, o.block_length, config.data.length)


def check(folder, workdir=None, ema=False):
  """Compares this package's logits with logits of reference.py.

  Args:
    folder: Hugging Face folder. reference.py computes its logits.
    workdir: work directory with the parameters for this package's logits;
      default: the folder.
    ema: take the moving average of the weights of the work directory.

  Returns:
    list of lines to print: one per tensor, and the largest difference of a
    logit.

  Raises:
    UserError: a difference exceeds TOLERANCE x the largest logit, or TOLERANCE
      if that is below 1; or the two have different models.
  """
  published = hf.open_folder(folder)
  tokens = check_tokens(published)
  mesh = mesh_lib.make_mesh()
  # Adapters are merged in the dtype of the folder.
  exact = published.leaves['embed'].dtype == np.float32
  dtype = 'float32' if exact else None
  config, params = load.load_params(workdir or folder, mesh, dtype, ema)
  params.pop('drafter', None)
  block_length = reference.attention_block(
    published.family.objective, published.model['block_length'], len(tokens)
  )
  config.model.update(
    dtype='float32', remat='none', attention='xla', quantization='none'
  )
  if workdir is not None:
    _check_same_model(published, config, workdir)
  found = np.asarray(logits(config, params, mesh, tokens, block_length))
  expected = reference.logits(published, tokens)
  if config.model.predict_next:
    expected = np.concatenate([expected[:1], expected[:-1]])
  largest = float(np.abs(expected).max())
  difference = float(np.abs(found - expected).max())
  lines = [
    f'{inline(name)}  {list(tensor.shape)}  {tensor.dtype.name}'
    for name, tensor in published.tensors.items()
  ]
  lines.append(
    f'largest difference of a logit: {difference:.3g}; largest logit: '
    f'{largest:.3g}; over {len(tokens)} tokens'
  )
  if not difference <= TOLERANCE * max(1.0, largest):
    raise UserError(
      f'{inline(workdir or folder)} differs from {inline(folder)}: the largest '
      f'difference of a logit is {difference:.3g}, the largest logit '
      f'{largest:.3g}; convert again'
    )
  return lines


def check_tokens(published):
  """Returns the tokens for `check`, drawn at random with a fixed seed.

  Every third token is the mask token, if config.json has one.

  Args:
    published: hf.Published.

  Returns:
    [CHECK_LENGTH] int32.
  """
  random = np.random.default_rng(0)
  size = published.model['vocab_size']
  tokens = random.integers(0, size, CHECK_LENGTH).astype(np.int32)
  mask = published.config.get('mask_token_id')
  if mask is not None:
    tokens[::3] = mask
  return tokens


def _check_same_model(published, config, workdir):
  """Raises a UserError if a folder and a config have different models."""
  of_run = config_export.exported(config.model)
  values = {
    f'model.{field}': (published.model[field], of_run[field])
    for field in families.FIELDS
  }
  if published.family.objective == config.objective.name and (
    block_length := published.model['block_length']
  ):
    key = 'window' if OBJECTIVES[config.objective.name].windows else 'block'
    values[f'objective.{key}_length'] = (
      block_length,
      config.objective[f'{key}_length'],
    )
  for key, (expected, found) in values.items():
    if found != expected:
      raise UserError(
        f'{workdir} has config.{key}={found!r}, but {published.folder} has '
        f'{expected!r}: they must have the same model'
      )


def as_text(config):
  """Returns a config.json as text, formatted as transformers does."""
  return json.dumps(dict(sorted(config.items())), indent=2) + '\n'


def logits(config, params, mesh, tokens, block_length):
  """Returns this package's logits of a row, [L, V] float32.

  Args:
    config: ConfigDict.
    params: parameter tree.
    mesh: mesh of the parameters.
    tokens: [L] int.
    block_length: tokens of a block, which see each other and all blocks before
      their own: 1 for causal attention, L for bidirectional attention.
  """
  model_config = TransformerConfig(**config.model)

  @jax.jit
  def compute(params, tokens):
    network = transformer.bind(model_config, params)
    hidden = network(tokens, masks.block_causal(tokens >= 0, block_length))
    return network.logits(hidden)[0]

  with jax.set_mesh(mesh), jax.default_matmul_precision('highest'):
    return compute(params, tokens[None])
