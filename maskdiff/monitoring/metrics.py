"""Writes the metrics of a run: JSON lines, TensorBoard and wandb.

`metrics.jsonl` in the work directory is the source of truth. Each line is an
object with `step` and scalars whose names carry their units. A scalar that is
not finite is null.
"""

import functools
import os

from maskdiff.distributed.chips import PEAK_FLOPS
from maskdiff.errors import UserError
from maskdiff.files import appending, atomic, json_text
from maskdiff.monitoring import metrics_file, terminal, wandb_run
from maskdiff.monitoring.tensorboard import Board


def utilization(tokens_per_s, flops_per_token, devices):
  """Returns model FLOPs utilization in [0, 1]; None if the peak is unknown."""
  peak = PEAK_FLOPS.get(devices[0].device_kind)
  if peak is None:
    return None
  return tokens_per_s * flops_per_token / (peak * len(devices))


class Writer:
  """Writes scalars and texts; does nothing unless `active`.

  An error of the disk or of wandb never ends the run, nor does it delay it: see
  files/appending.py and wandb_run.py.
  """

  def __init__(
    self, workdir, start_step, active, wandb_project='', config=None
  ):
    """Opens the files and drops rows after `start_step`.

    An earlier process may have written rows of steps after its last checkpoint.
    This process repeats these steps. With start_step = 0 all old rows are
    dropped.

    Args:
      workdir: directory of the run.
      start_step: step of the restored checkpoint; 0 for a new run.
      active: whether this process writes.
      wandb_project: wandb project that receives the same rows; '' for none.
      config: dict that wandb stores as the config of the run.
    """
    self._active = active
    if not active:
      return
    path = os.path.join(workdir, 'metrics.jsonl')
    drop_later = functools.partial(_drop_later_rows, path, start_step)
    self._rows = appending.lines(path, terminal.warn, drop_later)
    self._board = Board(
      os.path.join(workdir, 'tensorboard'), start_step, terminal.warn
    )
    self._wandb = None
    if wandb_project:
      self._wandb = wandb_run.WandbRun(
        workdir, start_step, wandb_project, config
      )

  def scalars(self, step, values):
    """Writes a row of metrics. Lists are written to metrics.jsonl only."""
    if not self._active:
      return
    self._rows.append(_line({'step': step, **values}))
    self._board.scalars(step, values)
    if self._wandb:
      self._wandb.scalars(step, values)

  def text(self, step, name, text):
    """Writes a text, such as a sample."""
    if self._active:
      text = text.encode(errors='replace').decode()  # no half surrogate pairs
      self._rows.append(_line({'step': step, name: text}))
      self._board.text(step, name, text)
      if self._wandb:
        self._wandb.text(step, name, text)

  def close(self):
    if self._active:
      self._rows.close()
      self._board.close()
      if self._wandb:
        self._wandb.close()


def _line(row):
  return json_text.dumps(row).encode() + b'\n'


def _drop_later_rows(path, start_step):
  """Rewrites a metrics.jsonl without the rows of steps after `start_step`.

  Raises:
    OSError: the file cannot be read or written; it is unchanged.
  """
  rows = []
  # Something else than a file, such as a FIFO, holds no rows; it is replaced.
  if start_step and os.path.isfile(path):
    try:
      found = metrics_file.read(path)
    except UserError as error:
      raise OSError(str(error)) from error
    rows = found.values
    if warning := found.warning(path):
      terminal.warn(f'warning: {warning}')
  kept = [_line(row) for row in rows if row['step'] <= start_step]
  atomic.write(path, b''.join(kept))


def read(path):
  """Returns the valid rows of a metrics.jsonl; [] if it does not exist.

  Raises:
    UserError: the file cannot be read.
  """
  return metrics_file.read(path).values
