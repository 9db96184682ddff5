"""Restores the newest undamaged step of a run; verifies steps; rolls back."""

import contextlib
import json
import os

import jax
import numpy as np
from jax.experimental import multihost_utils

from maskdiff.checkpoints import manifest
from maskdiff.checkpoints.checkpoint import Checkpointer
from maskdiff.checkpoints.manifest import Damaged
from maskdiff.distributed import runtime
from maskdiff.errors import UserError, no_checkpoint


def open_run(workdir):
  """Opens the checkpoints of a run for reading; returns a Checkpointer.

  Args:
    workdir: work directory of the run.

  Raises:
    UserError: the run has no checkpoint.
  """
  directory = os.path.join(workdir, 'checkpoints')
  if not os.path.isdir(directory):
    raise no_checkpoint(workdir)
  checkpointer = Checkpointer(directory, keep=None, read_only=True)
  if not checkpointer.steps():
    checkpointer.close()
    raise UserError(f'{directory} is empty: the run saved no checkpoint yet')
  return checkpointer


def newest(checkpointer, targets_of):
  """Restores the newest undamaged step.

  Damaged steps are moved aside, or skipped if the checkpointer is read-only. A
  warning on standard error names each damaged step.

  Args:
    checkpointer: Checkpointer.
    targets_of: function from (step, Meta) to the targets of
      `Checkpointer.restore`, a dict. It may raise Damaged, in all processes;
      or UserError if the config does not fit. The step then does not count as
      damaged.

  Returns:
    (step, Meta, tuple of trees); None if the directory never held a step.

  Raises:
    UserError: all steps are damaged or were moved aside; or the newest
      undamaged step does not fit the targets.
  """
  reasons = []
  for step in reversed(_steps_of_process_0(checkpointer.steps())):
    path = os.path.join(checkpointer.directory, str(step))
    try:
      meta, reason = checkpointer.read_meta(step), ''
    except Damaged as error:
      meta, reason = None, str(error)
    if not _any_process(reason):
      try:
        targets = targets_of(step, meta)
        return step, meta, checkpointer.restore(step, meta, **targets)
      except Damaged as error:  # the same in all processes
        reason = str(error)
    reasons.append(f'{step}: {reason or "another process cannot read it"}')
    action = 'skipped'
    if not checkpointer.read_only:
      action = f'moved to {checkpointer.move_aside(step)}'
    runtime.print_once(
      f'warning: checkpoint {path} is damaged and {action}: {reasons[-1]}'
    )
  aside = checkpointer.aside()
  moved = os.listdir(aside) if os.path.isdir(aside) else []
  if reasons or moved:
    raise UserError(
      f'all checkpoints in {checkpointer.directory} are damaged'
      + (f' ({"; ".join(reasons)})' if reasons else '')
      + (f'; {aside} has {", ".join(sorted(moved))}' if moved else '')
      + f'. To start from scratch, use another --workdir, or delete '
      f'{checkpointer.directory} and {aside}'
    )
  return None


def newest_meta(checkpointer):
  """Returns the newest step with a readable Meta, and the Meta.

  Reads no arrays.

  Raises:
    UserError: no step has a readable Meta.
  """
  for step in reversed(checkpointer.steps()):
    with contextlib.suppress(Damaged):
      return step, checkpointer.read_meta(step)
  raise UserError(f'all checkpoints in {checkpointer.directory} are damaged')


def roll_back(checkpointer, step):
  """Moves all later steps aside, so that the run resumes from this step.

  Returns:
    List of the steps that were moved.

  Raises:
    UserError: the step is not in the directory.
  """
  steps = checkpointer.steps()
  if step not in steps:
    raise UserError(
      f'{checkpointer.directory} has no step {step}; it has '
      f'{", ".join(map(str, steps)) or "none"}'
    )
  later = [s for s in steps if s > step]
  for s in later:
    checkpointer.move_aside(s)
  return later


def verify(checkpointer, step, meta):
  """Reads all arrays of a step and compares their fingerprints.

  The items are read one after another, sharded over all devices.

  Args:
    checkpointer: Checkpointer.
    step: int.
    meta: Meta of that step.

  Raises:
    Damaged: files are missing, or bits differ from those saved.
  """
  mesh = jax.sharding.Mesh(jax.devices(), ('all',))

  def target(leaf):
    shape, spec = leaf['shape'], [None] * len(leaf['shape'])
    divisible = [
      axis for axis, size in enumerate(shape) if size and size % mesh.size == 0
    ]
    if divisible:
      spec[max(divisible, key=lambda axis: shape[axis])] = 'all'
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, leaf['dtype'], sharding=sharding)

  leaves = {name: target(leaf) for name, leaf in meta.leaves.items()}
  for item, tree in manifest.nest(leaves).items():
    checkpointer.restore(step, meta, **{item: tree})


def targets(shapes, shardings):
  """Returns ShapeDtypeStructs with shardings, as `Checkpointer.restore` needs.

  Args:
    shapes: tree of arrays or ShapeDtypeStructs.
    shardings: tree of shardings with the same structure.
  """
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def _steps_of_process_0(steps):
  """Returns the steps that process 0 lists; other hosts may see them later."""
  if jax.process_count() == 1:
    return steps
  text = np.zeros(4096, np.uint8)
  encoded = json.dumps(steps[-256:]).encode()
  text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  text = np.asarray(multihost_utils.broadcast_one_to_all(text))
  return json.loads(bytes(text).rstrip(b'\0'))


def _any_process(reason):
  """Returns whether the reason is not empty in any process."""
  if jax.process_count() == 1:
    return bool(reason)
  flags = multihost_utils.process_allgather(np.array(bool(reason)))
  return bool(np.any(flags))
