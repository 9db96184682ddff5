"""Policy optimization in two processes, compared with one.

The run of two is ended by a SIGTERM within its first round, and resumed.
"""

import json

import made_answers
import numpy as np
import pytest
import rl_runs
import saved
import test_processes
import tiny
from test_processes import rows_of, start

from maskdiff.rl import stage

pytestmark = pytest.mark.slow

# Appends each call to a file.
COUNTED = """
import json

def counted(question, text):
  with open({path!r}, 'a') as f:
    f.write(json.dumps([question['prompt'], text]) + '\\n')
  return share(question, text)
"""
# Process 1 receives a SIGTERM before the second inner step. JAX looks for
# signals once per second, during which no process goes on.
INTERRUPTED = """
import dataclasses, os, runpy, signal, sys, time
from maskdiff.rl import stage

def interrupted(*args, make_stage=stage.make_stage):
  made = make_stage(*args)

  def next_batch(position, params):
    if (position['round'], position['inner']) == (0, 1):
      if os.environ['JAX_PROCESS_ID'] == '1':
        os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(2.5)
    return made.next_batch(position, params)

  return dataclasses.replace(made, next_batch=next_batch)

stage.make_stage = interrupted
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture(scope='module')
def keys(tokenizer, tmp_path_factory):
  folder = tmp_path_factory.mktemp('rl')
  model = made_answers.save_model(folder, tokenizer)
  return rl_runs.keys(model, folder / 'rewards.py')


def counting(keys, folder):
  """Returns keys of a run whose reward writes its calls to a folder."""
  program = folder / 'rewards.py'
  text = COUNTED.format(path=str(folder / 'calls.jsonl'))
  program.write_text(rl_runs.REWARD + text)
  return keys | {'policy.reward': f'{program}:counted'}


def calls(folder):
  """Returns the questions and answers of which the reward was computed."""
  return sorted((folder / 'calls.jsonl').read_text().splitlines())


@pytest.fixture(scope='module')
def one(keys, tmp_path_factory):
  """Returns the folder of a run of one process."""
  folder = tmp_path_factory.mktemp('one')
  config = rl_runs.completed(counting(keys, folder))
  test_processes.run(config, folder / 'run', stage.make_stage)
  return folder


@pytest.fixture(scope='module')
def two(keys, tmp_path_factory):
  """Returns the folder of a run of two, and the results of both starts."""
  folder = tmp_path_factory.mktemp('two')
  file = tiny.config_file(folder / 'config.py', counting(keys, folder))
  arguments = 'rl.py', '--config', file, '--workdir', folder / 'run'
  stopped = start(*arguments, program=INTERRUPTED)
  return folder, stopped, start(*arguments)


def test_sigterm_to_one_process_is_resumed_within_the_round(two):
  folder, stopped, resumed = two
  assert [status for _, _, status in stopped] == [75, 75], stopped
  assert [status for _, _, status in resumed] == [0, 0], resumed
  assert 'resuming at step 1' in resumed[0][1]
  steps = (folder / 'run' / 'checkpoints').iterdir()
  assert sorted(int(step.name) for step in steps) == [1, 4, 6]
  meta = folder / 'run' / 'checkpoints' / '1' / 'meta' / 'metadata'
  position = json.loads(meta.read_text())['position']
  assert (position['round'], position['inner']) == (0, 1)


def test_two_processes_have_the_metrics_of_one(one, two):
  """Answers and rewards are equal, losses up to rounding."""
  rows, expected = rows_of(two[0] / 'run'), rows_of(one / 'run')
  assert rows.keys() == expected.keys()
  for (step, name), value in rows.items():
    of_one = expected[step, name]
    if isinstance(value, str) or name.endswith(('reward', 'groups', 'tokens')):
      assert value == of_one, name
    else:
      assert value == pytest.approx(of_one, rel=1e-4, abs=1e-6), name


def test_two_processes_have_the_answers_and_parameters_of_one(one, two):
  folders = one / 'run', two[0] / 'run'
  within = [  # a round
    saved.arrays(f / 'checkpoints' / '4' / 'position')['rollout']
    for f in folders
  ]
  for name in ('tokens', 'steps', 'slots', 'advantages'):
    np.testing.assert_array_equal(*(rollout[name] for rollout in within))
  expected, found = (rollout['log_probs'] for rollout in within)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  (_, _, expected), (_, _, found) = map(saved.newest, folders)
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, 1e-5, 2e-6, err_msg=name)


def test_the_reward_of_an_answer_is_computed_once(one, two):
  """Each start checks the reward on two answers to a question."""
  expected = calls(one)
  assert len(expected) == 2 + 2 * 16 + 2 * 4
  again = calls(two[0])
  checked = [call for call in set(again) if again.count(call) > 1]
  for call in checked[:2]:
    again.remove(call)
  assert again == expected


# A reward that fails on all answers, and a pool that fails in process 0.
FAILING = """
import pathlib, sys, types
from maskdiff import config as config_lib
from maskdiff.config import config_file
from maskdiff.data import tokenizer
from maskdiff.distributed import runtime
from maskdiff.rl import reward_pool, scoring

config = config_file.load(sys.argv[1])
tok = tokenizer.load(config.init_from)

def fail(*args):
  raise RuntimeError('no pool')

with runtime.started(heartbeat_s=5):
  questions = scoring.open_questions(config, tok)
  asked, _ = questions.draw('0', 2)
  print(questions.score(asked, ['7', '']).failed.tolist())
  if sys.argv[2] == 'pool':
    reward_pool.RewardPool.score = fail
  scoring.require_rewards('not_finite', questions.score(asked, ['7', '8']))
"""


@pytest.mark.parametrize('failing', ['reward', 'pool'])
def test_failing_rewards_end_all_processes(keys, tmp_path, failing):
  reward = keys['policy.reward'].replace('share', 'not_finite')
  file = tiny.config_file(tmp_path / 'c.py', keys | {'policy.reward': reward})
  script = tmp_path / 'failing.py'
  script.write_text(FAILING)
  (out, err, status), (other_out, other_err, other_status) = start(
    script, file, failing
  )
  assert out == other_out == '[True, False]\n', err + other_err
  if failing == 'reward':
    assert status == other_status == 2
    for text in (err, other_err):
      (line,) = [x for x in text.splitlines() if x.startswith('error: ')]
      assert 'failed on all 2 answers of a round' in line
  else:
    assert status == 1 and 'RuntimeError: no pool' in err
    assert other_status not in (0, 2)
