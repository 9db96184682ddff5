"""Saves train states and restores them bit for bit.

A thin layer over Orbax's CheckpointManager that verifies all it reads. A step
on disk has the items `params` (plain names such as blocks/q), `opt_state`,
`guard`, `ema` (if the run keeps a moving average of the weights), `position`
(if the position of the stage has arrays) and `meta`. `meta` is JSON with the
config, the identity and the position of the stage, and a manifest of all arrays
with their fingerprints. Restored arrays are compared with the manifest.
`restore.newest` moves a damaged step aside and falls back to the step before
it.
"""

import contextlib
import os
import re
import shutil
import stat
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from maskdiff.checkpoints import manifest
from maskdiff.checkpoints.fingerprint import fingerprints
from maskdiff.checkpoints.manifest import Damaged, flat
from maskdiff.checkpoints.orbax_manager import SaveLateJson, open_manager
from maskdiff.errors import UserError, one_line, require_utf8
from maskdiff.files import atomic, reading

_DAMAGED_FILE = 'damaged.txt'
_DISK_FULL = re.compile('No space left on device|Disk quota exceeded')
_STEP = re.compile(r'0|[1-9]\d{0,8}', re.ASCII)  # name of a folder
# Errors of the system inside long messages of TensorStore.
_DISK_FAILED = re.compile(
  'File too large|Read-only file system|Stale file handle|Input/output error'
)
_RETRY_S = 1


class SaveError(Exception):
  """A step could not be written.

  Attributes:
    step: int.
    disk_full: whether the disk is full. If it is not, and the run has several
      processes, another process may have died.
  """

  def __init__(self, step, cause):
    cause = _reason(cause)
    super().__init__(f'the checkpoint of step {step} is not saved: {cause}')
    self.step = step
    self.disk_full = bool(_DISK_FULL.search(cause))


