"""Writes the metrics of a run: JSON lines, TensorBoard and wandb.

`metrics.jsonl` in the work directory is the source of truth. Each line is an
object with `step` and scalars whose names carry their units.
"""

import json
import os

from maskdiff.distributed.chips import PEAK_FLOPS
from maskdiff.monitoring import metrics_file, wandb_run


def utilization(tokens_per_s, flops_per_token, devices):
  """Returns model FLOPs utilization in [0, 1]; None if the peak is unknown."""
  peak = PEAK_FLOPS.get(devices[0].device_kind)
  if peak is None:
    return None
  return tokens_per_s * flops_per_token / (peak * len(devices))


class Writer:
  """Writes scalars and texts; does nothing unless `active`."""

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
    import tensorboardX  # only the process that writes needs it

    path = os.path.join(workdir, 'metrics.jsonl')
    rows = read(path)
    with open(path + '.tmp', 'w') as f:
      f.writelines(
        json.dumps(r) + '\n'
        for r in rows
        if start_step and r['step'] <= start_step
      )
    os.replace(path + '.tmp', path)
    self._rows = open(path, 'a')
    self._board = tensorboardX.SummaryWriter(
      os.path.join(workdir, 'tensorboard'),
      purge_step=start_step + 1 if start_step else 0,
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
    self._rows.write(json.dumps({'step': step, **values}) + '\n')
    self._rows.flush()
    for name, value in values.items():
      if not isinstance(value, list):
        self._board.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.scalars(step, values)

  def text(self, step, name, text):
    """Writes a text, such as a sample."""
    if self._active:
      self._rows.write(json.dumps({'step': step, name: text}) + '\n')
      self._rows.flush()
      self._board.add_text(name, f'```\n{text}\n```', step)
      if self._wandb:
        self._wandb.text(step, name, text)

  def close(self):
    if self._active:
      self._rows.close()
      self._board.close()
      if self._wandb:
        self._wandb.close()


def read(path):
  """Returns the valid rows of a metrics.jsonl; [] if it does not exist.

  Raises:
    UserError: the file cannot be read.
  """
  return metrics_file.read(path).values
