"""Settings of the sampler that replace those of a run's config."""

import types

import pytest

from maskdiff import config as config_lib
from maskdiff.config.sample import SETTINGS
from maskdiff.errors import UserError


def test_parse_pairs_splits_at_the_first_equals_sign():
  assert config_lib.parse_pairs(['a=b=c', 'd=']) == {'a': 'b=c', 'd': ''}
  with pytest.raises(UserError, match="'steps': write KEY=VALUE"):
    config_lib.parse_pairs(['steps'])


def test_settings_are_parsed_and_leave_the_config_unchanged():
  config = config_lib.default()
  settings = {'temperature': '0.5', 'top_k': '3', 'stop_at_eos': 'True'}
  s = config_lib.with_settings(config, settings).sample
  assert (s.temperature, s.top_k, s.stop_at_eos) == (0.5, 3, True)
  assert config == config_lib.default()


@pytest.mark.parametrize('block_length, steps', [(64, 10), (4, 12), (1, 10)])
def test_default_is_one_step_per_token(block_length, steps):
  """Blocks have equal numbers of steps, so the last may have more."""
  settings = {'gen_length': 10, 'block_length': block_length}
  s = config_lib.with_settings(config_lib.default(), settings).sample
  assert s.steps == steps


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'gen_length': 0}, r'config\.sample\.gen_length=0: must be at least 1'),
    ({'block_length': 0}, r'block_length=0: must be at least 1'),
    ({'steps': 'x'}, "steps='x': must be int"),
    ({'stop_at_eos': 'maybe'}, "stop_at_eos='maybe': must be bool"),
    ({'prompts': 'a'}, "'prompts': choose among block_length, cache, "),
    ({'top_k': 3}, 'top_k=3 has no effect at temperature 0'),
    ({'remasking': 'randm'}, "did you mean 'random'"),
    ({'top_p': None}, 'top_p=None: must be float'),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    config_lib.with_settings(config_lib.default(), settings)


def flags(open_length=False, **given):
  values = dict.fromkeys(SETTINGS) | given
  return types.SimpleNamespace(open_length=open_length, **values)


def test_flags_override_the_config_of_the_run():
  config = config_lib.default()
  found = config_lib.sample_settings(flags(top_k=0, steps=4), config, 8, False)
  assert found == {'top_k': 0, 'steps': 4, 'gen_length': 8}


def test_open_length_stops_at_eos_and_sees_no_block_ahead():
  config = config_lib.default()
  found = config_lib.sample_settings(flags(open_length=True), config, 8, False)
  assert (found['stop_at_eos'], found['lookahead']) == (True, 0)
  args = flags(open_length=True, lookahead=2)
  found = config_lib.sample_settings(args, config, 8, False)
  assert found['lookahead'] == 2


@pytest.mark.parametrize('name', ['block_diffusion', 'autoregressive'])
def test_open_length_needs_no_lookahead_if_later_slots_are_never_seen(name):
  config = config_lib.default()
  config.objective.name = name
  found = config_lib.sample_settings(flags(open_length=True), config, 8, False)
  assert found == {'stop_at_eos': True, 'gen_length': 8}


def test_gaps_have_steps_of_their_own():
  config = config_lib.default()
  found = config_lib.sample_settings(flags(steps=4), config, 8, True)
  assert 'steps' not in found


@pytest.mark.parametrize(
  'args, gaps, message',
  [
    (
      flags(threshold=0.5),
      False,
      'is for --remasking threshold, quota_and_threshold, longest_prefix or '
      'cumulative_prefix only',
    ),
    (flags(factor=2.0, remasking='random'), False, '--remasking factor only'),
    (flags(stop_at_eos=True), True, 'text follows a gap'),
    (flags(open_length=True), True, 'text follows a gap'),
    (flags(lookahead=1), True, 'text follows a gap'),
  ],
)
def test_flags_without_effect_are_refused(args, gaps, message):
  with pytest.raises(UserError, match=message):
    config_lib.sample_settings(args, config_lib.default(), 8, gaps)
