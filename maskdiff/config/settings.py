"""Settings of the sampler that replace those of a run's config."""

from maskdiff.config.checks import validate
from maskdiff.config.sample import SETTINGS
from maskdiff.errors import UserError


def with_settings(config, settings):
  """Returns a copy of a run's config with other settings of the sampler.

  Args:
    config: ConfigDict of the run; not changed.
    settings: dict from keys of config.sample to values. A value can be text, as
      on a command line. Without `steps`, the sampler takes one denoising step
      per token.

  Raises:
    UserError: a key is unknown, a value has the wrong type, or the config is
      not valid with it.
  """
  config = config.copy_and_resolve_references()
  s = config.sample
  for key, value in settings.items():
    if key not in SETTINGS:
      raise UserError(
        f'sampler setting {key!r}: choose among {", ".join(sorted(SETTINGS))}'
      )
    try:
      s[key] = _parse(value, type(s[key]))
    except (KeyError, TypeError, ValueError) as error:
      raise UserError(
        f'sampler setting {key}={value!r}: must be {type(s[key]).__name__}'
      ) from error
  if s.gen_length < 1:
    raise UserError(f'sampler setting gen_length={s.gen_length}: must be >= 1')
  if 'steps' not in settings:
    size = max(1, min(s.block_length, s.gen_length))
    s.steps = -(-s.gen_length // size) * size
  validate(config)
  return config


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
