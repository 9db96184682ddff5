"""Rewards in processes: errors, limits, order, and the end of the processes."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from slow import SLOW

from maskdiff.errors import UserError
from maskdiff.rl import rewards
from maskdiff.rl.reward_pool import RewardPool

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUESTION = {'prompt': 'What?', 'answer': 'right'}
TIMEOUT_S = 1.5
PROGRAM = """
import os, random, re, subprocess, sys, time
import numpy as np
import beside

def score(question, text):
  name, _, argument = text.partition(' ')
  if name not in BEHAVIOURS:
    return len(text)
  return BEHAVIOURS[name](question, argument)

def hang(question, text):
  time.sleep(60)

def start_others(question, path):
  others = subprocess.Popen(['sleep', '60'])
  open(path, 'w').write(f'{os.getpid()} {others.pid}')
  time.sleep(60)

def hold_the_lock(question, path):
  open(path, 'w').write(str(os.getpid()))
  re.match('(a+)+$', 'a' * 60 + 'b')

def many(question, text):
  return {str(i): 0 for i in range(100)}

def later(question, text):
  time.sleep(float(text))
  return float(text)

def chance(question, text):
  time.sleep(0.02)
  found = {'total': random.random(), 'hash': hash('text') % 10**6}
  return found | {'process': os.getpid()}

class Unprintable(Exception):
  def __str__(self):
    raise ValueError

def raise_unprintable(question, text):
  raise Unprintable

BEHAVIOURS = {
  'raise': lambda q, t: 1 / 0,
  'unprintable': raise_unprintable,
  'hang': hang,
  'start': start_others,
  'lock': hold_the_lock,
  'exit': lambda q, t: sys.exit(3),
  'die': lambda q, t: os._exit(4),
  'kill': lambda q, t: os.kill(os.getpid(), 9),
  'close': lambda q, t: os.closerange(3, 1 << 16),
  'memory': lambda q, t: len('x' * (3 << 30)),
  'nan': lambda q, t: float('nan'),
  'infinite': lambda q, t: {'a': 1, 'b': np.float32('inf')},
  'huge': lambda q, t: 10**400,
  'print': lambda q, t: print('x' * 10**5, flush=True) or 0.5,
  'input': lambda q, t: len(sys.stdin.read()) + 0.5,
  'text': lambda q, t: '1',
  'none': lambda q, t: None,
  'complex': lambda q, t: 1j,
  'nothing': lambda q, t: {},
  'many': many,
  'names': lambda q, t: {1: 2},
  'array': lambda q, t: np.zeros(2),
  'numpy': lambda q, t: np.float32(0.25),
  'parts': lambda q, t: {'a': np.bool_(True), 'b': 0.5},
  'total': lambda q, t: {'total': 3, 'a': True},
  'chance': chance,
  'jax': lambda q, t: 'jax' in sys.modules,
  'later': later,
  'question': lambda q, t: q['answer'] == t,
  'process': lambda q, t: os.getpid(),
}
"""


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp('rewards')
  (folder / 'beside.py').write_text('')
  (folder / 'mine.py').write_text(PROGRAM)
  return rewards.find(f'{folder / "mine.py"}:score')


@pytest.fixture(scope='module')
def pool(source):
  with RewardPool(source, 2, TIMEOUT_S, 500 << 20) as pool:
    yield pool


def score(pool, texts):
  return pool.score([QUESTION] * len(texts), texts)


def wait_for_end(pids, seconds=20):
  """Returns the processes that still run after some time."""
  end = time.monotonic() + seconds
  while (left := list(filter(runs, pids))) and time.monotonic() < end:
    time.sleep(0.02)
  return left


def runs(pid):
  """Returns whether a process runs; a zombie has ended."""
  try:
    status = pathlib.Path(f'/proc/{pid}/stat').read_text()
  except OSError:
    return False
  return status.rpartition(')')[2].split()[0] != 'Z'


@pytest.mark.parametrize(
  'text, kind, message',
  [
    ('raise', 'raised', 'line .*, ZeroDivisionError: division by zero'),
    ('unprintable', 'raised', 'Unprintable'),
    ('exit', 'ended', 'exit 3'),
    ('die', 'ended', 'exit 4'),
    ('kill', 'ended', 'signal 9'),
    ('close', 'ended', ''),
    ('memory', 'memory', 'MemoryError'),
    ('nan', 'not_finite', 'total is nan'),
    ('infinite', 'not_finite', 'b is inf'),
    ('huge', 'not_finite', 'total is inf'),
    ('text', 'wrong_type', 'the reward is a str, not a number'),
    ('none', 'wrong_type', 'the reward is a NoneType, not a number'),
    ('complex', 'wrong_type', 'the reward is a complex'),
    ('array', 'wrong_type', 'the reward is a ndarray'),
    ('nothing', 'wrong_type', 'the reward is a dict'),
    ('many', 'wrong_type', 'the reward is a dict'),
    ('names', 'wrong_type', 'the reward is a dict'),
  ],
)
def test_errors_are_counted_by_kind(pool, text, kind, message):
  found = score(pool, ['ab', text, 'abc'])
  np.testing.assert_array_equal(found.total, [2, 0, 3])
  np.testing.assert_array_equal(found.failed, [False, True, False])
  assert found.errors == {kind: 1}
  (line,) = found.messages.values()
  assert re.match(message, line)


def test_rewards_are_numbers_or_dicts(pool):
  texts = ['numpy', 'parts', 'total', 'print', 'input', 'abcdefg', '\ud800']
  found = score(pool, texts)
  assert not found.errors
  np.testing.assert_array_equal(found.total, [0.25, 1.5, 3, 0.5, 0.5, 7, 1])
  assert sorted(found.parts) == ['a', 'b']
  np.testing.assert_array_equal(found.parts['a'], [0, 1, 1, 0, 0, 0, 0])
  np.testing.assert_array_equal(found.parts['b'], [0, 0.5, 0, 0, 0, 0, 0])
  assert score(pool, []).total.shape == (0,)


def test_empty_answers_have_a_reward(pool):
  found = score(pool, [''] * 6)
  assert not found.errors
  np.testing.assert_array_equal(found.total, np.zeros(6))


def test_order_of_answers_is_kept(pool):
  texts = ['later 0.1', *('x' * n for n in range(50)), 'later 0.05']
  expected = [0.1, *range(50), 0.05]
  np.testing.assert_array_equal(score(pool, texts).total, expected)
  questions = [{**QUESTION, 'answer': name} for name in 'abc']
  found = pool.score(questions, ['question a', 'question x', 'question c'])
  np.testing.assert_array_equal(found.total, [1, 0, 1])


def test_results_do_not_depend_on_the_worker(pool):
  found = score(pool, ['chance'] * 30)
  assert len(set(found.parts['process'])) == 2
  assert len(set(found.total)) == len(set(found.parts['hash'])) == 1


def test_workers_do_not_import_jax(pool):
  assert 'jax' in sys.modules
  np.testing.assert_array_equal(score(pool, ['jax'] * 4).total, np.zeros(4))


def test_hanging_rewards_and_their_processes_are_killed(pool, tmp_path):
  """Also while other threads run JAX."""
  running, square = True, jax.jit(lambda x: x @ x)

  def compute():
    while running:
      square(np.eye(8, dtype='float32')).block_until_ready()

  thread = threading.Thread(target=compute)
  thread.start()
  file = tmp_path / 'pids'
  try:
    started = time.monotonic()
    found = score(pool, ['hang', f'start {file}', 'abc'])
    assert time.monotonic() - started < 20
  finally:
    running = False
    thread.join()
  assert found.errors == {'timeout': 2}
  np.testing.assert_array_equal(found.total, [0, 0, 3])
  pids = list(map(int, file.read_text().split()))
  assert len(pids) == 2
  assert not wait_for_end(pids)
  assert score(pool, ['ab'] * 4).total.sum() == 8


def test_interrupted_call_leaves_no_results(pool, monkeypatch):
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(
      'maskdiff.rl.reward_pool._messages',
      lambda workers: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    score(pool, ['later 0.3', 'later 0.2'])
  np.testing.assert_array_equal(
    score(pool, ['a', 'ab', 'abc']).total, [1, 2, 3]
  )


def test_worker_that_was_killed_between_calls_costs_no_reward(pool):
  score(pool, ['chance'] * 30)  # both have started
  for worker in pool._workers:
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
  found = score(pool, ['a', 'ab', 'abc'])
  assert not found.errors
  np.testing.assert_array_equal(found.total, [1, 2, 3])


def test_workers_that_do_not_start_again_are_errors(pool, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr('maskdiff.rl.reward_pool.sys.executable', '/bin/false')
    found = score(pool, ['die', 'die', 'abc', 'ab'])
  assert found.errors == {'ended': 4}
  np.testing.assert_array_equal(score(pool, ['a', 'ab']).total, [1, 2])


def test_reward_is_checked_on_a_question(pool):
  pool.check(QUESTION)
  broken = {**QUESTION, 'answer': 'raise'}
  message = "mine.py:score' of the right answer to 'What.': raised .line"
  with pytest.raises(UserError, match=message) as error:
    pool.check(broken)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'program, message',
  [
    ('import nothing', 'mine.py.: line 1, ModuleNotFoundError'),
    ('import os\nos._exit(5)', r'a reward worker does not start \(exit 5\)'),
  ],
)
def test_bad_program_ends_the_start(tmp_path, program, message):
  path = tmp_path / 'mine.py'
  path.write_text(program)
  with pytest.raises(UserError, match=message):
    RewardPool(rewards.find(f'{path}:score'), 1)


CALLER = """
import os, signal, sys, threading
from maskdiff.rl import rewards
from maskdiff.rl.reward_pool import RewardPool

