"""The declaration of a config key, and the check of its value."""

import math
from typing import Any, NamedTuple

from maskdiff.errors import UserError, one_line, suggestion

# Bound of integers without another. Steps and positions are int32.
MAX_INT = 2**31 - 1


class Key(NamedTuple):
  """Declares a config key.

  Attributes:
    default: value of the key unless a config file or a flag sets it. Its type
      is the type of the key.
    help: one or two sentences on what the key sets.
    choices: allowed values; () allows every value within the bounds.
    minimum: smallest allowed value, or None.
    maximum: largest allowed value; None for no bound, and for integers MAX_INT.
    above: the value must be larger than this number; None for no bound.
    below: the value must be smaller than this number; None for no bound.
    per_request: (config.sample) whether requests of one batch may differ in the
      value. If not, every new value compiles a new program.
  """

  default: Any
  help: str
  choices: tuple = ()
  minimum: float | None = None
  maximum: float | None = None
  above: float | None = None
  below: float | None = None
  per_request: bool = False


def require(condition, message):
  """Raises UserError with the message unless the condition holds."""
  if not condition:
    raise UserError(message)


def check_choice(name, key, value):
  """Raises UserError if the Key has choices and the value is not one of them.

  `name` is the name of the key in the message.
  """
  require(
    not key.choices or value in key.choices,
    f'{name}={one_line(repr(value), 100)}: choose one of '
    f'{", ".join(key.choices)}' + suggestion(value, key.choices),
  )


def check_value(name, key, value):
  """Checks one value against the declaration of its key.

  Args:
    name: name of the key, for the message.
    key: Key.
    value: value of the key.

  Raises:
    UserError: the value has another type, is not one of the choices, is out of
      bounds, or has a number that is not finite.
  """
  kind, shown = type(key.default), one_line(repr(value), 100)
  require(
    type(value) is kind or (kind is float and type(value) is int),
    f'{name}={shown}: must be {kind.__name__}, not {type(value).__name__}',
  )
  check_choice(name, key, value)
  maximum = key.maximum
  if kind is int:
    maximum = MAX_INT if maximum is None else maximum
  else:
    require(finite(value), f'{name}={shown}: must be finite')
  for bound, text, holds in (
    (key.minimum, 'at least', lambda bound: value >= bound),
    (maximum, 'at most', lambda bound: value <= bound),
    (key.above, 'above', lambda bound: value > bound),
    (key.below, 'below', lambda bound: value < bound),
  ):
    require(
      bound is None or holds(bound),
      f'{name}={shown}: must be {text} {bound}',
    )


def finite(value):
  """Returns whether all numbers in a value, or in nested tuples, are finite.

  Integers beyond int64 count as infinite.
  """
  if isinstance(value, tuple):
    return all(map(finite, value))
  if isinstance(value, int):
    return abs(value) < 2**63
  return not isinstance(value, float) or math.isfinite(value)


def are_numbers(values):
  """Returns whether all elements of a tuple are numbers, and not bool."""
  return all(type(value) in (int, float) for value in values)
