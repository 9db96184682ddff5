"""Command lines of the scripts in launch/: parsing, flags, exit statuses."""

import os
import re
import sys

from absl import flags
from ml_collections import config_flags

from maskdiff.config import config_file, path_flags, sample
from maskdiff.config.key import finite
from maskdiff.config.keys import KEYS, SECTIONS, check_keys
from maskdiff.errors import (
  STATUS_AGAIN,
  STATUS_OUTPUT_CLOSED,
  STATUS_USER,
  OutputClosed,
  Preempted,
  UserError,
  no_checkpoint,
  one_line,
  printable,
  suggestion,
)
from maskdiff.files import streams

# Dtypes to which the weights of a loaded model can be cast.
WEIGHT_DTYPES = ('float32', 'bfloat16')


def run_script(main, argv=None, positional=False):
  """Parses the command line of a script in launch/ and calls main(FLAGS).

  Errors that the user can fix (unknown flags and config keys, missing dashes,
  every UserError) are printed as one line on standard error; the exit status is
  that of the error, mostly 2. After Preempted it is 75: the same command
  resumes the run. If the reader of standard output has ended, as in `| head`,
  it is 141; see files/streams.py. --help, or -h, prints the docstring of the
  script and its flags.

  Args:
    main: function of FLAGS; with `positional`, of FLAGS and a list of the other
      arguments.
    argv: command line; sys.argv by default.
    positional: whether the script takes arguments that are not flags.
  """
  argv = sys.argv if argv is None else argv
  streams.protect()
  try:
    try:
      _run(main, argv, positional)
    finally:
      sys.stdout.flush()  # raises the errors of the last lines
  except UserError as error:
    line = ' '.join(printable(str(error)).splitlines())
    print(f'error: {line}', file=sys.stderr)
    sys.exit(error.status)
  except OutputClosed:
    sys.exit(STATUS_OUTPUT_CLOSED)
  except Preempted:  # the training loop has printed it
    sys.exit(STATUS_AGAIN)


def _run(main, argv, positional):
  if not {'--help', '-help', '-h'}.isdisjoint(argv[1:]):
    print(_help())
    return
  args, rest = _parse(argv)
  rest = path_flags.expand(args, rest)
  if positional:
    main(args, rest)
  elif rest:
    hint = f'; did you mean --{rest[0]}?' if '=' in rest[0] else ''
    raise UserError(f'unexpected argument {rest[0]!r}{hint}')
  else:
    main(args)


def _help():
  # The define_* functions below register their flags under this module.
  known = (flags.FLAGS.main_module_help(), flags.FLAGS.module_help(__name__))
  return '\n'.join([sys.modules['__main__'].__doc__, *filter(None, known)])


def _parse(argv):
  try:
    rest = flags.FLAGS(argv)[1:]
    if 'config' in flags.FLAGS:
      # Reading the flag raises its errors; ml_collections defers them.
      check_keys(flags.FLAGS.config)
      given = flags.FLAGS['config'].override_values
      sample.fit_rule(flags.FLAGS.config, given)
  except UserError:
    raise
  except Exception as e:
    raise UserError(_explain(e, argv)) from e
  for name in flags.FLAGS:
    value = flags.FLAGS[name].value
    if isinstance(value, float) and not finite(value):
      raise UserError(f'--{name}={value}: must be finite')
  return flags.FLAGS, rest


def _explain(error, argv):
  """Returns one line on what is wrong with a flag or a config file."""
  cause = error
  while cause := cause.__cause__ or cause.__context__:
    if isinstance(cause, UserError):  # of the config file
      return str(cause)
  if isinstance(error, flags.UnrecognizedFlagError):
    return f'unknown flag --{error.flagname}' + suggestion(
      error.flagname, flags.FLAGS
    )
  missing = re.match(r'flag --(\w+)=None: .* other than None', str(error))
  if missing:
    return f'--{missing[1]} is missing; --help lists the flags'
  for argument in argv[1:]:
    match = re.match(r'--config\.([^=]+)', argument)
    if match and match[1] not in KEYS and match[1] not in SECTIONS:
      return f'unknown config key {match[1]!r}' + suggestion(match[1], KEYS)
  return one_line(error)


def define_config_flag():
  """Defines --config FILE and its --config.key=value overrides."""
  try:
    config_flags.DEFINE_config_file(
      'config',
      None,
      'File in configs/, such as configs/tiny.py; or config.json of a run.',
    )
  except (flags.Error, OSError, ValueError) as error:
    # ml_collections looks for the flag in the files of --flagfile already here.
    print(f'error: --flagfile: {one_line(error)}', file=sys.stderr)
    sys.exit(STATUS_USER)
  flags.FLAGS['config'].parser = config_file.Parser()


def define_training_flags():
  """Defines the flags of the scripts that train: --config and two others."""
  define_config_flag()
  flags.DEFINE_string(
    'workdir', None, 'Work directory, for checkpoints and metrics.'
  )
  flags.DEFINE_integer(
    'profile',
    0,
    'Trace this many train steps after the first three, and compare the time '
    'of each part of the model with its estimate; see docs/speed.md.',
    lower_bound=0,
  )
  flags.mark_flags_as_required(['config', 'workdir'])


def define_load_flags():
  """Defines --tensor, --dtype, --ema and --rope_scaling of interop.load."""
  flags.DEFINE_integer(
    'tensor',
    1,
    'Tensor parallelism: devices that share each layer.',
    lower_bound=1,
  )
  flags.DEFINE_enum(
    'dtype', None, WEIGHT_DTYPES, 'Dtype of the weights. Default: as stored.'
  )
  define_ema_flag()
  flags.DEFINE_list(
    'rope_scaling',
    None,
    'Two numbers, such as 4096,16384: tokens of a training row, and of the '
    'longest row. Sets config.model.rope_scaling and config.data.length of a '
    'bidirectional model.',
  )


def define_ema_flag():
  """Defines --ema, an argument of interop.load.load."""
  flags.DEFINE_bool(
    'ema',
    False,
    'Take the moving average of the weights (EMA), which runs with '
    'config.train.ema_decay keep, instead of the weights themselves.',
  )


def define_sample_flags():
  """Defines a flag for each key of config.sample except `prompts`.

  The default of each flag is None, which leaves the value of the run's config.
  """
  for name, key in sample.SETTINGS.items():
    kind, bounds = type(key.default), (key.minimum, key.maximum)
    if key.choices:
      flags.DEFINE_enum(name, None, key.choices, key.help)
    elif kind is bool:
      flags.DEFINE_bool(name, None, key.help)
    elif kind is int:
      flags.DEFINE_integer(name, None, key.help, *bounds)
    else:
      flags.DEFINE_float(name, None, key.help, *bounds)


def require_workdir(workdir):
  """Raises UserError unless the directory exists.

  Scripts call it before they import JAX, which takes seconds.
  """
  if not os.path.isdir(workdir):
    raise no_checkpoint(workdir)