path, text, end = sys.argv[1:]
pool = RewardPool(rewards.find(path), 1, timeout_s=0.5 if text else 10)
question = {'prompt': 'What?', 'answer': ''}
print(int(pool.score([question], ['process']).total[0]), flush=True)
if text:
  print('scoring', flush=True)
  threading.Timer(0.2, os.kill, (os.getpid(), getattr(signal, end))).start()
  pool.score([question], [text])
elif end != 'exit':
  os.kill(os.getpid(), getattr(signal, end))
"""


@pytest.mark.parametrize(
  'behaviour, end',
  [
    ('', 'exit'),
    SLOW('', 'SIGTERM'),
    SLOW('hang', 'SIGKILL'),
    SLOW('lock FILE', 'SIGKILL'),
  ],
)
def test_workers_end_with_their_caller(source, tmp_path, behaviour, end):
  """Also a worker that holds the lock of the interpreter at that time."""
  text = behaviour.replace('FILE', str(tmp_path / 'pid'))
  reward = f'{source.path}:{source.name}'
  done = subprocess.run(
    [sys.executable, '-c', CALLER, reward, text, end],
    capture_output=True,
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    text=True,
    timeout=60,
  )
  expected = 0 if end == 'exit' else -getattr(signal, end)
  assert done.returncode == expected, done.stderr
  pid = int(done.stdout.split()[0])
  assert pid != os.getpid()
  assert not wait_for_end([pid], 0 if end == 'exit' else 30)
