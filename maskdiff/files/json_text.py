"""Writes JSON that strict parsers accept."""

import json
import math
import re

_SURROGATE = re.compile(r'[\ud800-\udfff]|\\ud[89a-f]', re.ASCII)
# Control characters that json.dumps leaves as they are.
_CONTROL = re.compile('[\x7f-\x9f]')


def dumps(value, **options):
  """Returns a value as JSON of RFC 8259.

  Python's json module also writes NaN, Infinity and halves of surrogate pairs,
  which other parsers refuse.

  Args:
    value: JSON value. Numbers that are not finite become null, and halves of
      surrogate pairs become U+FFFD. NumPy and JAX arrays become numbers or
      lists. All control characters of texts are escaped as \\uXXXX: the
      escapes of files.streams would not be JSON.
    **options: options of json.dumps, such as indent.

  Raises:
    TypeError: the value has another type.
  """
  options = {'default': _from_array, **options, 'allow_nan': False}
  try:
    text = json.dumps(value, **options)
  except ValueError:
    text = json.dumps(_strict(value), **options)
  # The walk is slow. Few values need it.
  if _SURROGATE.search(text):
    text = json.dumps(_strict(value), **options)
  return _CONTROL.sub(lambda c: f'\\u{ord(c[0]):04x}', text)


def _from_array(value):
  if hasattr(value, 'tolist'):
    return value.tolist()
  raise TypeError(f'{type(value).__name__} is not a JSON value')


def _strict(value):
  """Returns a value without floats and texts that JSON cannot hold."""
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, str):
    pairs = value.encode('utf-16', 'surrogatepass')
    return pairs.decode('utf-16', 'replace')
  if isinstance(value, dict):
    return {_strict(key): _strict(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_strict(item) for item in value]
  return value
