"""The declaration of a config key, and the check of its value."""

from typing import Any, NamedTuple

from maskdiff.errors import UserError, suggestion


class Key(NamedTuple):
  """Declares a config key.

  Attributes:
    default: value of the key unless a config file or a flag sets it. Its type
      is the type of the key.
    help: one or two sentences on what the key sets.
    choices: allowed values; () allows every value within the bounds.
    minimum: smallest allowed value, or None.
    maximum: largest allowed value, or None.
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
    f'{name}={value!r}: choose one of {", ".join(key.choices)}'
    + suggestion(value, key.choices),
  )


def check_value(name, key, value):
  """Checks one value against the declaration of its key.

  Args:
    name: name of the key, for the message.
    key: Key.
    value: value of the key.

  Raises:
    UserError: the value is not one of the choices, or is out of bounds.
  """
  check_choice(name, key, value)
  # NaN fails every bound, since its comparisons are false.
  for bound, text, holds in (
    (key.minimum, 'at least', lambda bound: value >= bound),
    (key.maximum, 'at most', lambda bound: value <= bound),
    (key.above, 'above', lambda bound: value > bound),
    (key.below, 'below', lambda bound: value < bound),
  ):
    require(
      bound is None or holds(bound),
      f'{name}={value}: must be {text} {bound}',
    )
