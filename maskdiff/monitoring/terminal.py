"""Prints the progress of a training, and tables of text.

A closed terminal, or a full disk under a log, never ends the training.
"""

import contextlib
import sys

from maskdiff.errors import printable

# Printing to a closed stream raises ValueError.
_tolerant = contextlib.suppress(OSError, ValueError)


def warn(text):
  """Prints a line on standard error without breaking a progress bar."""
  import tqdm  # only for warnings and progress bars

  if sys.stderr:
    with _tolerant:
      tqdm.tqdm.write(printable(text), file=sys.stderr)


def print_result(text):
  """Prints the result of a training on standard output."""
  if sys.stdout:
    with _tolerant:
      print(printable(text), flush=True)


class Progress:
  """Progress on standard error: a bar on a terminal, otherwise plain lines.

  Both show the time left. Nothing is printed unless `active`.
  """

  def __init__(self, start_step, steps, active):
    self._steps, self._active, self._bar = steps, active, None
    if active and sys.stderr and sys.stderr.isatty():
      import tqdm

      self._bar = tqdm.tqdm(
        total=steps, initial=start_step, unit='step', dynamic_ncols=True
      )

  def update(self, step, step_s, text):
    """Shows that `step` steps are done; a step takes about step_s seconds."""
    if self._bar:
      with _tolerant:
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix_str(text)
    elif self._active:
      left = _duration(step_s * (self._steps - step))
      self.say(f'step {step}/{self._steps}  {text}  {left} left')

  def say(self, text):
    """Prints a message without breaking the bar; escapes control characters."""
    if not self._active or not sys.stderr:
      return
    with _tolerant:
      if self._bar:
        self._bar.write(printable(text), file=sys.stderr)
      else:
        print(printable(text), file=sys.stderr, flush=True)

  def close(self):
    if self._bar:
      with _tolerant:
        self._bar.close()


def _duration(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def table(rows):
  """Formats rows of cells as aligned columns; integers are right-aligned."""
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
