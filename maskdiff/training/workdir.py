"""Writes the files of a work directory, except checkpoints and metrics."""

import contextlib
import os
import tempfile

import jax

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest
from maskdiff.data import records
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import consensus, runtime
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.files import atomic, json_text, lock
from maskdiff.files.paths import local_path
from maskdiff.interop import config_json, hf, leaves
from maskdiff.model import transformer
from maskdiff.monitoring import stage_file, terminal

_PROBE_BYTES = 64 << 10  # about the size of the small files of a run


def make_workdir(workdir):
  """Creates the work directory.

  Raises:
    UserError: the path is not local, the directory cannot be created or holds
      a model of another kind or prepared rows, or a new run cannot write a
      small file there. A run that resumes may find the disk full: it waits for
      room while it trains.
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
  # A run would overwrite config.json and the tokenizer. In a converted
  # directory, others would load its parameters, and not those of the run.
  if _is_published(workdir) or os.path.isdir(
    os.path.join(workdir, leaves.PARAMS)
  ):
    raise UserError(
      f'--workdir {workdir} holds a published or converted model: use another '
      f'--workdir, and --config.init_from={workdir} to start from its '
      'parameters'
    )
  if os.path.exists(os.path.join(workdir, records.MANIFEST)):
    raise UserError(
      f'--workdir {workdir} holds prepared rows: use another --workdir, and '
      f'--config.data.path={workdir} to train on them'
    )
  new = not os.path.isdir(os.path.join(workdir, 'checkpoints'))
  if new and jax.process_index() == 0:
    try:
      with tempfile.TemporaryFile(dir=workdir) as probe:
        probe.write(bytes(_PROBE_BYTES))
        probe.flush()
        os.fsync(probe.fileno())
    except OSError as error:
      raise UserError(
        f'--workdir: cannot write to {workdir!r} ({error.strerror or error}); '
        'make room, or use another directory'
      ) from error


def _is_published(workdir):
  try:
    return config_json.is_published(workdir)
  except UserError:  # a planted link, which the run replaces
    return False


@contextlib.contextmanager
def locked(workdir):
  """Context manager that locks a work directory for this run.

  Process 0 holds the lock. All processes must call this function.

  Args:
    workdir: existing directory.

  Yields:
    Function without arguments, see `lock.locked`.

  Raises:
    UserError: raised in all processes; see `lock.locked`.
  """
  with contextlib.ExitStack() as stack:
    check, error = lambda: None, None
    if jax.process_index() == 0:
      try:
        check = stack.enter_context(lock.locked(workdir, runtime.print_once))
      except UserError as e:
        error = e
    consensus.raise_in_all(error)
    yield check


def save_run_files(config, setup, stage, workdir):
  """Writes config.json, header.txt, the files of the stage and the tokenizer.

  Also copies the tokenizer and config files of config.init_from. Files that
  have the right contents already are not written again, so that a run can
  resume on a full disk.

  Args:
    config: ConfigDict.
    setup: RunSetup.
    stage: Stage.
    workdir: work directory.

  Returns:
    The header: the text of `describe`, and the lines of the stage.

  Raises:
    UserError: the tokenizer or a file of config.init_from cannot be written.
      Without them nobody can use the checkpoints. A warning names any other
      file that cannot be written.
  """
  tokenizer_lib.copy(stage.tokenizer, workdir)
  copy_published_files(config, workdir)
  header = describe(config, setup.model, setup.mesh) + '\n' + stage.header
  config_json = json_text.dumps(manifest.config_json(config), indent=2)
  texts = {
    'header.txt': header + '\n',
    'config.json': config_json,
    stage_file.NAME: stage_file.content(stage.name, stage.panels),
  }
  encode = lambda text: text.encode(errors='backslashreplace')
  files = {name: encode(text) for name, text in texts.items()} | stage.files
  for name, content in files.items():
    path = os.path.join(workdir, name)
    try:
      atomic.write_if_changed(path, content)
    except OSError as error:
      terminal.warn(
        f'warning: cannot write {path} ({error.strerror or error}); the run '
        'continues without this file'
      )
  return header


def copy_published_files(config, workdir):
  """Copies tokenizer and config files of config.init_from, for an export.

  config.init_from is a Hugging Face folder, or a work directory that may hold
  copies of such files. Nothing is copied if there are no such files.
  """
  if not config.init_from:
    return
  source = str(local_path(config.init_from))
  subfolder = '' if config_json.is_published(source) else hf.PUBLISHED
  if os.path.isdir(os.path.join(source, subfolder)):
    target = os.path.join(workdir, hf.PUBLISHED)
    hf.copy_published_files(source, target, subfolder=subfolder)


def describe(config, model, mesh):
  """Returns the config, the parameters and the devices of a run as text.

  Args:
    config: ConfigDict.
    model: TransformerConfig.
    mesh: device mesh.
  """
  shapes, axes = transformer.shapes(model), transformer.axes(model)
  rows = [('parameter', 'shape', 'axes', 'number')]
  found = jax.tree_util.tree_leaves_with_path(shapes)
  names = jax.tree.leaves(axes, is_leaf=lambda a: isinstance(a, tuple))
  for (path, leaf), axis_names in zip(found, names, strict=True):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    rows.append((name, leaf.shape, ' '.join(axis_names), leaf.size))
  total, inner = transformer.num_params(model)
  rows.append(('total', '', '', total))
  rows.append(('without vocabulary', '', '', inner))
  flat = config_lib.flatten(config)
  processes = jax.process_count()
  sizes = ', '.join(f'{a}={mesh.shape[a]}' for a in mesh_lib.AXES)
  return '\n'.join(
    [
      terminal.table([(k, repr(v)) for k, v in flat.items()]),
      '',
      terminal.table(rows),
      '',
      f'{mesh.size} x {mesh.devices.flat[0].device_kind}, {sizes}'
      + (f', {processes} processes' if processes > 1 else ''),
    ]
  )
