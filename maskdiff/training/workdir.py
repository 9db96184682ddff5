"""What a config and a work directory stand for.

Between the outside (ConfigDicts, paths, files of a run) and the library (frozen
configs, arrays): each function opens one thing, checks that it fits the
others, and says in one line what is wrong if it does not.
"""

import contextlib
import json
import os

import jax

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError, one_line
from maskdiff.interop import families, hf
from maskdiff.model import transformer
from maskdiff.monitoring import terminal


@contextlib.contextmanager
def memory_advice(config):
  """Turns want of device memory into a UserError that says what to change."""
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


def carry(config, workdir):
  """Puts the small files of a published folder that a run begins with, or that
  came with it, into the run's own directory, for an export."""
  source = config.init_from
  if source and not families.is_published(source):
    source = os.path.join(source, hf.PUBLISHED)
  if source and os.path.isdir(source):
    hf.carry(source, os.path.join(workdir, hf.PUBLISHED))


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
    json.dump(manifest.config_json(config), f, indent=2)
  tokenizer_lib.copy(tokenizer, workdir)
  carry(config, workdir)


def describe(config, c, mesh, datasets):
  """The header of a run as text: config, parameters, devices, data.

  Args:
    config: the config, and c its StepConfig.
    mesh: device mesh.
    datasets: from `open_data`.
  """
  shapes, axes = transformer.shapes(c.model), transformer.axes(c.model)
  rows = [('parameter', 'shape', 'axes', 'number')]
  leaves = jax.tree_util.tree_leaves_with_path(shapes)
  names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
  for (path, leaf), axis_names in zip(leaves, names, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    rows.append((name, leaf.shape, ' '.join(axis_names), leaf.size))
  everything, inner = transformer.num_params(c.model)
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
      terminal.table([(k, repr(v)) for k, v in flat.items()]),
      '',
      terminal.table(rows),
      '',
      f'{mesh.size} x {mesh.devices.flat[0].device_kind}, {sizes}'
      + (f', {processes} processes' if processes > 1 else ''),
      *data,
    ]
  )
