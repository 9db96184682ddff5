"""Loads a trained model from a work directory or a published folder."""

import contextlib
import dataclasses
import os

import jax

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest, restore
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import families, hf
from maskdiff.interop import leaves as leaves_lib
from maskdiff.model import transformer
from maskdiff.model.network import Network
from maskdiff.model.transformer import TransformerConfig


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
    return (
      config,
      tokenizer_lib.with_config_ids(config, tokenizer_lib.load(workdir)),
      params,
      mesh,
    )
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


def network(config, params):
  """Returns the Network of a run, for sampling and scoring.

  An attention kernel that the config chooses is for training. The Network
  chooses one itself, since prompts have other lengths and may be sampled on
  other hardware; only `xla` stays.

  Args:
    config: ConfigDict of the run.
    params: parameter tree.
  """
  model = TransformerConfig(**config.model)
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
  )


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
  config = config_lib.from_dict(meta.config)
  shardings = manifest.flat(_shardings(config, mesh)[1])
  return config, leaves_lib.place(
    leaves, shardings, dtype, meta.leaves, params_dir
  )


def _load_published(published, mesh, dtype):
  config = hf.run_config(published, None)
  shardings = manifest.flat(_shardings(config, mesh)[1])
  return config, leaves_lib.place(published.leaves, shardings, dtype)


def _load_checkpoint(workdir, mesh, dtype):
  def targets_of(step, meta):
    config = config_lib.from_dict(meta.config)
    return {'params': restore.targets(*_shardings(config, mesh))}

  with contextlib.closing(restore.open_run(workdir)) as checkpointer:
    _, meta, (params,) = restore.newest(checkpointer, targets_of)
  if dtype is not None:
    params = leaves_lib.cast(params, dtype)
  return config_lib.from_dict(meta.config), params


def _shardings(config, mesh):
  """Shapes of a config's parameters and where they lie, two trees."""
  c = TransformerConfig(**config.model)
  shapes = transformer.shapes(c)
  return shapes, mesh_lib.param_shardings(mesh, transformer.axes(c), shapes)


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


def own_directory(workdir):
  """The directory, or None if it is a published folder: nothing is written
  there."""
  return None if families.is_published(workdir) else workdir
