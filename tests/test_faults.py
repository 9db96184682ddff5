"""What a run survives: killed, told to end, damaged, poisoned.

Each fault is set off in a real run, launch/pretrain.py in a process of its own
or several; afterwards the run must be where an undisturbed one is, bit for
bit. docs/reliability.md has the table.
"""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import saved

from maskdiff import ledger, metrics

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS = 60
SETTINGS = {
  'model.embed': 16,
  'model.layers': 1,
  'model.heads': 2,
  'model.kv_heads': 2,
  'model.head_dim': 8,
  'model.mlp': 16,
  'model.dtype': 'float32',
  'model.remat': 'none',
  'objective.loss_chunk_tokens': 32,
  'optimizer.learning_rate': 1e-2,
  'optimizer.warmup_steps': 2,
  'optimizer.decay_steps': 2,
  'data.length': 16,
  'train.steps': STEPS,
  'train.batch': 16,
  'train.log_every_steps': 3,
  'train.heartbeat_s': 10,
  'eval.every_steps': 25,
  'eval.batch': 16,
  'eval.batches': 2,
  'sample.prompts': (),
  'checkpoint.every_steps': 7,
}


@pytest.fixture(scope='module')
def config_file(corpus, tokenizer, tmp_path_factory):
  settings = SETTINGS | {
    'data.path': str(corpus),
    'data.tokenizer': str(tokenizer.path),
  }
  path = tmp_path_factory.mktemp('config') / 'small.py'
  path.write_text(
    'from maskdiff import config\n\n'
    'def get_config():\n'
    '  c = config.default()\n'
    f'  c.update_from_flattened_dict({settings!r})\n'
    '  return c\n'
  )
  return path


