"""Writes the files of a work directory, except checkpoints and metrics."""

import json
import os

import jax

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import families, hf
from maskdiff.model import transformer
from maskdiff.monitoring import terminal


def make_workdir(workdir):
  """Creates the work directory.

  Raises:
    UserError: the path is not local, or the directory cannot be created.
  """
  if '://' in workdir:
    raise UserError(
      f'--workdir {workdir}: only local paths are supported; mount the bucket '
      'and give the mount point'
    )
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as error:
    raise UserError(
      f'--workdir: cannot create {workdir!r} ({error})'
    ) from error


def save_run_files(config, setup, workdir):
  """Writes config.json, header.txt and the tokenizer; returns the header.

  Also copies the tokenizer and config files of config.init_from.

  Args:
    config: ConfigDict.
    setup: RunSetup.
    workdir: work directory.

  Returns:
    The text of `describe`.
  """
  header = describe(config, setup.c, setup.mesh, setup.datasets)
  with open(os.path.join(workdir, 'header.txt'), 'w') as f:
    f.write(header + '\n')
  with open(os.path.join(workdir, 'config.json'), 'w') as f:
    json.dump(manifest.config_json(config), f, indent=2)
  tokenizer_lib.copy(setup.tokenizer, workdir)
  copy_published_files(config, workdir)
  return header


def copy_published_files(config, workdir):
  """Copies tokenizer and config files of config.init_from, for an export.

  config.init_from is a Hugging Face folder, or a work directory that may hold
  copies of such files. Nothing is copied if there are no such files.
  """
  source = config.init_from
  if source and not families.is_published(source):
    source = os.path.join(source, hf.PUBLISHED)
  if source and os.path.isdir(source):
    hf.copy_published_files(source, os.path.join(workdir, hf.PUBLISHED))


def describe(config, c, mesh, datasets):
  """Returns the header of a run: config, parameters, devices and data.

  Args:
    config: ConfigDict.
    c: StepConfig of the config.
    mesh: device mesh.
    datasets: from `inputs.open_data`.
  """
  shapes, axes = transformer.shapes(c.model), transformer.axes(c.model)
  rows = [('parameter', 'shape', 'axes', 'number')]
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
  for (path, leaf), axis_names in zip(leaves, names, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    rows.append((name, leaf.shape, ' '.join(axis_names), leaf.size))
  total, inner = transformer.num_params(c.model)
  rows.append(('total', '', '', total))
  rows.append(('without vocabulary', '', '', inner))
  flat = config_lib.flatten(config)
  processes = jax.process_count()
  sizes = ', '.join(f'{a}={mesh.shape[a]}' for a in mesh_lib.AXES)
  weights = sum(d.weight for d in datasets)
  data = []
  for d in datasets:
    train, share = d.manifest.splits['train'], d.weight / weights
    read = config.train.steps * config.train.batch * c.length * share
    epochs = read / (train.rows * d.manifest.row_length)
    data.append(
      f'data: {d.manifest.source}, {d.directory}: an epoch has '
      f'{train.tokens:,} tokens of {train.text_bytes / train.tokens:.2f} bytes '
      f'in {len(train.shards)} shards; this run reads '
      f'{epochs:.2f} epochs'
      + (f', {share:.2%} of its tokens' if len(datasets) > 1 else '')
    )
  return '\n'.join(
    [
      terminal.table([(k, repr(v)) for k, v in flat.items()]),
      '',
      terminal.table(rows),
      '',
      f'{mesh.size} x {mesh.devices.flat[0].device_kind}, {sizes}'
      + (f', {processes} processes' if processes > 1 else ''),
      *data,
    ]
  )
