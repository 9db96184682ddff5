"""Reads JSON lines files to which a run appends."""

import contextlib
import json


def read(path):
  """Returns the values of all lines that are valid JSON.

  A crash can cut a line short. Such a line is skipped.

  Raises:
    OSError: the file cannot be opened.
  """
  values = []
  with open(path, errors='replace') as f:
    for line in f:
      with contextlib.suppress(json.JSONDecodeError):
        values.append(json.loads(line))
  return values
