"""Shows an answer on standard output while it is sampled."""

import shutil
import unicodedata

from maskdiff.errors import printable
from maskdiff.files import streams


def print_committed(parts):
  """Prints the committed text of an answer as it grows.

  Args:
    parts: iterable of (new, shown), from Conversation.answer.
  """
  try:
    for new, _ in parts:
      print(new, end='', flush=True)
  finally:
    print()


def print_with_masks(parts):
  """Redraws an answer with its masks after every step; needs a terminal.

  Args:
    parts: as for `print_committed`.
  """
  drawn, shown = 0, ''
  try:
    for _, shown in parts:
      size = shutil.get_terminal_size()
      # Lines that have left the screen cannot be drawn again.
      lines = wrap(shown, size.columns - 1)[-max(size.lines - 2, 1) :]
      streams.erase_lines(drawn)
      print('\n'.join(lines), flush=True)
      drawn = len(lines)
  finally:
    streams.erase_lines(drawn)
    print(shown, flush=True)


def wrap(text, columns):
  """Returns the lines of a text on a terminal, a list of str.

  Args:
    text: str; control characters become escapes, as standard output does.
    columns: largest width of a line.
  """
  lines = []
  for line in printable(text).expandtabs(8).split('\n'):
    start, width = 0, 0
    for i, character in enumerate(line):
      size = _width(character)
      if width + size > columns:
        lines.append(line[start:i])
        start, width = i, 0
      width += size
    lines.append(line[start:])
  return lines


def _width(character):
  if unicodedata.combining(character):
    return 0
  return 2 if unicodedata.east_asian_width(character) in 'WF' else 1
