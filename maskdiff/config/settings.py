"""Sampler settings that override the config.sample of a run."""

import math
import numbers
import reprlib

from maskdiff.config.checks import validate
from maskdiff.config.sample import PER_REQUEST, SETTINGS, block_length
from maskdiff.errors import UserError, suggestion

# More denoising steps than this change no token, not even for
# remasking=ancestral, and take hours.
MAX_STEPS_PER_TOKEN = 100
# Settings that only some remasking rules read, and these rules.
OF_RULES = {
  'threshold': (
    'threshold',
    'quota_and_threshold',
    'longest_prefix',
    'cumulative_prefix',
  ),
  'factor': ('factor',),
}


def with_settings(config, settings):
  """Returns a copy of a run's config with some sampler settings overridden.

  Args:
    config: ConfigDict of the run; not changed.
    settings: dict from keys of config.sample to values. A value can be text, as
      on a command line. Without `steps`, the sampler takes one denoising step
      per token.

  Raises:
    UserError: a key is unknown; a value has the wrong type, is not finite or
      has no effect; there are far too many steps; or the resulting config is
      invalid.
  """
  config = config.copy_and_resolve_references()
  s = config.sample
  for key, value in settings.items():
    if key not in SETTINGS:
      raise UserError(
        f'sampler setting {key!r}: choose among {", ".join(sorted(SETTINGS))}'
      )
    try:
      s[key] = _checked(key, _parse(value, type(s[key])))
    except UserError:
      raise
    except (KeyError, TypeError, ValueError) as error:
      raise _wrong_type(key, value) from error
  for key, rules in OF_RULES.items():
    if key in settings and s.remasking not in rules:
      raise UserError(
        f'sampler setting {key}={s[key]} has no effect with '
        f'remasking={s.remasking}: set remasking={_one_of(rules)}, or remove '
        f'{key}'
      )
  if 'steps' in settings:
    check_steps(s.steps, config.data.length)
  if 'steps' not in settings:
    size = max(1, min(block_length(config), s.gen_length))  # validate refuses 0
    s.steps = -(-s.gen_length // size) * size
  validate(config)
  return config


def _one_of(names):
  """Returns names as a list in English, such as 'a, b or c'."""
  *others, last = names
  return f'{", ".join(others)} or {last}' if others else last


def check_steps(steps, context):
  """Raises UserError if a row would take far too many denoising steps.

  Args:
    steps: int.
    context: tokens of a training row.
  """
  if steps > MAX_STEPS_PER_TOKEN * context:
    raise UserError(
      f'sampler setting steps={steps}: must be at most '
      f'{MAX_STEPS_PER_TOKEN * context}, {MAX_STEPS_PER_TOKEN} for each of the '
      f'config.data.length={context} tokens of a row'
    )


def check_names(settings):
  """Checks that requests of one batch may differ in these settings.

  Args:
    settings: dict from keys of config.sample to values.

  Raises:
    UserError: a key is unknown, or its values need different programs.
  """
  for key in settings:
    if key in PER_REQUEST:
      continue
    problem = f'unknown setting {key!r}' + suggestion(key, PER_REQUEST)
    if key in SETTINGS:
      problem = (
        f'another {key} needs another program: set --{key} for all requests'
      )
    raise UserError(
      f'{problem}; settings that may differ by request: '
      f'{", ".join(PER_REQUEST)}'
    )


def check_types(settings):
  """Checks the types of settings from a JSON file.

  Args:
    settings: dict from keys of config.sample to values.

  Raises:
    UserError: a value has another type than its key, is not finite or is not
      between -2^31 and 2^31.
  """
  for key, value in settings.items():
    _checked(key, value)


def sample_settings(args, run_config, gen_length, gaps):
  """Returns the sampler settings that the flags of launch/sample.py set.

  Args:
    args: FLAGS, with those of define_sample_flags.
    run_config: the config of the run.
    gen_length: slots after a prompt.
    gaps: whether the texts have gaps. The result then leaves out `steps`,
      which sampling.settings.for_gaps sets.

  Returns:
    dict for `with_settings`.

  Raises:
    UserError: a flag would have no effect, or does not go with gaps.
  """
  settings = {
    name: getattr(args, name)
    for name in SETTINGS
    if getattr(args, name) is not None
  }
  for key, rules in OF_RULES.items():
    remasking = settings.get('remasking', run_config.sample.remasking)
    if key in settings and remasking not in rules:
      raise UserError(f'--{key} is for --remasking {_one_of(rules)} only')
  if gaps:
    if args.stop_at_eos or args.open_length:
      raise UserError(
        '--stop_at_eos and --open_length are for prompts: text follows a gap'
      )
    if args.lookahead not in (None, -1):
      raise UserError('--lookahead is for prompts: text follows a gap')
    settings.pop('steps', None)
  if args.open_length:
    # Networks of other objectives never see the masks of later blocks.
    sees_all = run_config.objective.name == 'masked_diffusion'
    ahead = {'lookahead': 0} if sees_all else {}
    settings = {'stop_at_eos': True} | ahead | settings
  return settings | {'gen_length': gen_length}


def parse_pairs(texts):
  """Returns a dict from a list of texts KEY=VALUE.

  Raises:
    UserError: a text has no =.
  """
  for text in texts:
    if '=' not in text:
      raise UserError(f'sampler setting {text!r}: write KEY=VALUE')
  return dict(text.split('=', 1) for text in texts)


def _checked(key, value):
  """Returns a value of a setting, as the type of its key."""
  kind = type(SETTINGS[key].default)
  accepted = {
    bool: bool,
    int: numbers.Integral,
    float: numbers.Real,
    str: str,
  }[kind]
  # A bool counts as an integer in Python, but not in JSON.
  if not isinstance(value, accepted) or (
    isinstance(value, bool) and kind is not bool
  ):
    raise _wrong_type(key, value)
  if kind is int and not -(2**31) < value < 2**31:
    raise UserError(
      f'sampler setting {key}={_short(value)}: must be between -2^31 and 2^31'
    )
  try:
    value = kind(value)
  except OverflowError:  # an integer that is too large for a float
    value = math.inf
  if kind is float and not math.isfinite(value):
    raise UserError(f'sampler setting {key}={value}: must be a finite number')
  return value


def _wrong_type(key, value):
  kind = type(SETTINGS[key].default).__name__
  return UserError(f'sampler setting {key}={_short(value)}: must be {kind}')


def _short(value):
  """Returns the start of a value's repr: it may be huge or deeply nested."""
  return reprlib.repr(value)


def _parse(value, kind):
  if not isinstance(value, str) or kind is str:
    return value
  if kind is bool:
    return {'true': True, 'false': False}[value.lower()]
  return kind(value)
