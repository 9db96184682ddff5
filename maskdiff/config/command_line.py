"""The command line."""

import re
import sys

from absl import flags
from ml_collections import config_flags

from maskdiff.config.checks import WEIGHTS
from maskdiff.config.keys import check_keys, default, flatten, suggestion
from maskdiff.errors import STATUS_AGAIN, STATUS_USER, Preempted, UserError


def run_script(main, argv=None, positional=False):
  """Parses the command line of a script in launch/ and calls main(FLAGS).

  The script has defined its absl flags; one that is `positional` takes other
  arguments too, and is called as main(FLAGS, arguments). --help prints them
  after its docstring. Everything that the user can fix ends with one line on
  standard error and status 2: an unknown flag or config key, forgotten dashes,
  and every UserError. Status 75 means: start me again.
  """
  argv = sys.argv if argv is None else argv
  if '--help' in argv[1:]:
    print(_help())
    return
  try:
    args, rest = _parse(argv)
    if positional:
      main(args, rest)
    elif rest:
      hint = f'; did you mean --{rest[0]}?' if '=' in rest[0] else ''
      raise UserError(f'unexpected argument {rest[0]!r}{hint}')
    else:
      main(args)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(STATUS_USER)
  except Preempted:  # it has been said
    sys.exit(STATUS_AGAIN)


def _help():
  # Those of this module are --config, --tensor and --dtype.
  known = (flags.FLAGS.main_module_help(), flags.FLAGS.module_help(__name__))
  return '\n'.join([sys.modules['__main__'].__doc__, *filter(None, known)])


def _parse(argv):
  try:
    rest = flags.FLAGS(argv)[1:]
    if 'config' in flags.FLAGS:
      check_keys(flags.FLAGS.config)  # the flag puts its errors off till read
  except UserError:
    raise
  except Exception as e:  # a config file is a program, and may raise anything
    raise UserError(_explain(e, argv)) from e
  return flags.FLAGS, rest


def _explain(error, argv):
  """Says in one line what is wrong with a flag or a config file."""
  if isinstance(error, flags.UnrecognizedFlagError):
    return f'unknown flag --{error.flagname}' + suggestion(
      error.flagname, flags.FLAGS
    )
  keys = flatten(default())
  for argument in argv[1:]:
    match = re.match(r'--config\.([^=]+)', argument)
    if match and match[1] not in keys and match[1] not in default():
      return f'unknown config key {match[1]!r}' + suggestion(match[1], keys)
  # What is left are errors raised by the file, ml_collections' own among them.
  message = str(error).replace('\\', '')
  if match := re.search(r'errors\.UserError: (.*)', message):
    return match[1]
  if match := re.search(r"No such file or directory: ('.*')", message):
    return f'there is no config file {match[1]}'
  if match := re.search(r'Key "(\w+)" does not exist', message):
    neighbours = re.findall(r"'(\w+)':", message)
    return f'unknown config key {match[1]!r} in the config file' + suggestion(
      match[1], neighbours
    )
  if match := re.search(r'Did you mean "(\w+)" instead of "(\w+)"', message):
    return (
      f'unknown config key {match[2]!r} in the config file; '
      f'did you mean {match[1]!r}?'
    )
  if match := re.search(r"override field '(\w+)' .*cast.* to type", message):
    _, _, detail = message.partition('(reference). ')
    return f'config key {match[1]!r}: {_short(detail)}'
  if isinstance(error, flags.Error):
    return _short(message)
  return f'cannot load the config file: {_short(message)}'


def _short(message):
  return ' '.join(str(message).split())[:200]


def define_config_flag():
  """Defines --config FILE with its --config.key=value overrides."""
  config_flags.DEFINE_config_file(
    'config', None, 'A file of configs/, e.g. configs/tiny.py.'
  )


def define_load_flags():
  """Defines --tensor and --dtype: how a trained model lies on the devices.

  They are the arguments of run.load with these names.
  """
  flags.DEFINE_integer(
    'tensor', 1, 'Devices that share every layer.', lower_bound=1
  )
  flags.DEFINE_enum(
    'dtype', None, WEIGHTS, 'Of the weights; default: as stored.'
  )
