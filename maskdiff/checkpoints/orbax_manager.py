"""Opens an Orbax CheckpointManager; saves JSON computed in the background."""

import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.future import CommitFutureAwaitingContractedSignals

from maskdiff.errors import UserError


def open_manager(directory, keep, keep_every, read_only):
  """Opens a CheckpointManager; creates the directory unless `read_only`.

  Args:
    directory: absolute path.
    keep: number of latest steps to keep; None keeps all.
    keep_every: multiples of this step number are never deleted; 0: none.
    read_only: the manager changes nothing in the directory.

  Raises:
    UserError: the directory cannot be created or read.
  """
  _drop_late_futures()
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(_drop_orbax_errors)
  policies = [checkpoint_managers.LatestN(keep)]
  if keep_every:
    policies.append(checkpoint_managers.EveryNSteps(keep_every))
  options = ocp.CheckpointManagerOptions(
    preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
    cleanup_tmp_directories=not read_only,
    read_only=read_only,
  )
  try:
    manager = ocp.CheckpointManager(directory, options=options)
  except OSError as error:
    raise UserError(
      f'cannot use {directory} for checkpoints ({error.strerror})'
    ) from error
  # Orbax would poll JAX's preemption service with its own step numbers, and the
  # processes would stop at different steps; see consensus.Preemption.
  manager.reached_preemption = lambda step: False
  return manager


def _drop_orbax_errors(record):
  """Logging filter that drops errors of Orbax, which raises them as well."""
  if record.levelno < logging.ERROR:
    return True
  texts = [record.pathname, record.getMessage()]
  if record.exc_info:
    texts += traceback.format_exception(record.exc_info[1])
  path = os.path.join('orbax', 'checkpoint', '')
  return not any(path in text for text in texts)


def _drop_late_futures():
  """Makes sys.unraisablehook silent about writes that end after a failed save.

  The first array that cannot be written ends the save and its event loop. When
  TensorStore finishes the other arrays, it finds the loop closed and reports an
  error for each, which no code can catch.
  """
  before = sys.unraisablehook
  if getattr(before, '__module__', None) == __name__:
    return

  def hook(report):
    trace = report.exc_traceback
    late = (
      report.exc_type is RuntimeError
      and str(report.exc_value) == 'Event loop is closed'
      and report.object is None
      and trace is not None
      and trace.tb_frame.f_code.co_name == 'call_soon_threadsafe'
    )
    if not late:
      before(report)

  sys.unraisablehook = hook


class _LateJsonHandler(ocp.JsonCheckpointHandler):
  """Writes JSON that is computed while the arrays are being written."""

  async def async_save(self, directory, item=None, args=None):
    write = self._write(directory, args.make)
    return [CommitFutureAwaitingContractedSignals(write, name='meta')]

  async def _write(self, directory, make):
    if jax.process_index() == 0:
      (directory / 'metadata').write_text(json.dumps(make()))


@ocp.args.register_with_handler(
  _LateJsonHandler, for_save=True, for_restore=True
)
@dataclasses.dataclass
class SaveLateJson(ocp.args.CheckpointArgs):
  """Save argument: `make` is called in the background and returns the JSON."""

  make: Callable[[], dict]
