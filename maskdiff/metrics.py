"""Numbers out of a run: JSON lines, TensorBoard, and the terminal.

`metrics.jsonl` in the work directory is the source of truth: one object per
row with `step` and scalars whose names carry their units.
"""

import json
import os
import sys

import tensorboardX
import tqdm

from maskdiff.chips import PEAK_FLOPS


def utilization(tokens_per_s, flops_per_token, devices):
  """Model FLOPs utilization in [0, 1], or None where the peak is not known."""
  peak = PEAK_FLOPS.get(devices[0].device_kind)
  if peak is None:
    return None
  return tokens_per_s * flops_per_token / (peak * len(devices))


class Writer:
  """Appends scalars and texts to files; does nothing if not `active`."""

  def __init__(self, workdir, start_step, active):
    """Opens the files, dropping rows after `start_step`.

    A run that died after its last checkpoint has written rows of steps that
    it will do again; one that starts from scratch (0) keeps none.
    """
    self._active = active
    if not active:
      return
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

  def scalars(self, step, values):
    """Writes a row; values that are lists go to the JSON lines alone."""
    if not self._active:
      return
    self._rows.write(json.dumps({'step': step, **values}) + '\n')
    self._rows.flush()
    for name, value in values.items():
      if not isinstance(value, list):
        self._board.add_scalar(name, value, step)

  def text(self, step, name, text):
    """Writes a text, such as a sample."""
    if self._active:
      self._rows.write(json.dumps({'step': step, name: text}) + '\n')
      self._rows.flush()
      self._board.add_text(name, f'```\n{text}\n```', step)

  def close(self):
    if self._active:
      self._rows.close()
      self._board.close()


def read(path):
  """The rows of a metrics.jsonl; [] if there is none.

  A last line that a crash left unfinished is passed over.
  """
  if not os.path.exists(path):
    return []
  rows = []
  with open(path) as f:
    for line in f:
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return rows


class Progress:
  """A bar with the time left on a terminal, plain lines elsewhere."""

  def __init__(self, start_step, steps, active):
    self._steps, self._active, self._bar = steps, active, None
    if active and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=steps, initial=start_step, unit='step', dynamic_ncols=True
      )

  def update(self, step, step_s, text):
    """Shows that `step` steps are done, at `step_s` seconds each lately."""
    if self._bar:
      self._bar.update(step - self._bar.n)
      self._bar.set_postfix_str(text)
    elif self._active:
      left = _duration(step_s * (self._steps - step))
      self.say(f'step {step}/{self._steps}  {text}  {left} left')

  def say(self, text):
    """Prints a message without breaking the bar."""
    if self._bar:
      self._bar.write(text, file=sys.stderr)
    elif self._active:
      print(text, file=sys.stderr, flush=True)

  def close(self):
    if self._bar:
      self._bar.close()


def _duration(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def table(rows):
  """Lines up rows of cells in columns; numbers to the right."""
  cells = [
    [f'{c:,}' if isinstance(c, int) else str(c) for c in r] for r in rows
  ]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(
      c.rjust(w) if isinstance(raw, int) else c.ljust(w)
      for c, raw, w in zip(line, row, widths, strict=True)
    ).rstrip()
    for line, row in zip(cells, rows, strict=True)
  )
