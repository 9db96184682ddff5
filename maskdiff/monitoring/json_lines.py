"""Reads JSON lines files to which a run appends, and checks their values.

The files are not trusted: a crash cuts lines short, disks lose parts, and work
directories come from strangers. Damaged lines are skipped and counted. Every
value is an object; other lines are damaged.
"""

import codecs
import contextlib
import os
from typing import NamedTuple

from maskdiff.errors import UserError
from maskdiff.files import reading

MAX_LINE_BYTES = 16 << 20
# Reading ends after so many bytes of longer lines. A sparse file of terabytes
# takes no space on disk.
MAX_SKIPPED_BYTES = 4 << 30
# `read` keeps all values in memory: 3 million rows of metrics. Each value takes
# at least LINE_OVERHEAD, so that short lines count too.
MAX_BYTES = 4 << 30
LINE_OVERHEAD = 512
MAX_COUNT = 2**53  # larger integers are not exact in float64
# Products and sums of a few numbers up to this size are finite in float64.
MAX_NUMBER = 1e100


class Lines(NamedTuple):
  """Result of `read`: the valid values, and the number of damaged lines."""

  values: list
  num_skipped: int = 0

  def warning(self, path):
    """Returns one line about the damaged lines of a file; '' without any."""
    if not self.num_skipped:
      return ''
    lines = 'line is' if self.num_skipped == 1 else 'lines are'
    return f'{path}: {self.num_skipped:,} damaged {lines} skipped'


def read(path, valid):
  """Reads the valid values of a file.

  Args:
    path: path.
    valid: function from a JSON object to whether it is a value of this file.

  Returns:
    Lines.

  Raises:
    UserError: the file does not exist, cannot be read or is not regular; or its
      values take too much memory.
  """
  values, num_skipped = [], 0
  for value in each(path, valid, MAX_BYTES):
    if value is None:
      num_skipped += 1
    else:
      values.append(value)
  return Lines(values, num_skipped)


def each(path, valid, max_bytes=None):
  """Yields the value of each line, or None for a damaged line.

  A last line without an end is still being written, or was cut short by a kill.
  It is damaged in neither case, so it is left out unless it is valid.

  Args:
    path, valid: see `read`.
    max_bytes: limit on the lengths of all valid lines, with LINE_OVERHEAD for
      each. None for no limit: one value is in memory at a time.

  Raises:
    UserError: see `read`.
  """
  keys = {}  # one string per key instead of one per line halves the memory
  skipped_bytes = valid_bytes = 0
  with reading.open_regular(path) as file, reading.reported(path):
    while line := file.readline(MAX_LINE_BYTES):
      complete = line.endswith(b'\n')
      if len(line) == MAX_LINE_BYTES and not complete:
        yield None
        skipped_bytes += len(line) + _skip_line(file)
        if skipped_bytes > MAX_SKIPPED_BYTES:
          return
        continue
      value = None
      text = line.removeprefix(codecs.BOM_UTF8).lstrip()
      # Millions of lines of another kind must not take minutes.
      if text.startswith(b'{'):
        with contextlib.suppress(UserError, UnicodeDecodeError):
          value = reading.parse_json(text.decode(), 'line')
      if value is not None and valid(value):
        valid_bytes += len(line) + LINE_OVERHEAD
        if max_bytes is not None and valid_bytes > max_bytes:
          raise UserError(
            f'{os.fspath(path)!r} has too many lines to be kept in memory: '
            'move its first lines to another file'
          )
        if isinstance(value, dict):
          value = {keys.setdefault(k, k): x for k, x in value.items()}
        yield value
      elif complete and not line.isspace():
        yield None


def _skip_line(file):
  """Moves a binary file behind the end of its line; returns the bytes read."""
  num_bytes = 0
  # readline would read a gigabyte in pieces of 8 kB.
  while num_bytes <= MAX_SKIPPED_BYTES and (chunk := file.read(1 << 20)):
    num_bytes += len(chunk)
    end = chunk.find(b'\n') + 1
    if end:
      file.seek(end - len(chunk), os.SEEK_CUR)
      break
  return num_bytes


def finite(value):
  """Returns a JSON value as a float; None unless it is a finite number.

  Numbers above MAX_NUMBER count as infinite.
  """
  kind = type(value)
  if (kind is float or kind is int) and -MAX_NUMBER <= value <= MAX_NUMBER:
    return float(value)
  return None


def is_count(value):
  """Returns whether a JSON value is an integer from 0 to MAX_COUNT."""
  return type(value) is int and 0 <= value <= MAX_COUNT
