"""The check of a whole config."""

from maskdiff.config import (
  data,
  drafter,
  lora,
  model,
  objective,
  optimizer,
  policy,
  sample,
  tokens,
  train,
)
from maskdiff.config import eval as evaluation
from maskdiff.config.key import check_value, require
from maskdiff.config.keys import KEYS, check_keys, lookup


def validate(c):
  """Checks all values of a config before anything is compiled.

  Devices, tokenizers and data files are checked where they are opened.

  Raises:
    UserError: names the key and the fix.
  """
  check_keys(c)
  for name, key in KEYS.items():
    check_value(f'config.{name}', key, lookup(c, name))
  require(
    c.init_from or not c.init_from_ema,
    'config.init_from_ema needs a work directory: set --config.init_from, or '
    '--config.init_from_ema=False',
  )
  for section in (
    model,
    tokens,
    objective,
    optimizer,
    lora,
    drafter,
    data,
    train,
    evaluation,
    sample,
    policy,
  ):
    section.check(c)
