"""Saves the state of a run and handles failed saves."""

import jax

from maskdiff.checkpoints import manifest
from maskdiff.checkpoints import position as position_lib
from maskdiff.checkpoints.checkpoint import SaveError
from maskdiff.errors import UserError


class Saver:
  """Saves the state of a run.

  A run of one process tolerates config.checkpoint.max_failures consecutive
  failed saves, for example on a full disk. The ledger records each save that
  became durable and each that failed.

  In a run of several processes, every method raises an error after the first
  failed save: UserError if the disk is full, otherwise SaveError, because
  another process may have died.
  """

  def __init__(self, config, stage, checkpointer, ledger, say):
    """Stores the objects that the methods use.

    Args:
      config: ConfigDict of the run.
      stage: Stage.
      checkpointer: Checkpointer of the run.
      ledger: Ledger.
      say: function that prints a line.
    """
    self._config, self._stage = config, stage
    self._checkpointer = checkpointer
    self._ledger = ledger
    self._say = say
    self._failures = 0

  def poll(self):
    """Records a save that has ended since the last call; does not wait.

    Raises:
      UserError: too many consecutive saves have failed.
    """
    self._record(self._checkpointer.poll)

  def save(self, step, state, position, evaluation_due):
    """Waits for the previous save and starts to save a step.

    Args:
      step: number of steps done.
      state: TrainState. May be donated once this returns.
      position: position of the stage after this step.
      evaluation_due: whether a resumed run must evaluate this step first.

    Raises:
      UserError: too many consecutive saves have failed.
    """
    with self._ledger.span('save'):
      self._record(self._checkpointer.finish)
      args = step, state, position, evaluation_due
      self._record(self._start_save, *args)

  def finish(self):
    """Waits until the last save is durable.

    Raises:
      UserError: the save failed.
    """
    with self._ledger.span('save'):
      self._record(self._checkpointer.finish, tolerant=False)

  def save_and_finish(self, step, state, position, evaluation_due):
    """Saves a step and waits until the checkpoint is durable.

    If the step is durable already, it is not saved again.

    Args: see `save`.

    Raises:
      UserError: the save failed.
    """
    with self._ledger.span('save'):
      self._record(self._checkpointer.finish)
      if self._checkpointer.durable_step != step:
        args = step, state, position, evaluation_due
        self._record(self._start_save, *args, tolerant=False)
        self._record(self._checkpointer.finish, tolerant=False)

  def _start_save(self, step, state, position, evaluation_due):
    self._stage.saving(step)
    values, arrays = position_lib.split(position)
    items = {
      'params': state.params,
      'opt_state': state.opt_state,
      'guard': state.guard,
    }
    if state.ema is not None:
      items['ema'] = state.ema
    if arrays:
      items[position_lib.ITEM] = arrays
    meta = manifest.Meta(
      config=manifest.config_json(self._config),
      stage=self._stage.name,
      identity=self._stage.identity,
      position=values,
      evaluation_due=evaluation_due,
    )
    self._checkpointer.save(step, items, meta)

  def _record(self, function, *args, tolerant=True):
    """Calls a function and records whether a save became durable or failed.

    Args:
      function: returns the step that became durable, or None.
      *args: arguments of the function.
      tolerant: whether failures up to max_failures are only warnings.
    """
    try:
      durable_step = function(*args)
    except SaveError as error:
      self._failures += 1
      self._ledger.event('not_saved', step=error.step, cause=str(error))
      several_processes = jax.process_count() > 1
      if several_processes and not error.disk_full:
        raise  # another process may have died, which is not a user error
      too_many = self._failures > self._config.checkpoint.max_failures
      if several_processes or too_many or not tolerant:
        newest = self._checkpointer.durable_step
        kept = f'the newest complete checkpoint is step {newest}'
        if newest is None:
          kept = 'there is no complete checkpoint'
        raise UserError(f'{error}; {kept}') from error
      self._say(f'warning: {error}; the run continues')
      return
    if durable_step is not None:
      self._failures = 0
      self._ledger.event('durable', step=durable_step)
