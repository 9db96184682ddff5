"""Path flags of the scripts in launch/: ~ and gs:// are expanded in one place.

A shell expands `--out ~/x`, but not `--out=~/x`.
"""

import os

from maskdiff.errors import UserError
from maskdiff.files.paths import local_path

# Every text flag of launch/ is in one of these sets, which a test compares with
# the scripts. --config is expanded where its file is loaded. A task or a reward
# may also be a name, which stays as it is.
PATHS = frozenset(
  'chat data html in include_path inspect json out plan plot prompts reward '
  'source task tokenizer verify workdir'.split()
)
TEXTS = frozenset(
  'beam chat_arguments host infill length_buckets lengths model model_name '
  'prompt reasoning_gym sample sweep_mesh sweep_remat sweep_rows system tasks '
  'text_key topology'.split()
)
# A run refuses a work directory in a bucket that is written as gs://.
_HOME_ONLY = frozenset({'workdir'})


def expand(args, rest):
  """Expands the path flags of a script in place.

  Args:
    args: FLAGS, parsed.
    rest: arguments that are not flags: work directories.

  Returns:
    `rest`, expanded.

  Raises:
    UserError: names the flag whose bucket is not mounted.
  """
  for name in PATHS & set(args):
    flag = args[name]
    if isinstance(flag.value, str):
      flag.value = _path(name, flag.value)
    elif isinstance(flag.value, list):
      flag.value = [_path(name, value) for value in flag.value]
  return [os.path.expanduser(path) for path in rest]


def _path(name, value):
  # tfds:DIR:SPLIT is a source, and sources expand its DIR.
  if '://' not in value or name in _HOME_ONLY or value.startswith('tfds:'):
    return os.path.expanduser(value)
  try:
    return str(local_path(value))
  except UserError as error:
    raise UserError(f'--{name}: {error}') from error
