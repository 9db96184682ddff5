"""Reads config.json, header.txt and plan.json of a work directory.

The files are not trusted: each is read with a bound, and values of wrong types
are left out or refused. A link that leaves the work directory is not followed,
because a report that contains a private file may be published.
"""

import json
import os
import re

from maskdiff import config as config_lib
from maskdiff.config.keys import KEYS
from maskdiff.errors import UserError, one_line
from maskdiff.files import folder, reading
from maskdiff.monitoring.json_lines import MAX_COUNT, finite, is_count

MAX_BYTES = 4 << 20
MAX_HEADER_BYTES = 1 << 20


def read_config(path):
  """Reads a config.json.

  Returns:
    - dict from dotted key to JSON value, with defaults for keys that are
      missing or have a value of another type; {} if the file cannot be read.
    - one line about values or a file that were left out, or ''.
  """
  if not os.path.exists(path):
    return {}, ''
  try:
    content = folder.read_bytes(*os.path.split(path), MAX_BYTES)
    saved = reading.parse_json(content, repr(os.fspath(path)))
  except UserError as error:
    return {}, f'the config is left out: {error}'
  if not isinstance(saved, dict):
    return {}, f'the config is left out: {path} does not hold an object'
  saved = config_lib.flatten(saved)
  wrong = [
    key
    for key, value in saved.items()
    if key in KEYS and not _has_type_of(KEYS[key].default, value)
  ]
  for key in wrong:
    del saved[key]
  defaults = config_lib.flatten(config_lib.default())
  problem = ''
  if wrong:
    names = ', '.join(wrong[:5]) + ', ...' * (len(wrong) > 5)
    problem = f'{path}: wrong types of {names}; defaults are shown'
  return json.loads(json.dumps(defaults)) | saved, problem


def _has_type_of(default, value):
  """Returns whether a JSON value can replace the default of a key."""
  match default:
    case bool() | str():
      return type(value) is type(default)
    case int():
      return type(value) is int and abs(value) <= MAX_COUNT
    case float():
      return finite(value) is not None
    case _:
      return isinstance(value, list)


def read_header(path):
  """Reads a header.txt.

  Returns:
    - the text; '' if there is none.
    - one line about a file that cannot be read, or ''.
  """
  if not os.path.exists(path):
    return '', ''
  try:
    content = folder.read_bytes(*os.path.split(path), MAX_HEADER_BYTES)
  except UserError as error:
    return '', f'the header is left out: {error}'
  return content.decode(errors='replace'), ''


def num_parameters(header):
  """Returns the number in the line `total` of a header, or None."""
  found = re.search(r'^ *total +([0-9][0-9,]{0,30}) *$', header, re.MULTILINE)
  return int(found[1].replace(',', '')) if found else None


def read_plan(path):
  """Reads a plan of a training, as launch/plan.py --json writes it.

  Raises:
    UserError: the file cannot be read or is not the plan of one training.
  """
  try:
    plan = reading.read_json(path, MAX_BYTES)
  except UserError as error:
    raise UserError(f'cannot read the plan: {error}') from error
  if isinstance(plan, list):
    raise UserError(f'{path} is a sweep: plan one config, without --sweep')
  advice = 'write one with launch/plan.py --json FILE'
  if not isinstance(plan, dict) or plan.get('mode') != 'train':
    raise UserError(f'{path} is not the plan of a training: {advice}')
  for key, valid in _PLAN.items():
    if not valid(plan.get(key)):
      value = one_line(repr(plan.get(key)), 60)
      raise UserError(f'{path} is not a plan, since {key} is {value}: {advice}')
  return plan


def _is_text(value):
  return isinstance(value, str)


def _is_positive_or_none(value):
  number = finite(value)
  return value is None or number is not None and number > 0


# Checks of the keys that the report shows.
_PLAN = {
  'status': _is_text,
  'topology': _is_text,
  'num_slices': is_count,
  'chips': is_count,
  'batch': is_count,
  'length': is_count,
  'step_s': _is_positive_or_none,
  'tokens_per_s': _is_positive_or_none,
  'mfu': _is_positive_or_none,
}
