"""Reads metrics.jsonl, the rows of metrics of a run."""

import os

from maskdiff.monitoring import json_lines


def is_row(value):
  """Returns whether a JSON value is a row: an object with a step.

  The values of metrics are not checked, since stages add metrics of any form.
  """
  return isinstance(value, dict) and json_lines.is_count(value.get('step'))


def each(path):
  """Yields the rows one by one, for files that do not fit in memory.

  Args:
    path: path of a metrics.jsonl.

  Yields:
    Rows; None for each damaged line. Nothing if the file does not exist.

  Raises:
    UserError: the file cannot be read.
  """
  if os.path.exists(path):
    yield from json_lines.each(path, is_row)


def read(path):
  """Reads all rows; returns json_lines.Lines, empty without a file.

  Raises:
    UserError: the file cannot be read.
  """
  if not os.path.exists(path):
    return json_lines.Lines([])
  return json_lines.read(path, is_row)
