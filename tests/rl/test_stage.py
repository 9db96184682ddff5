"""The stage of policy optimization, in short runs of a tiny model."""

import made_answers
import pytest
import tiny

from maskdiff.monitoring import metrics
from maskdiff.rl import stage, stage_config
from maskdiff.training import loop

REWARD = """
def share(question, text):
  return {'total': text.count('e') / max(1, len(text)), 'correct': 0.0}
"""


@pytest.fixture(scope='module')
def model(tmp_path_factory, tokenizer):
  return made_answers.save_model(tmp_path_factory.mktemp('model'), tokenizer)


@pytest.fixture(scope='module')
def reward(tmp_path_factory):
  path = tmp_path_factory.mktemp('rewards') / 'rewards.py'
  path.write_text(REWARD)
  return f'{path}:share'


def config_of(model, reward, **changes):
  """Returns the config of a run of two rounds."""
  keys = {
    **tiny.TRAIN_KEYS,
    'init_from': str(model),
    'policy.task': 'addition',
    'policy.reward': reward,
    'policy.prompts': 4,
    'policy.group': 4,
    'policy.inner_steps': 3,
    'policy.sampling_dtype': 'float32',
    'policy.reward_workers': 1,
    'optimizer.weight_decay': 0.0,
    'train.steps': 6,
    'train.log_every_steps': 1,
    'eval.answers': 4,
    'data.length': 16,
    'sample.gen_length': 6,
    'sample.block_length': 6,
    'sample.steps': 6,
    'sample.temperature': 1.0,
  }
  return stage_config.complete(tiny.config(keys | changes))


def rows(workdir):
  return [r for r in metrics.read(workdir / 'metrics.jsonl')]


def test_run(model, reward, tmp_path):
  config = config_of(model, reward)
  loop.run(config, str(tmp_path / 'run'), stage.make_stage)
  for r in rows(tmp_path / 'run'):
    print(r)