class Checkpointer:
  """Saves and restores train states in a directory.

  Saving is asynchronous. `save` returns as soon as the arrays are copied to the
  host; `poll` and `finish` return the step once it is durable.

  Attributes:
    directory: absolute path.
    read_only: whether nothing is saved, moved or deleted.
    durable_step: newest step known to be completely on disk, or None.
  """

  def __init__(self, directory, keep, keep_every=0, read_only=False):
    """Opens the directory; creates it unless `read_only`.

    Args:
      directory: path.
      keep: number of latest steps to keep; None keeps all.
      keep_every: multiples of this step number are never deleted; 0: none.
      read_only: saves, moves and deletes nothing. A run may be writing to the
        directory at the same time.

    Raises:
      UserError: the directory cannot be created or read, or its path is not
        UTF-8, which Orbax needs.
    """
    self.directory = os.path.abspath(directory)
    require_utf8(self.directory)
    self.read_only = read_only
    self.durable_step = None
    self._saving, self._has_failed = None, False
    self._manager = open_manager(self.directory, keep, keep_every, read_only)

  def save(self, step, items, meta):
    """Starts to save a step.

    Args:
      step: int, greater than all steps on disk.
      items: dict from name to a tree of arrays.
      meta: Meta.

    Raises:
      SaveError: the save could not be started, or the previous one failed.
      RuntimeError: Orbax declined, because a later step is on disk.
    """
    self.finish()
    self._saving = step
    try:
      # The device hashes the arrays while they are copied to the host.
      prints, leaves = fingerprints(items), manifest.describe(items)
      # Saved as nested dicts, so that the names on disk do not depend on the
      # classes of optax.
      items = manifest.nest(flat(items))
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          **{k: ocp.args.StandardSave(v) for k, v in items.items()},
          meta=SaveLateJson(
            lambda: manifest.make(meta, leaves, jax.device_get(prints))
          ),
        ),
      )
    except Exception as error:  # raised by Orbax, TensorStore or the disk
      raise self._failed(error) from error
    if not saved:
      self._saving = None
      raise RuntimeError(
        f'checkpoint of step {step} was not saved: {self.directory} holds '
        f'steps {self.steps()}'
      )

  def poll(self):
    """Like `finish`, but returns None while the save is in progress."""
    if self._saving is None or self._manager.is_saving_in_progress():
      return None
    return self.finish()

  def finish(self):
    """Waits for the save in progress.

    Returns:
      The step that was written to disk; None if no save was in progress.

    Raises:
      SaveError: the step could not be written.
    """
    if self._saving is None:
      return None
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._failed(error) from error
    try:
      found = self._saving in self.steps()
    except OSError as error:
      raise self._failed(error) from error
    if not found:
      raise self._failed(FileNotFoundError('it is not in the directory'))
    self.durable_step, self._saving = self._saving, None
    return self.durable_step

  def _failed(self, error):
    """Removes the partial step to free the disk; returns a SaveError."""
    step, self._saving = self._saving, None
    self._has_failed = True
    # The whole directory may be gone or out of reach.
    with contextlib.suppress(OSError):
      if jax.process_index() == 0:
        for name in os.listdir(self.directory):
          if name.startswith(f'{step}.orbax-checkpoint-tmp'):
            path = os.path.join(self.directory, name)
            shutil.rmtree(path, ignore_errors=True)
      self._manager.reload()
    return SaveError(step, error)

  def steps(self):
    """Lists the steps on disk in ascending order, damaged ones included."""
    if not os.path.isdir(self.directory):
      return []
    names = os.listdir(self.directory)
    return sorted(int(n) for n in names if _STEP.fullmatch(n))

  def read_meta(self, step):
    """Reads the Meta of a step, with its manifest in `leaves`.

    Raises:
      Damaged: the file is missing or differs from what was written.
      UserError: the step was written in the format of another version.
    """
    path = os.path.join(self.directory, str(step))
    mark = os.path.join(path, _DAMAGED_FILE)
    if os.path.lexists(mark):
      try:
        reason = reading.read_text(mark, 4096)
      except UserError as error:
        reason = error
      raise Damaged(one_line(reason, 300))
    _require_regular(path)
    return manifest.read(os.path.join(path, 'meta', 'metadata'))

  def restore(self, step, meta, **targets):
    """Restores some items of a step and compares their fingerprints.

    Args:
      step: int.
      meta: Meta of that step.
      **targets: for each item, a tree of ShapeDtypeStructs with shardings.

    Returns:
      The restored trees in the order of the targets.

    Raises:
      UserError: names, shapes or dtypes on disk differ from the targets'.
      Damaged: files are missing, or bits differ from those saved.
      RuntimeError: this process of several cannot read its part. The step is
        then marked as damaged for the next start. If the checkpointer is
        read-only, UserError is raised and nothing is marked.
    """
    path = os.path.join(self.directory, str(step))
    manifest.compare(path, meta.leaves, targets)
    nested = manifest.nest(flat(targets))
    args = ocp.args.Composite(
      **{k: ocp.args.StandardRestore(v) for k, v in nested.items()}
    )
    try:
      restored = self._restore_with_retry(step, args)
    except MemoryError:
      raise
    except Exception as error:
      if 'RESOURCE_EXHAUSTED' in str(error):
        raise
      reason = f'it cannot be read: {_reason(error)}'
      if jax.process_count() > 1:
        # Other processes may have read their part and wait for this process,
        # which cannot send them a message.
        if self.read_only:
          raise UserError(
            f'{path}: {reason}; launch/checkpoints.py --verify shows the '
            'damaged steps, and the next start of the run moves them aside'
          ) from error
        with contextlib.suppress(OSError):  # the next start reads the mark
          atomic.write(os.path.join(path, _DAMAGED_FILE), reason + '\n')
        raise RuntimeError(f'{path}: {reason}; start again') from error
      raise Damaged(reason) from error
    named = flat({name: restored[name] for name in nested})
    trees = jax.tree.unflatten(
      jax.tree.structure(targets), [named[name] for name in flat(targets)]
    )
    prints = jax.device_get(fingerprints(trees))
    damaged = manifest.changed(meta.leaves, prints)
    if damaged:
      raise Damaged(
        f'bits of {", ".join(damaged[:3])}'
        + (f' and {len(damaged) - 3} more' if len(damaged) > 3 else '')
        + ' have changed since they were saved'
      )
    self.durable_step = step
    return tuple(trees[name] for name in targets)

  def read_array(self, step, meta, name):
    """Reads one array of a step onto the host, without reading the others.

    Args:
      step: int.
      meta: Meta of that step.
      name: name in the manifest, such as params/blocks/q.

    Raises:
      Damaged: the array is missing, or bits differ from those saved.
    """
    item, _, path = name.partition('/')
    folder = os.path.join(self.directory, str(step), item)
    tree_of = lambda leaf: manifest.nest({path: leaf})
    args = ocp.args.PyTreeRestore(
      tree_of(0),
      tree_of(ocp.RestoreArgs(restore_type=np.ndarray)),
      partial_restore=True,
    )
    try:
      with ocp.PyTreeCheckpointer() as reader:
        array = flat(reader.restore(folder, args))[path]
    except MemoryError:
      raise
    except Exception as error:
      raise Damaged(f'{name} cannot be read: {_reason(error)}') from error
    if manifest.changed(meta.leaves, {name: fingerprints(array)}):
      raise Damaged(f'bits of {name} have changed since they were saved')
    return array

  def _restore_with_retry(self, step, args):
    try:
      return self._manager.restore(step, args=args)
    except Exception:
      if jax.process_count() > 1:
        raise
      time.sleep(_RETRY_S)  # mounted buckets have transient failures
      return self._manager.restore(step, args=args)

  def move_aside(self, step):
    """Moves a step to the folder `aside()`; all processes must call it.

    Returns:
      The new path.

    Raises:
      UserError: the step cannot be moved.
    """
    path = os.path.join(self.directory, str(step))
    aside = self.aside()
    number, destination = 1, os.path.join(aside, str(step))
    if jax.process_index() == 0:
      try:
        os.makedirs(aside, exist_ok=True)
        while os.path.exists(destination):
          number += 1
          destination = os.path.join(aside, f'{step}-{number}')
        os.rename(path, destination)
      except OSError as error:
        raise UserError(
          f'cannot move {path} to {aside} ({error.strerror})'
        ) from error
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('maskdiff_set_aside')
    self._manager.reload()
    return destination

  def aside(self):
    """Returns the path of the folder to which `move_aside` moves steps."""
    return self.directory + '.aside'

  def close(self):
    """Waits for the save in progress; raises SaveError if that save fails."""
    try:
      self.finish()
    finally:
      try:
        self._manager.close()
      except Exception:
        # Threads of Orbax may report a failed save once more.
        if not self._has_failed:
          raise


def _require_regular(path):
  """Raises Damaged if a step holds a link, or a file that is not regular.

  A run writes none. A link could lead out of the folder, and the code that
  reads arrays would wait for the other end of a FIFO.
  """
  for folder, folders, files in os.walk(path):
    for name in [*folders, *files]:
      mode = os.lstat(os.path.join(folder, name)).st_mode
      if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise Damaged(f'{one_line(name)} is not a regular file')


def _reason(error):
  """Returns an error as one line, with advice if the disk is full."""
  if full := _DISK_FULL.search(str(error)):
    return f'{full[0]}; make room, or keep fewer checkpoints'
  if failed := _DISK_FAILED.search(str(error)):
    return failed[0]
  return one_line(error, 300)
