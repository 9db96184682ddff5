"""Loads the file of --config: a program (.py), or a saved config (.json).

A program defines `get_config()`, or `get_config(NAME)` for --config FILE:NAME.
Every other file is read as data, such as the config.json of a run, so that
nothing in it is executed.
"""

import os
import re
import sys
import traceback
import types

from absl import flags
from ml_collections import config_dict

from maskdiff.config import keys
from maskdiff.errors import UserError, one_line, suggestion
from maskdiff.files import reading
from maskdiff.files.paths import local_path

_MAX_BYTES = 1 << 20
_MODULE = 'maskdiff_config_file'


class Parser(flags.ArgumentParser):
  """Parser of the flag that `config_flags.DEFINE_config_file` defines."""

  def parse(self, path):
    """Returns the config of FILE or FILE:NAME, see `load`."""
    return load(path)


def load(path):
  """Returns the config of a file, locked.

  Args:
    path: FILE or FILE:NAME.

  Raises:
    UserError: the file cannot be read, or is not a config. One line.
  """
  path, *name = _split(path)
  try:
    text = reading.read_text(local_path(path), _MAX_BYTES)
  except UserError as error:
    raise UserError(f'--config: {error}') from error
  if path.endswith('.py'):
    return _run(path, text, name)
  if name:
    raise UserError(
      f'--config {path}:{name[0]}: only programs, {path!r} is not *.py, have '
      'entries; leave out the name'
    )
  return keys.from_dict(
    reading.parse_json(text, repr(path), unique_keys=True), repr(path)
  )


def _split(path):
  """Returns [FILE] or [FILE, NAME]; FILE may be gs://... or hold colons."""
  if os.path.exists(os.path.expanduser(path)):
    return [path]
  scheme = re.match('([a-z]+://)?', path)[0]
  file, *name = path.removeprefix(scheme).split(':', 1)
  return [scheme + file, *name]


def _run(path, text, name):
  """Executes a program; returns the result of its function get_config."""
  module = sys.modules[_MODULE] = types.ModuleType(_MODULE)
  module.__file__ = path
  try:
    exec(compile(text, path, 'exec'), module.__dict__)
    config = module.get_config(*name)
  except UserError:
    raise
  except (Exception, SystemExit) as error:  # a program can raise anything
    raise UserError(_explain(path, error)) from error
  if not isinstance(config, config_dict.ConfigDict):
    raise UserError(
      f'get_config of {path!r} must return the config, not a '
      f'{type(config).__name__}'
    )
  return config.lock()


def _explain(path, error):
  """Returns one line on an error of a program."""
  message = str(error)
  if match := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message):
    return (
      f'unknown config key {match[2]!r} in the config file; '
      f'did you mean {match[1]!r}?'
    )
  if match := re.search(r'Key "(\w+)" does not exist', message):
    neighbours = re.findall(r"'(\w+)':", message)
    return f'unknown config key {match[1]!r} in the config file' + suggestion(
      match[1], neighbours
    )
  if match := re.search(r"override field '(\w+)' .*cast.* to type", message):
    _, _, detail = message.partition('(reference). ')
    return f'config key {match[1]!r}: {one_line(detail)}'
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == path]
  where = f'line {lines[-1]}, ' if lines else ''
  return (
    f'cannot load the config file {path!r}: {where}{type(error).__name__}: '
    f'{one_line(error)}'
  )
