"""Sampled answers as batches, their metrics, and configs that are refused."""

import dataclasses

import golden_rl
import made_answers
import numpy as np
import pytest
import rl_runs
import test_policy_loss

from maskdiff import config as config_lib
from maskdiff.config import policy
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.rl import (
  reference,
  rollouts,
  round_metrics,
  scoring,
  stage_config,
  table,
)
from maskdiff.rl.policy_loss import LogProbs
from maskdiff.rl.reward_pool import Rewards
from maskdiff.sampling.recording import Recording
from maskdiff.sampling.settings import DEFAULT

EOS = 2


def recording(prompt, answer):
  """Returns the Recording of an answer that was sampled from the right."""
  slots = len(answer)
  return Recording(
    tokens=np.int32([*prompt, *answer]),
    fill=np.arange(len(prompt) + slots) >= len(prompt),
    steps=np.int32([0] * len(prompt) + list(range(slots, 0, -1))),
    confidence=np.float32([np.nan] * len(prompt) + [0.5] * slots),
  )


def test_seeds_depend_on_run_round_prompt_and_answer():
  found = {
    rollouts.seed(run, round_number, prompt, answer)
    for run in (0, 1)
    for round_number in (0, 1, 'heldout')
    for prompt in range(3)
    for answer in range(3)
  }
  assert len(found) == 2 * 3 * 3 * 3
  made = rollouts.requests(0, 1, [[5], [6, 7]], 2, 3, DEFAULT)
  assert [r.row for r in made[1:3]] == [[5] + [None] * 3, [6, 7] + [None] * 3]
  assert [r.id for r in made] == [0, 1, 2, 3]
  assert made[3].seed == rollouts.seed(0, 1, 1, 1) < 2**32


def test_arrays_of_answers_make_a_batch():
  made = [recording([5, 6], [7, EOS, EOS]), recording([5], [8, 9, 7])]
  arrays = rollouts.arrays(made, 6)
  batch = rollouts.to_batch(arrays, EOS, 1)
  rows = lambda x: np.asarray(x).astype(int).tolist()
  assert rows(batch.tokens) == [[5, 6, 7, 2, 2, 0], [5, 8, 9, 7, 0, 0]]
  assert rows(batch.valid) == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 0]]
  assert rows(batch.answer) == [[0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0]]
  assert rows(batch.counted) == [[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0]]
  assert rows(batch.steps) == [[0, 0, 3, 2, 1, 0], [0, 3, 2, 1, 0, 0]]
  assert rollouts.answer_tokens(made[0], (EOS,)) == [7]
  assert rollouts.answer_tokens(made[1], (EOS, 9)) == [8]
  assert rollouts.sampled_nats(made, EOS) == pytest.approx(np.log(2))


def test_empty_and_constant_groups_are_counted():
  config = config_lib.default()
  config.tokens.eos_id = EOS
  made = [recording([5], [EOS, EOS])] * 2 + [recording([5], [7, 8])] * 2
  answers = rollouts.Answers([], made, 12)
  total = np.array([0.0, 0.0, 1.0, 0.0])
  failed = np.array([False, False, False, True])
  rewards = Rewards(total, failed, {'correct': total}, {}, {})
  row = round_metrics.of_round(config, answers, rewards, 2)
  assert row['train/empty_groups'] == row['train/constant_groups'] == 0.5
  assert row['train/reward'] == row['train/correct'] == 0.25
  assert row['train/failed_rewards'] == 0.25
  assert row['train/answer_tokens'] == (1 + 1 + 2 + 2) / 4
  assert row['train/sampling_forwards'] == 12
  assert 'empty groups 50.0%' in round_metrics.line(row)
  row['train/empty_groups'] = 0.0
  assert 'empty' not in round_metrics.line(row)


@pytest.mark.parametrize('name', policy.METHODS)
def test_empty_answers_have_finite_gradients(name):
  """All answers are empty, or those of one group, whose advantages are 0."""
  for ends, advantages in (
    (0, [1, -1, 0, 0]),
    ([[0], [0], [3], [4]], [0, 0, 1, -1]),
    ([[0], [0], [0], [4]], [0, 0, 1, -1]),
  ):
    batch = test_policy_loss.made_batch(ends=ends)
    s = test_policy_loss.small(name)
    queries = test_policy_loss.drawn(name, s, batch, np.arange(4))
    new = np.where(queries.scored, np.float32(-1), 0)
    value, metrics, derivative = golden_rl.loss(
      name, s, LogProbs(new, new, new), queries, batch, np.float32(advantages)
    )
    assert np.isfinite(value) and np.isfinite(derivative).all()
    for metric, x in metrics.items():
      assert np.isfinite(x), metric
    if not advantages[0] and name != 'vrpo':
      assert not derivative[:, :2].any()


