"""Checkpoints: the train state, the position in the data, and the config.

A thin layer over Orbax's CheckpointManager, which believes neither the disk nor
Orbax. A step on disk has `params` (plain names such as blocks/q), `opt_state`,
`guard`, and `meta`: JSON with the config, the samples seen, fingerprints of
data and tokenizer, and a manifest of all arrays with their fingerprints. What
is restored is compared with the manifest; a step that is damaged is set aside,
and the one before is taken.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from maskdiff.checkpoints import manifest
from maskdiff.checkpoints.fingerprint import fingerprints
from maskdiff.checkpoints.manifest import Damaged, flat
from maskdiff.errors import UserError

_MARK = 'damaged.txt'
_FULL = re.compile('No space left on device|Disk quota exceeded')
_RETRY_S = 1


class SaveError(Exception):
  """A step could not be written.

  Attributes:
    step: int.
    disk_full: whether that is why; with several processes it may be that
      another one is lost.
  """

  def __init__(self, step, cause):
    cause = _one_line(cause)
    super().__init__(f'the checkpoint of step {step} is not saved: {cause}')
    self.step = step
    self.disk_full = bool(_FULL.search(cause))


class Checkpointer:
  """Saves and restores train states in a directory.

  Saving is asynchronous: `save` returns once the arrays are copied off the
  device, and only `poll` or `finish` tell whether they came to the disk.

  Attributes:
    directory: path.
    durable_step: the newest step known to be whole on disk, or None.
  """

  def __init__(self, directory, keep, keep_every=0, read_only=False):
    """Opens the directory; creates it unless `read_only`.

    Args:
      directory: path.
      keep: number of latest steps to keep; None keeps all.
      keep_every: multiples of it are kept for ever; 0 for none.
      read_only: for a directory that a run may be writing to right now.

    Raises:
      UserError: the directory cannot be made or read.
    """
    for name in ('absl', 'asyncio'):
      logging.getLogger(name).addFilter(_not_of_orbax)
    self.directory = os.path.abspath(directory)
    self.read_only = read_only
    self.durable_step = None
    self._saving = None
    policies = [checkpoint_managers.LatestN(keep)]
    if keep_every:
      policies.append(checkpoint_managers.EveryNSteps(keep_every))
    try:
      self._manager = ocp.CheckpointManager(
        self.directory,
        options=ocp.CheckpointManagerOptions(
          preservation_policy=checkpoint_managers.AnyPreservationPolicy(
            policies
          ),
          cleanup_tmp_directories=not read_only,
          read_only=read_only,
        ),
      )
    except OSError as error:
      raise UserError(
        f'cannot use {self.directory} for checkpoints ({error.strerror})'
      ) from error
    # Orbax would ask JAX with numbers of its own, and spoil the agreement of
    # the processes on when to end; see consensus.Preemption.
    self._manager.reached_preemption = lambda step: False

  def save(self, step, items, meta):
    """Starts saving.

    Args:
      step: int, above all that are on disk.
      items: dict from name to a tree of arrays.
      meta: dict of JSON values.

    Raises:
      SaveError: it could not even be started, or the one before not finished.
      RuntimeError: the manager declined, which means a later step is there.
    """
    self.finish()
    self._saving = step
    try:
      # The device goes on to this while its arrays are copied from it.
      prints, leaves = fingerprints(items), manifest.describe(items)
      # By name alone, so that tuples on disk cannot differ from those wanted.
      items = manifest.nest(flat(items))
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          **{k: ocp.args.StandardSave(v) for k, v in items.items()},
          meta=_SaveLater(
            lambda: manifest.make(meta, leaves, jax.device_get(prints))
          ),
        ),
      )
    except Exception as error:  # what Orbax, TensorStore or the disk raise
      raise self._failed(error) from error
    if not saved:
      self._saving = None
      raise RuntimeError(
        f'checkpoint of step {step} was not saved: {self.directory} holds '
        f'steps {self.steps()}'
      )

  def poll(self):
    """As `finish`, but returns None if the save still goes on."""
    if self._saving is None or self._manager.is_saving_in_progress():
      return None
    return self.finish()

  def finish(self):
    """Waits for what is being saved.

    Returns:
      The step that came to the disk; None if nothing was being saved.

    Raises:
      SaveError: it could not be written.
    """
    if self._saving is None:
      return None
    try:
      self._manager.wait_until_finished()
      self._manager.check_for_errors()
    except Exception as error:
      raise self._failed(error) from error
    if self._saving not in self.steps():
      raise self._failed(FileNotFoundError('it is not in the directory'))
    self.durable_step, self._saving = self._saving, None
    return self.durable_step

  def _failed(self, error):
    """Clears away the half step, which may be what fills the disk."""
    step, self._saving = self._saving, None
    if jax.process_index() == 0:
      for name in os.listdir(self.directory):
        if name.startswith(f'{step}.orbax-checkpoint-tmp'):
          shutil.rmtree(os.path.join(self.directory, name), ignore_errors=True)
    self._manager.reload()
    return SaveError(step, error)

  def steps(self):
    """The steps on disk, whole or not, ascending."""
    if not os.path.isdir(self.directory):
      return []
    return sorted(int(n) for n in os.listdir(self.directory) if n.isdecimal())

  def read_meta(self, step):
    """The dict given to `save` at this step, with its manifest.

    Raises:
      Damaged: it is not there, or not as it was written.
      UserError: the step was written by another version.
    """
    path = os.path.join(self.directory, str(step))
    mark = os.path.join(path, _MARK)
    if os.path.exists(mark):
      with open(mark) as f:
        raise Damaged(f.read().strip())
    return manifest.read(os.path.join(path, 'meta', 'metadata'))

  def restore(self, step, meta, **targets):
    """Restores parts of a step.

    Args:
      step: int.
      meta: of that step.
      **targets: by item, trees of ShapeDtypeStructs with shardings.

    Returns:
      The restored trees in the order of the targets.

    Raises:
      UserError: names, shapes or dtypes on disk differ from the targets'.
      Damaged: files are missing, or bits differ from those saved.
    """
    path = os.path.join(self.directory, str(step))
    manifest.compare(path, meta['leaves'], targets)
    wanted = manifest.nest(flat(targets))
    args = ocp.args.Composite(
      **{k: ocp.args.StandardRestore(v) for k, v in wanted.items()}
    )
    try:
      restored = self._read(step, args)
    except MemoryError:
      raise
    except Exception as error:
      if 'RESOURCE_EXHAUSTED' in str(error):
        raise
      reason = f'it cannot be read: {_one_line(error)}'
      if jax.process_count() > 1:
        # Others may have read their part, and wait: no word comes to them.
        # The next start finds this.
        with contextlib.suppress(OSError):
          with open(os.path.join(path, _MARK), 'w') as f:
            f.write(reason + '\n')
        raise RuntimeError(f'{path}: {reason}; start again') from error
      raise Damaged(reason) from error
    named = flat({name: restored[name] for name in wanted})
    trees = jax.tree.unflatten(
      jax.tree.structure(targets), [named[name] for name in flat(targets)]
    )
    prints = jax.device_get(fingerprints(trees))
    wrong = manifest.changed(meta['leaves'], prints)
    if wrong:
      raise Damaged(
        f'bits of {", ".join(wrong[:3])}'
        + (f' and {len(wrong) - 3} more' if len(wrong) > 3 else '')
        + ' have changed since they were saved'
      )
    self.durable_step = step
    return tuple(trees[name] for name in targets)

  def read_array(self, step, meta, name):
    """One array of a step on the host, for those that cannot hold them all.

    Args:
      step: int.
      meta: of that step.
      name: in the manifest, such as params/blocks/q.

    Raises:
      Damaged: it is missing, or bits differ from those saved.
    """
    item, _, path = name.partition('/')
    folder = os.path.join(self.directory, str(step), item)
    wanted = lambda leaf: manifest.nest({path: leaf})
    args = ocp.args.PyTreeRestore(
      wanted(0),
      wanted(ocp.RestoreArgs(restore_type=np.ndarray)),
      partial_restore=True,
    )
    try:
      with ocp.PyTreeCheckpointer() as reader:
        array = flat(reader.restore(folder, args))[path]
    except MemoryError:
      raise
    except Exception as error:
      raise Damaged(f'{name} cannot be read: {_one_line(error)}') from error
    if manifest.changed(meta['leaves'], {name: fingerprints(array)}):
      raise Damaged(f'bits of {name} have changed since they were saved')
    return array

  def _read(self, step, args):
    try:
      return self._manager.restore(step, args=args)
    except Exception:
      if jax.process_count() > 1:
        raise
      time.sleep(_RETRY_S)  # mounted buckets fail in passing
      return self._manager.restore(step, args=args)

  def set_aside(self, step):
    """Moves a step out of the way; returns where to. All processes call it.

    Raises:
      UserError: that cannot be.
    """
    path = os.path.join(self.directory, str(step))
    aside = self.aside()
    number, to = 1, os.path.join(aside, str(step))
    if jax.process_index() == 0:
      try:
        os.makedirs(aside, exist_ok=True)
        while os.path.exists(to):
          number += 1
          to = os.path.join(aside, f'{step}-{number}')
        os.rename(path, to)
      except OSError as error:
        raise UserError(
          f'cannot move {path} to {aside} ({error.strerror})'
        ) from error
    _wait_for_all('set_aside')
    self._manager.reload()
    return to

  def aside(self):
    """Where steps go that are set aside."""
    return self.directory + '.aside'

  def close(self):
    """Waits for what is being saved; raises if it could not be."""
    try:
      self.finish()
    finally:
      self._manager.close()


def _not_of_orbax(record):
  """Drops its errors, long and with stacks: they are raised too, and told."""
  path = os.path.join('orbax', 'checkpoint', '')
  return record.levelno < logging.ERROR or (
    path not in record.pathname and path not in record.getMessage()
  )


class _MetaHandler(ocp.JsonCheckpointHandler):
  """Writes JSON that is only known when the arrays are being written."""

  async def async_save(self, directory, item=None, args=None):
    write = self._write(directory, args.make)
    return [CommitFutureAwaitingContractedSignals(write, name='meta')]

  async def _write(self, directory, make):
    if jax.process_index() == 0:
      (directory / 'metadata').write_text(json.dumps(make()))


@ocp.args.register_with_handler(_MetaHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class _SaveLater(ocp.args.CheckpointArgs):
  make: Callable[[], dict]


def restore_newest(checkpointer, targets_of):
  """Restores the newest step that is whole.

  Damaged ones are set aside, or passed over by a reader, and named on standard
  error.

  Args:
    checkpointer: Checkpointer.
    targets_of: function from (step, meta) to the targets of
      `Checkpointer.restore`, a dict. May raise UserError: a config that does
      not fit is no damage.

  Returns:
    The step, its meta and a tuple of trees; or None if there never was a step.

  Raises:
    UserError: there are or were steps, and none is whole; or one does not fit.
  """
  reasons = []
  for step in reversed(_of_main_process(checkpointer.steps())):
    path = os.path.join(checkpointer.directory, str(step))
    try:
      meta, reason = checkpointer.read_meta(step), ''
    except Damaged as error:
      meta, reason = None, str(error)
    if not _any_process(reason):
      targets = targets_of(step, meta)
      try:
        return step, meta, checkpointer.restore(step, meta, **targets)
      except Damaged as error:  # the same everywhere
        reason = str(error)
    reasons.append(f'{step}: {reason or "another process cannot read it"}')
    where = 'passed over'
    if not checkpointer.read_only:
      where = f'moved to {checkpointer.set_aside(step)}'
    if jax.process_index() == 0:
      print(
        f'warning: checkpoint {path} is damaged and {where}: {reasons[-1]}',
        file=sys.stderr,
        flush=True,
      )
  aside = checkpointer.aside()
  moved = os.listdir(aside) if os.path.isdir(aside) else []
  if reasons or moved:
    raise UserError(
      f'no checkpoint in {checkpointer.directory} is whole'
      + (f' ({"; ".join(reasons)})' if reasons else '')
      + (f'; {aside} has {", ".join(sorted(moved))}' if moved else '')
      + '. To start from scratch, use another --workdir or delete both'
    )
  return None


def newest_meta(checkpointer):
  """The newest step whose meta is whole, and that, without reading arrays.

  Raises:
    UserError: there is none.
  """
  for step in reversed(checkpointer.steps()):
    with contextlib.suppress(Damaged):
      return step, checkpointer.read_meta(step)
  raise UserError(f'no checkpoint in {checkpointer.directory} is whole')


def roll_back(checkpointer, step):
  """Sets all later steps aside, so that a run goes on from this one.

  Returns:
    The steps that were set aside.

  Raises:
    UserError: the step is not there.
  """
  steps = checkpointer.steps()
  if step not in steps:
    raise UserError(
      f'{checkpointer.directory} has no step {step}; it has '
      f'{", ".join(map(str, steps)) or "none"}'
    )
  later = [s for s in steps if s > step]
  for s in later:
    checkpointer.set_aside(s)
  return later


def verify(checkpointer, step, meta):
  """Reads everything of a step, spread over all devices, item by item.

  Args:
    checkpointer: Checkpointer.
    step: int.
    meta: of that step.

  Raises:
    Damaged: files are missing, or bits differ from those saved.
  """
  mesh = jax.sharding.Mesh(jax.devices(), ('all',))

  def target(leaf):
    shape, spec = leaf['shape'], [None] * len(leaf['shape'])
    even = [a for a, size in enumerate(shape) if size and size % mesh.size == 0]
    if even:
      spec[max(even, key=lambda axis: shape[axis])] = 'all'
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, leaf['dtype'], sharding=sharding)

  leaves = {name: target(leaf) for name, leaf in meta['leaves'].items()}
  for item, tree in manifest.nest(leaves).items():
    checkpointer.restore(step, meta, **{item: tree})


def targets(shapes, shardings):
  """Puts shardings onto a tree of shapes, as `restore` wants it."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def open_run(workdir):
  """Opens the checkpoints of a run for reading.

  Args:
    workdir: directory given to `train.run`.

  Raises:
    UserError: there is no checkpoint.
  """
  directory = os.path.join(workdir, 'checkpoints')
  if not os.path.isdir(directory):
    raise UserError(
      f'{workdir} holds no checkpoint; train one with launch/pretrain.py '
      f'--workdir {workdir}'
    )
  checkpointer = Checkpointer(directory, keep=None, read_only=True)
  if not checkpointer.steps():
    checkpointer.close()
    raise UserError(f'{directory} is empty: the run saved no checkpoint yet')
  return checkpointer


def config_json(config):
  """A ConfigDict as plain JSON values."""
  return json.loads(config.to_json())


def _of_main_process(steps):
  """What process 0 sees, if the others see something else."""
  if jax.process_count() == 1:
    return steps
  text = np.zeros(4096, np.uint8)
  encoded = json.dumps(steps[-256:]).encode()
  text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  text = np.asarray(multihost_utils.broadcast_one_to_all(text))
  return json.loads(bytes(text).rstrip(b'\0'))


def _any_process(reason):
  if jax.process_count() == 1:
    return bool(reason)
  flags = multihost_utils.process_allgather(np.array(bool(reason)))
  return bool(np.any(flags))


def _wait_for_all(name):
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'maskdiff_{name}')


def _one_line(error):
  """The gist of an error, which may come with a stack and an essay."""
  text = ' '.join(str(error).split()) or type(error).__name__
  if full := _FULL.search(text):
    return f'{full[0]}; make room, or keep fewer checkpoints'
  return text[:300]
