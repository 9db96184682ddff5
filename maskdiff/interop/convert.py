"""Whole conversions: a published folder to a work directory, and back.

A converted work directory holds

    config.json   of a run, so that scripts take the directory for one
    params/       the parameters, see leaves.py
    published/    config.json and all other small files of the folder it is from
    tokenizer.json and the files beside it, or tokenizer.model

Everything is written beside the place it belongs to and moved there at the end:
what has the right name is whole.
"""

import contextlib
import functools
import json
import os
import secrets
import shutil

import jax
import numpy as np

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest, restore
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import families, hf, load, reference, safetensors
from maskdiff.interop import leaves as leaves_lib
from maskdiff.interop.leaves import Leaf
from maskdiff.model import masks, transformer
from maskdiff.model.transformer import TransformerConfig
from maskdiff.objectives.table import OBJECTIVES

# Of the largest logit: what float32 leaves of a sum over many layers.
TOLERANCE = 1e-4
CHECK_LENGTH = 24


def from_hf(folder, workdir, dtype=None, mask_id=None, with_tokenizer=True):
  """Converts a published folder to a work directory.

  Args:
    folder: in Hugging Face's form.
    workdir: that is not there yet.
    dtype: name of the dtype to store, by default that of the folder.
    mask_id: of a network that never had a mask; by default one that no text
      uses.
    with_tokenizer: False leaves it out.

  Returns:
    Lines to print.

  Raises:
    UserError: see hf.open_folder; or the directory is there.
  """
  published = hf.open_folder(folder)
  notes = list(published.notes)
  tokenizer = None
  if with_tokenizer:
    tokenizer = hf.open_tokenizer(published, mask_id)
    if tokenizer is None:
      notes.append(f'{folder} has no tokenizer: only weights are converted')
  config = hf.run_config(published, tokenizer)
  if mask_id is not None:
    config.tokens.mask_id = mask_id
    config_lib.validate(config)
  with new_directory(workdir) as new:
    with safetensors.writing(new):
      params = os.path.join(new, leaves_lib.PARAMS)
      os.mkdir(params)
      with open(os.path.join(new, 'config.json'), 'w') as f:
        json.dump(manifest.config_json(config), f, indent=2)
    hf.copy_published_files(folder, os.path.join(new, hf.PUBLISHED))
    if tokenizer is not None:
      tokenizer_lib.copy(tokenizer, new)
    leaves_lib.write(
      params,
      published.leaves,
      manifest.Meta(config=manifest.config_json(config)),
      dtype,
    )
  number, size = 0, 0
  for leaf in published.leaves.values():
    number += int(np.prod(leaf.shape, dtype=np.int64))
    size += leaf.dtype.itemsize * int(np.prod(leaf.shape, dtype=np.int64))
  ids = ', '.join(f'{k}={v}' for k, v in config.tokens.items())
  return [
    *notes,
    f'{workdir}: {number:,} parameters, {size / 1e9:.2f} GB as published, '
    f'{published.family.name}, {config.objective.name}, {ids}',
  ]


def to_hf(workdir, folder, dtype=None, family=None, max_bytes=None):
  """Writes the model of a work directory as a published folder.

  Args:
    workdir: of a run, or one that `from_hf` made.
    folder: that is not there yet.
    dtype: name of the dtype to write, by default that of the parameters.
    family: name of the family to write, by default the one it came from, or
      else the first that fits.
    max_bytes: of a file of weights.

  Returns:
    Lines to print.

  Raises:
    UserError: the model fits no family, or not that one; there is no whole
      checkpoint; or the folder is there.
  """
  with contextlib.ExitStack() as stack:
    config, leaves, described = _open_workdir(workdir, stack)
    beside = os.path.join(workdir, hf.PUBLISHED)
    original = None
    if os.path.exists(os.path.join(beside, families.CONFIG)):
      original = families.read_config(beside)
    chosen = choose_family(config, original, family)
    if original is not None:
      came_from = families.detect(original, beside)
      original = original if came_from == chosen else None
    stored = dtype or leaves['embed'].dtype.name
    written = families.published_config(
      chosen, config.model, config.tokens, config.data.length, stored, original
    )
    with new_directory(folder) as new:
      tokenizer = _tokenizer_of(workdir)
      if os.path.isdir(beside):
        hf.copy_published_files(beside, new, hf.TOKENIZERS if tokenizer else ())
      if written != original:
        path = os.path.join(new, families.CONFIG)
        with safetensors.writing(path), open(path, 'w') as f:
          f.write(as_text(written))
      if tokenizer:
        tokenizer_lib.copy(tokenizer, new)
      hf.write_weights(new, chosen, leaves, dtype, max_bytes)
  lines = [
    f'{folder}: {chosen.architectures[0]} from {described}, {stored}',
  ]
  if config.objective.name != chosen.objective:
    lines.append(
      f'note: trained for {config.objective.name}; the published '
      f'{chosen.architectures[0]} is {chosen.objective}, and loaders that are '
      'not told attend accordingly'
    )
  return lines


def choose_family(config, original, name):
  """The Family to write a model as.

  Args:
    config: ConfigDict of the run.
    original: config.json of the folder that it came from, or None.
    name: of the one that is wanted, or None.

  Raises:
    UserError: it does not fit; or none does.
  """
  model = config.model
  if name is not None:
    family = families.BY_NAME[name]
    if reason := families.misfit(family, model):
      raise UserError(f'--family {name} has no place for {reason}')
    return family
  came_from = original and families.detect(original, families.CONFIG)
  ordered = [came_from, *families.FAMILIES] if came_from else families.FAMILIES
  reasons = {}
  for family in ordered:
    reason = families.misfit(family, model)
    if reason is None and family.objective != config.objective.name:
      reason = f'config.objective.name={config.objective.name!r}'
    if reason is None and family.predict_next != model.predict_next:
      reason = f'config.model.predict_next={model.predict_next}'
    if reason is None:
      return family
    reasons[family.name] = reason
  raise UserError(
    'no published architecture fits: '
    + '; '.join(f'{n} has no {reason}' for n, reason in reasons.items())
    + '; --family writes the weights as an architecture that computes them, '
    'whatever it is trained for'
  )