def environ(devices):
  flags = re.sub(
    r'--xla_force_host_platform_device_count=\d+',
    f'--xla_force_host_platform_device_count={devices}',
    os.environ['XLA_FLAGS'],
  )
  return {**os.environ, 'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)}


class Runs:
  """Starts runs in one work directory."""

  def __init__(self, config_file, workdir):
    self.workdir = workdir
    self._command = [*('--config', str(config_file), '--workdir', str(workdir))]
    self._running = []

  def start(self, *flags, processes=1, **faults):
    """Starts a run; returns its processes."""
    variables = [{}]
    if processes > 1:
      with socket.socket() as s:
        s.bind(('localhost', 0))
        address = f'localhost:{s.getsockname()[1]}'
      variables = [
        {
          'JAX_COORDINATOR_ADDRESS': address,
          'JAX_NUM_PROCESSES': str(processes),
          'JAX_PROCESS_ID': str(i),
        }
        for i in range(processes)
      ]
    started = [
      subprocess.Popen(
        [
          *(sys.executable, str(ROOT / 'tests' / 'faulty_pretrain.py')),
          *(json.dumps(faults), *self._command, *flags),
        ],
        env=environ(2 // processes) | own,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for own in variables
    ]
    self._running += started
    return started

  def finish(self, *flags, processes=1, status=0, **faults):
    """Runs to the end; returns what the first process said."""
    said = None
    for process in self.start(*flags, processes=processes, **faults):
      _, errors = process.communicate(timeout=300)
      assert process.returncode == status, errors[-4000:]
      said = errors if said is None else said
    return said

  def reached(self):
    """The last step in the metrics, 0 if there is none."""
    rows = metrics.read(self.workdir / 'metrics.jsonl')
    return max([row['step'] for row in rows], default=0)

  def wait_for(self, step, processes):
    while self.reached() < step:
      for process in processes:
        assert process.poll() is None, process.communicate()[1][-4000:]
      time.sleep(0.02)

  def stop_all(self):
    for process in self._running:
      if process.poll() is None:
        process.kill()
        process.communicate()


@pytest.fixture
def runs(config_file, tmp_path):
  runs = Runs(config_file, tmp_path / 'run')
  yield runs
  runs.stop_all()


@pytest.fixture(scope='module')
def undisturbed(config_file, tmp_path_factory):
  """The work directory of a run that nothing happened to."""
  workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
  Runs(config_file, workdir).finish()
  return workdir


def rows(workdir):
  """All metrics by step and name but for times; each may stand there once."""
  found = {}
  for row in metrics.read(workdir / 'metrics.jsonl'):
    for name, value in row.items():
      assert (row['step'], name) not in found or name == 'step'
      found[row['step'], name] = value
  times = ('train/step_s', 'train/tokens_per_s')
  return {key: v for key, v in found.items() if key[1] not in times}


def assert_same(workdir, other, same_rows=True):
  (step, _, ours), (last, _, theirs) = map(saved.newest, (workdir, other))
  assert step == last == STEPS
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    assert value.dtype == theirs[name].dtype
    assert value.tobytes() == theirs[name].tobytes(), name
  if same_rows:
    assert rows(workdir) == rows(other)


def evaluations(workdir):
  return {k: v for k, v in rows(workdir).items() if k[1].startswith('eval/')}


# Killed


@pytest.mark.slow
def test_twenty_kills_at_any_moment(runs, undisturbed):
  """The last ones come in the middle of steps, saves and evaluations."""
  moments = random.Random(0)
  for kill in range(20):
    (process,) = runs.start(step_s=0.02)
    step = runs.reached()
    if kill % 4:  # some die while they start
      runs.wait_for(min(step + 1, STEPS), [process])
      time.sleep(moments.uniform(0, 0.4))
    else:
      time.sleep(moments.uniform(0, 6))
    process.kill()
    process.communicate()
    if runs.reached() == STEPS:
      break
  runs.finish()
  assert_same(runs.workdir, undisturbed)
  total = ledger.goodput(runs.workdir / 'ledger.jsonl')
  assert total['restarts'] >= 5 and total['lost_s'] > 0
  assert total['steps'] == STEPS


@pytest.mark.slow
@pytest.mark.parametrize('kill_s', [0.0, 0.01, 0.03, 0.1, 0.3])
def test_a_kill_while_a_checkpoint_is_written(runs, undisturbed, kill_s):
  (process,) = runs.start(step_s=0.05, kill_s=kill_s, kill_at=21)
  process.communicate(timeout=300)
  assert process.returncode == -signal.SIGKILL
  said = runs.finish()
  assert re.search(r'resuming at step (14|21)\n', said), said[-3000:]
  assert_same(runs.workdir, undisturbed)
  left = {p.name for p in (runs.workdir / 'checkpoints').iterdir()}
  assert left == {'56', str(STEPS)}


@pytest.fixture(scope='module')
def undisturbed_two(config_file, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'two'
  Runs(config_file, workdir).finish(processes=2)
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_one_of_two_processes_is_killed(runs, undisturbed_two, victim):
  both = runs.start(processes=2, step_s=0.1)
  runs.wait_for(24, both)
  both[victim].kill()
  died = time.monotonic()
  other = both[1 - victim]
  other.communicate(timeout=60)
  assert other.returncode != 0
  assert time.monotonic() - died < 25  # 10 of heartbeat, and the CPU is shared
  assert 'resuming at step' in runs.finish(processes=2)
  assert_same(runs.workdir, undisturbed_two)


# Told to end


@pytest.mark.slow
@pytest.mark.parametrize(
  'term, saved',
  [
    ([0, 'compile'], 0),
    ([23, 'step'], 23),
    ([25, 'eval'], 25),
    ([28, 'save'], 28),
  ],
)
def test_sigterm_saves_the_step_and_the_same_command_goes_on(
  runs, undisturbed, term, saved
):
  said = runs.finish(status=75, term=term)
  assert f'step {saved} is saved' in said
  step, _, _ = saved.newest(runs.workdir)
  assert step == saved
  runs.finish()
  assert_same(runs.workdir, undisturbed, same_rows=False)
  assert evaluations(runs.workdir) == evaluations(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize('told', [0, 1])
def test_sigterm_to_one_of_two_saves_one_step_of_both(
  runs, undisturbed_two, told
):
  both = runs.start(processes=2, step_s=0.1)
  runs.wait_for(12, both)
  both[told].send_signal(signal.SIGTERM)
  for process in both:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors[-3000:]
  step, _, _ = saved.newest(runs.workdir)
  assert 12 <= step < 40 and step % 7
  said = runs.finish(processes=2)
  assert f'resuming at step {step}\n' in said
  assert_same(runs.workdir, undisturbed_two, same_rows=False)
  assert evaluations(runs.workdir) == evaluations(undisturbed_two)


# Damaged


def biggest_file(directory):
  files = [p for p in directory.rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def flip(step):
  path = biggest_file(step / 'params')
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 4
  path.write_bytes(content)


def truncate(step):
  path = biggest_file(step / 'params')
  path.write_bytes(path.read_bytes()[:100])


@pytest.mark.slow
@pytest.mark.parametrize('damage', [flip, truncate, shutil.rmtree])
@pytest.mark.parametrize('processes', [1, 2])
def test_a_damaged_checkpoint_is_set_aside(
  runs, undisturbed, undisturbed_two, damage, processes
):
  whole = undisturbed_two if processes == 2 else undisturbed
  shutil.copytree(whole, runs.workdir)
  newest = runs.workdir / 'checkpoints' / str(STEPS)
  damage(newest)
  newest.mkdir(exist_ok=True)
  for _ in range(3):  # two processes may have to end to agree
    both = runs.start(processes=processes)
    said = [p.communicate(timeout=200)[1] for p in both]
    if all(p.returncode == 0 for p in both):
      break
  assert [p.returncode for p in both] == [0] * processes, said[0][-3000:]
  assert 'resuming at step 56' in said[0]
  assert (runs.workdir / 'checkpoints.aside' / str(STEPS)).is_dir()
  assert_same(runs.workdir, whole)


# Moved


@pytest.mark.slow
def test_two_processes_and_one_take_turns(runs, undisturbed):
  """The data and the noise are the same; sums are rounded differently."""
  runs.finish('--config.train.steps=60', term=[10, 'step'], status=75)
  both = runs.start(processes=2, step_s=0.1)
  runs.wait_for(30, both)
  both[1].send_signal(signal.SIGTERM)
  for process in both:
    process.communicate(timeout=120)
  runs.finish()
  ours, theirs = evaluations(runs.workdir), evaluations(undisturbed)
  assert ours.keys() == theirs.keys()
  for key, value in ours.items():
    assert value == pytest.approx(theirs[key], rel=1e-4, abs=1e-6)


# Poisoned


@pytest.mark.slow
def test_poisoned_steps_are_skipped_and_a_streak_stops_the_run(runs):
  nan_steps = [9, 20, 21, *range(40, 60)]
  said = runs.finish(
    '--config.guard.max_in_a_row=4', nan_steps=nan_steps, status=2
  )
  for step in (9, 20, 21, 40, 41, 42, 43):
    assert f'step {step}: update skipped' in said
    first = (step - 1) * 16
    assert f'samples {first} to {first + 15}\n' in said
  assert '4 updates in a row were skipped, up to step 43' in said
  dump = json.loads((runs.workdir / 'skipped_to_step_43.json').read_text())
  assert [u['step'] for u in dump['updates']] == [40, 41, 42, 43]
  assert len(dump['texts_of_the_last']) == 16
  skip = re.search(r'--config\.data\.skip_samples="(\(.*?\),\))"', said)[1]
  assert skip == '((624, 688),)'
  said = runs.finish(
    f'--config.data.skip_samples={skip}', nan_steps=[9, 20, 21]
  )
  assert 'changed since' in said and 'skip_samples' in said
  step, meta, state = saved.newest(runs.workdir)
  assert (step, meta['samples']) == (STEPS, STEPS * 16 + 64)
  assert state["['guard']['skipped']"] == 3
