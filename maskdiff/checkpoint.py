"""Checkpoints: the train state, the position in the data, and the config.

A thin layer over Orbax's CheckpointManager. A step on disk has three parts:
`params` (plain names such as blocks/q), `opt_state`, and `meta` (JSON: config,
samples seen, fingerprints of the data and the tokenizer), so that sampling
reads the parameters alone.
"""

import json
import os

import jax
import orbax.checkpoint as ocp

from maskdiff.errors import UserError

FORMAT_VERSION = 1


class Checkpointer:
  """Saves and restores train states in a directory.

  Saving is asynchronous: `save` returns once the arrays are copied off the
  device. `close` waits for what is in flight and raises what went wrong.
  """

  def __init__(self, directory, keep, read_only=False):
    """Opens the directory; creates it unless `read_only`.

    Args:
      directory: path.
      keep: number of latest steps to keep; None keeps all.
      read_only: for a directory that a run may be writing to right now.
    """
    self.directory = os.path.abspath(directory)
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
      ),
    )

  def save(self, step, params, opt_state, meta):
    """Starts saving; `meta` is a dict of JSON values.

    Raises:
      RuntimeError: the manager declined, which means a later step is there.
    """
    if step in self._manager.all_steps():
      return
    saved = self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        opt_state=ocp.args.StandardSave(opt_state),
        meta=ocp.args.JsonSave({'format_version': FORMAT_VERSION, **meta}),
      ),
    )
    if not saved:
      raise RuntimeError(
        f'checkpoint of step {step} was not saved: {self.directory} holds '
        f'later steps {self._manager.all_steps()}'
      )

  def latest_step(self):
    """The newest step on disk, or None."""
    return self._manager.latest_step()

  def restore_meta(self, step):
    """The dict given to `save` at this step.

    Raises:
      UserError: the step was written by another version.
    """
    meta = self._manager.restore(
      step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
    ).meta
    if meta['format_version'] != FORMAT_VERSION:
      raise UserError(
        f'{self.directory}/{step} has checkpoint format '
        f'{meta["format_version"]}; this version reads {FORMAT_VERSION}'
      )
    return meta

  def restore(self, step, **targets):
    """Restores parts of a step.

    Args:
      step: int.
      **targets: `params` and, if wanted, `opt_state`: trees of
        ShapeDtypeStructs with shardings.

    Returns:
      The restored trees in the order of the targets.

    Raises:
      UserError: shapes or names on disk differ from the target's.
    """
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          **{k: ocp.args.StandardRestore(v) for k, v in targets.items()}
        ),
      )
    except (ValueError, KeyError) as error:
      raise UserError(
        f'{self.directory}/{step} does not fit this model config: '
        + ' '.join(str(error).split())[:400]
      ) from error
    return tuple(restored[name] for name in targets)

  def close(self):
    """Waits for what is being saved; raises if it could not be."""
    self._manager.wait_until_finished()
    self._manager.close()


def targets(shapes, shardings):
  """Puts shardings onto a tree of shapes, as `restore` wants it."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    shardings,
  )


def open_latest(workdir):
  """Opens a run's checkpoints for reading.

  Args:
    workdir: directory given to `train.run`.

  Returns:
    The Checkpointer, its newest step, and that step's meta.

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
  step = checkpointer.latest_step()
  if step is None:
    raise UserError(f'{directory} is empty: the run saved no checkpoint yet')
  return checkpointer, step, checkpointer.restore_meta(step)


def config_json(config):
  """A ConfigDict as plain JSON values."""
  return json.loads(config.to_json())