def check(folder, workdir=None):
  """Compares the published arithmetic with this package's on fixed tokens.

  Args:
    folder: published.
    workdir: whose parameters to compute with, by default the folder's own.

  Returns:
    Lines for every tensor, and the largest difference of a logit.

  Raises:
    UserError: the difference is more than rounding.
  """
  published = hf.open_folder(folder)
  tokens = check_tokens(published)
  mesh = mesh_lib.make_mesh()
  config, params = load.load_params(workdir or folder, mesh)
  causal = OBJECTIVES[published.family.objective].left_to_right
  config.model.update(dtype='float32', remat='none', attention='xla')
  if workdir is not None:
    _same_model(published, config, workdir)
  ours = np.asarray(logits(config, params, mesh, tokens, causal))
  theirs = reference.logits(published, tokens)
  if config.model.predict_next:
    theirs = np.concatenate([theirs[:1], theirs[:-1]])
  largest = float(np.abs(theirs).max())
  difference = float(np.abs(ours - theirs).max())
  lines = [*table(published)]
  lines.append(
    f'largest difference of a logit: {difference:.3g}, of a largest logit of '
    f'{largest:.3g}, over {len(tokens)} tokens'
  )
  if not difference <= TOLERANCE * max(1.0, largest):
    raise UserError(
      f'{workdir or folder} differs from {folder}: the largest difference of '
      f'a logit is {difference:.3g}, of a largest logit of {largest:.3g}'
    )
  return lines


def table(published):
  """A line for each tensor of a folder: name, shape, dtype."""
  return [
    f'{name}  {list(tensor.shape)}  {tensor.dtype.name}'
    for name, tensor in published.tensors.items()
  ]


def check_tokens(published):
  """[CHECK_LENGTH] int32, the same for every model of that size."""
  random = np.random.default_rng(0)
  size = published.model['vocab_size']
  tokens = random.integers(0, size, CHECK_LENGTH).astype(np.int32)
  mask = published.config.get('mask_token_id')
  if mask is not None:
    tokens[::3] = mask
  return tokens


@contextlib.contextmanager
def new_directory(path):
  """A directory to fill, which gets this name if nothing is raised.

  Raises:
    UserError: there is something at the path, or it cannot be made.
  """
  path = os.path.abspath(path)
  if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
    raise UserError(f'--out {path} is there already: choose another')
  parent, name = os.path.split(path)
  new = os.path.join(parent, f'.{name}.{secrets.token_hex(4)}')
  try:
    os.makedirs(new)
  except OSError as error:
    raise UserError(f'--out: cannot make {new} ({error.strerror})') from error
  try:
    yield new
    with safetensors.writing(path):
      os.replace(new, path)
  finally:
    shutil.rmtree(new, ignore_errors=True)


def _open_workdir(workdir, stack):
  """The config of a work directory, its leaves, and a word on them."""
  params = os.path.join(workdir, leaves_lib.PARAMS)
  if os.path.isdir(params):
    leaves, meta = leaves_lib.open_folder(params)
    return config_lib.from_dict(meta.config), leaves, params
  checkpointer = restore.open_run(workdir)
  stack.enter_context(contextlib.closing(checkpointer))
  step, meta = restore.newest_meta(checkpointer)

  # One array at a time: the tensors of all its layers are written in a row.
  @functools.lru_cache(maxsize=1)
  def read(name):
    try:
      return checkpointer.read_array(step, meta, name)
    except manifest.Damaged as error:
      raise UserError(
        f'step {step} of {checkpointer.directory} is damaged: {error}; '
        'launch/checkpoints.py --rollback goes back to one before'
      ) from error

  leaves = {
    name.partition('/')[2]: Leaf(
      tuple(leaf['shape']),
      np.dtype(leaf['dtype']),
      lambda index, name=name: read(name)[index],
    )
    for name, leaf in meta.leaves.items()
    if name.startswith('params/')
  }
  config = config_lib.from_dict(meta.config)
  return config, leaves, f'step {step} of {workdir}'


def _tokenizer_of(workdir):
  """The tokenizer of a work directory, or None."""
  if any(os.path.exists(os.path.join(workdir, n)) for n in hf.TOKENIZERS):
    return tokenizer_lib.load(workdir)
  return None


def _same_model(published, config, workdir):
  for field in families.FIELDS:
    theirs, ours = published.model[field], config.model[field]
    if theirs != ours:
      raise UserError(
        f'{workdir} has config.model.{field}={ours!r}, but '
        f'{published.folder} says {theirs!r}'
      )


def as_text(config):
  """A config.json as transformers would lay it out."""
  return json.dumps(dict(sorted(config.items())), indent=2) + '\n'


def logits(config, params, mesh, tokens, causal):
  """This package's logits of a row, [L, V] float32.

  Args:
    config: ConfigDict.
    params: parameter tree.
    mesh: that it lies on.
    tokens: [L] int.
    causal: whether a position sees only those before it and itself.
  """
  model_config = TransformerConfig(**config.model)

  @jax.jit
  def compute(params, tokens):
    labels = masks.causal if causal else masks.bidirectional
    network = transformer.bind(model_config, params)
    hidden = network(tokens, labels(tokens >= 0))
    return network.logits(hidden)[0]

  with jax.set_mesh(mesh), jax.default_matmul_precision('highest'):
    return compute(params, tokens[None])
