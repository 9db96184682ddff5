"""Sampler settings that override the config.sample of a run."""

from maskdiff.config.checks import validate
from maskdiff.config.sample import PER_REQUEST, SETTINGS
from maskdiff.errors import UserError, suggestion


def with_settings(config, settings):
  """Returns a copy of a run's config with some sampler settings overridden.

  Args:
    config: ConfigDict of the run; not changed.
    settings: dict from keys of config.sample to values. A value can be text, as
      on a command line. Without `steps`, the sampler takes one denoising step
      per token.

  Raises:
    UserError: a key is unknown, a value has the wrong type, or the resulting
      config is invalid.
  """
  config = config.copy_and_resolve_references()
  s = config.sample
  for key, value in settings.items():
    if key not in SETTINGS:
      raise UserError(
        f'sampler setting {key!r}: choose among {", ".join(sorted(SETTINGS))}'
      )
    try:
      if value is None:
        raise TypeError('ConfigDict accepts None for any type')
      s[key] = _parse(value, type(s[key]))
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(
        f'sampler setting {key}={value!r}: must be {type(s[key]).__name__}'
      ) from error
  if 'steps' not in settings:
    size = max(1, min(s.block_length, s.gen_length))  # validate refuses 0
    s.steps = -(-s.gen_length // size) * size
  validate(config)
  return config


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
  for key in ('threshold', 'factor'):
    remasking = settings.get('remasking', run_config.sample.remasking)
    if key in settings and remasking != key:
      raise UserError(f'--{key} is for --remasking {key} only')
  if gaps:
    if args.stop_at_eos or args.open_length:
      raise UserError(
        '--stop_at_eos and --open_length are for prompts: text follows a gap'
      )
    if args.lookahead not in (None, -1):
      raise UserError('--lookahead is for prompts: text follows a gap')
    settings.pop('steps', None)
  if args.open_length:
    settings = {'stop_at_eos': True, 'lookahead': 0} | settings
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


def _parse(value, kind):
  if not isinstance(value, str) or kind is str:
    return value
  if kind is bool:
    return {'true': True, 'false': False}[value.lower()]
  return kind(value)