def test_config_has_every_method():
  assert list(policy.METHODS) == list(table.METHODS)


# Refused


@pytest.fixture(scope='module')
def keys(tmp_path_factory, tokenizer):
  path = tmp_path_factory.mktemp('rl')
  (path / 'model').mkdir()
  made_answers.save_model(path / 'model', tokenizer)
  return rl_runs.keys(path / 'model', path / 'rewards.py')


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'train_batch': 8}, 'answers of a round, .* 4 x 4: set .*batch=16'),
    ({'sample_temperature': 0.0}, 'set --config.sample.temperature=1'),
    ({'policy_method': 'vrpo'}, 'use launch/preferences.py'),
    ({'data_length_tokens': ((5, 212),)}, 'length_tokens="'),
    (
      {'objective_name': 'autoregressive', 'policy_method': 'd1'},
      'd1 masks tokens, and .* to espo, justgrpo or reinforce',
    ),
  ],
)
def test_configs_that_do_not_fit(keys, tokenizer, changes, message):
  config = rl_runs.completed(keys)
  stage_config.check(config, tokenizer)
  for key, value in changes.items():
    config.update_from_flattened_dict({key.replace('_', '.', 1): value})
  with pytest.raises(UserError, match=message):
    stage_config.check(config, tokenizer)


@pytest.mark.parametrize(
  'settings, message',
  [
    ((('clip', 0.1),), "has 'clip': .* did you mean 'clip_low'"),
    ((('times', 0.5),), 'times=0.5 must be int'),
    ((('clip_low', -1.0),), 'must not be negative'),
  ],
)
def test_settings_that_a_method_does_not_have(keys, settings, message):
  config = rl_runs.completed(keys, policy_settings=settings)
  with pytest.raises(UserError, match=message):
    stage_config.policy_config(config)


def test_model_tokenizer_and_reference_must_fit(keys, tokenizer, tmp_path):
  with pytest.raises(UserError, match='set --config.init_from'):
    rl_runs.completed(keys | {'init_from': ''})
  config = rl_runs.completed(keys)
  other = dataclasses.replace(tokenizer, fingerprint='0')
  with pytest.raises(UserError, match='differs from the tokenizer of'):
    stage_config.check(config, other)
  wide = made_answers.save_model(tmp_path, tokenizer, model_embed=32)
  config.policy.reference = str(wide)
  with pytest.raises(UserError, match='reference .*model.embed=32, not 16'):
    reference.load_reference(config, mesh_lib.make_mesh())


def test_pairs_of_settings_are_checked():
  config = config_lib.default()
  config.policy.settings = ('clip_low', 0.1)
  with pytest.raises(UserError, match='must be pairs, such as'):
    policy.check(config)


def test_reward_that_is_never_finite_is_one_line(keys, tokenizer):
  name = keys['policy.reward'].replace('share', 'not_finite')
  config = rl_runs.completed(keys, policy_reward=name)
  questions = scoring.open_questions(config, tokenizer)
  asked, prompts = questions.draw('0-0', 2)
  assert [questions.decode(p) for p in prompts] == [
    question['prompt'] for question in asked
  ]
  found = questions.score(asked, ['7', ''])
  scoring.require_rewards('not_finite', found)
  assert found.failed.tolist() == [True, False]
  found = questions.score(asked, ['7', '8'])
  with pytest.raises(UserError, match='failed on all 2 .* not_finite') as error:
    scoring.require_rewards('not_finite', found)
  assert '\n' not in str(error.value)
  short = dataclasses.replace(questions, room=2)
  with pytest.raises(UserError, match='rows have room for 2'):
    short.draw('0-0', 1)
  config.sample.gen_length = 16
  with pytest.raises(UserError, match='leaves no room for a prompt'):
    scoring.open_questions(config, tokenizer)
