"""Results of a benchmark as lines of JSON."""

import json
import pathlib


def read(path):
  """Returns the lines of a file, a list of values."""
  return [json.loads(line) for line in path.read_text().splitlines()]


def has(path, values):
  """Returns whether a file has a line with these values.

  Args:
    path: path of the file; one that does not exist has no line.
    values: dict, a part of the line.
  """
  path = pathlib.Path(path)
  return path.exists() and any(
    values.items() <= line.items() for line in read(path)
  )


def report(lines, out=None):
  """Prints lines, and appends them to a file if there is one.

  Args:
    lines: list of JSON values.
    out: path of the file, or None.
  """
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  print(text, end='', flush=True)
  if out:
    with open(out, 'a') as f:
      f.write(text)
