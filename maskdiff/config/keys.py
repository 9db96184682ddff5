"""The default config, built from the sections, and functions on configs.

Each section declares its keys in a file of its own. Files in configs/ call
`default`, change values and return the config. It is locked, so an unknown key
is an error, both in a file and on the command line.
"""

from ml_collections import config_dict

from maskdiff.config import (
  checkpoint,
  data,
  drafter,
  guard,
  lora,
  mesh,
  model,
  objective,
  optimizer,
  policy,
  sample,
  tokens,
  train,
)
from maskdiff.config import eval as evaluation
from maskdiff.config.key import Key, check_value
from maskdiff.errors import UserError, one_line, suggestion

TOP = {
  'seed': Key(
    0,
    'Seed of parameters, data order and noise.',
    minimum=-(2**63),
    maximum=2**63 - 1,
  ),
  'init_from': Key(
    '',
    'Hugging Face folder or work directory whose parameters start the run. '
    'Empty: random parameters.',
  ),
  'init_from_ema': Key(
    False,
    'Start from the moving average of the weights of `init_from`, which must '
    'be the work directory of a run with `train.ema_decay`.',
  ),
}
SECTIONS = {
  'model': model.KEYS,
  'tokens': tokens.KEYS,
  'objective': objective.KEYS,
  'optimizer': optimizer.KEYS,
  'lora': lora.KEYS,
  'drafter': drafter.KEYS,
  'data': data.KEYS,
  'train': train.KEYS,
  'guard': guard.KEYS,
  'eval': evaluation.KEYS,
  'policy': policy.KEYS,
  'sample': sample.KEYS,
  'checkpoint': checkpoint.KEYS,
  'mesh': mesh.KEYS,
}
KEYS = TOP | {
  f'{section}.{name}': key
  for section, keys in SECTIONS.items()
  for name, key in keys.items()
}
CHOICES = {name: key.choices for name, key in KEYS.items() if key.choices}
# {old name: new name} of renamed keys, both dotted, for saved configs.
RENAMED = {}


def default():
  """Returns the default config, locked: a small model that any machine trains.

  Returns:
    ConfigDict of the keys in TOP, and of one ConfigDict per section.
  """
  c = config_dict.ConfigDict({name: key.default for name, key in TOP.items()})
  for section, keys in SECTIONS.items():
    c[section] = config_dict.ConfigDict(
      {name: key.default for name, key in keys.items()}
    )
  return c.lock()


def check_keys(c):
  """Raises UserError unless the config has exactly the keys of `default`."""
  differ = sorted(flatten(c).keys() ^ KEYS.keys())
  if differ:
    some = ', '.join(differ[:6]) + ', ...' * (len(differ) > 6)
    raise UserError(
      f'config keys {some} are missing or unknown: override single keys, not a '
      'whole section'
    )


def choose(entries, name):
  """Returns the entry of a table that --config FILE:NAME selects.

  Args:
    entries: dict from name to entry, such as MACHINES in configs/8b.py.
    name: NAME, the text after the colon.

  Raises:
    UserError: the table has no entry of this name.
  """
  if name not in entries:
    raise UserError(
      f'--config FILE:{name}: choose one of {", ".join(entries)}'
      + suggestion(name, entries)
    )
  return entries[name]


def lookup(c, dotted):
  """Returns the value at a dotted key, such as 'model.heads'."""
  for part in dotted.split('.'):
    c = c[part]
  return c


def flatten(c):
  """Returns {dotted key: value} of a ConfigDict or a nested dict."""
  flat = {}
  for key, value in c.items():
    if isinstance(value, (dict, config_dict.ConfigDict)):
      flat |= {f'{key}.{k}': v for k, v in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def from_dict(tree, name='the saved config'):
  """Converts the nested dict of a saved config to a config.

  A key that was added after the config was saved gets its default, which keeps
  the behaviour of the older version.

  Args:
    tree: JSON value, which may come from somebody else.
    name: how errors call the config.

  Raises:
    UserError: the value is not a dict of sections, has keys that this version
      does not have, or a value is not allowed.
  """
  if not isinstance(tree, dict):
    raise UserError(f'{name} is not a JSON object of config keys')
  saved = {RENAMED.get(k, k): v for k, v in flatten(tree).items()}
  if unknown := sorted(saved.keys() - KEYS.keys()):
    some = ', '.join(unknown[:6]) + ', ...' * (len(unknown) > 6)
    raise UserError(
      one_line(
        f'{name} has the keys {some}, which this version of maskdiff does not '
        'have: use the version that saved it, or remove them'
        + suggestion(unknown[0][:100], KEYS),
        300,
      )
    )
  values = {k: _tuples(v) for k, v in saved.items()}
  for key, value in values.items():
    check_value(f'config.{key}', KEYS[key], value)
  c = default()
  c.update_from_flattened_dict(values)
  for section in (model, tokens, data):  # opening a model relies on them
    section.check(c)
  return c


def _tuples(value):
  """Turns JSON lists into tuples, at all depths."""
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
