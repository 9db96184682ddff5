"""Faults that a run survives: SIGKILL, SIGTERM, damaged files, NaN.

Each test causes a fault in launch/pretrain.py, run in one process or several.
Afterwards the run must equal an undisturbed run bit for bit.
docs/reliability.md lists the faults.
"""

import json
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import forked
import pytest
import saved
import tiny

from maskdiff.monitoring import ledger, metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS = 60
SETTINGS = {
  **tiny.TRAIN_KEYS,
  'train.steps': STEPS,
  'train.batch': 16,
  'train.log_every_steps': 3,
  'train.heartbeat_s': 10,
  'eval.every_steps': 25,
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
  return tiny.config_file(path, settings)


def environ(cache):
  """Returns the environment of a process with one device."""
  flags = re.sub(
    r'--xla_force_host_platform_device_count=\d+',
    '--xla_force_host_platform_device_count=1',
    os.environ['XLA_FLAGS'],
  )
  return {
    **os.environ,
    'XLA_FLAGS': flags,
    'PYTHONPATH': str(ROOT),
    # Caches compiled programs, so that restarts are fast.
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }


class Runs:
  """Starts runs in one work directory."""

  def __init__(self, config_file, workdir):
    self.workdir = workdir
    self._cache = config_file.parent / 'compile_cache'
    self._command = [*('--config', str(config_file), '--workdir', str(workdir))]
    self._running = []

  def start(self, *flags, processes=1, **faults):
    """Starts a run; returns the list of processes."""
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
    command = [
      str(ROOT / 'tests' / 'faulty_pretrain.py'),
      *(json.dumps(faults), *self._command, *flags),
    ]
    started = []
    for own in variables:
      # A file, because a pipe that is not read would block the run.
      with tempfile.TemporaryFile('w+') as log:
        process = forked.start(
          command,
          env=environ(self._cache) | own,
          cwd=ROOT,
          stdout=subprocess.DEVNULL,
          stderr=log,
        )
        process.log = os.fdopen(os.dup(log.fileno()))
      started.append(process)
    self._running += started
    return started

  def end_of(self, process, timeout=300):
    """Waits for the end of a process; returns its standard error."""
    process.wait(timeout=timeout)
    process.log.seek(0)
    return process.log.read()

  def finish(self, *flags, processes=1, status=0, timeout=300, **faults):
    """Runs to the end; returns the standard error of the first process."""
    log = None
    for process in self.start(*flags, processes=processes, **faults):
      errors = self.end_of(process, timeout)
      assert process.returncode == status, errors[-4000:]
      log = errors if log is None else log
    return log

  def reached(self):
    """Returns the last step in metrics.jsonl, or 0."""
    rows = metrics.read(self.workdir / 'metrics.jsonl')
    return max([row['step'] for row in rows], default=0)

  def restarts(self):
    """Returns the number of restarts of the work directory."""
    path = self.workdir / 'ledger.jsonl'
    return ledger.goodput(path)['restarts'] if path.exists() else 0

  def wait_for(self, step, processes, restarts=0):
    """Waits until metrics.jsonl has a step, and for a number of restarts.

    The rows of a dead process stay in the file until the next process starts.
    """
    while (restarts and self.restarts() < restarts) or self.reached() < step:
      for process in processes:
        assert process.poll() is None, self.end_of(process)[-4000:]
      time.sleep(0.02)

  def stop_all(self):
    for process in self._running:
      process.kill()
      process.wait()
      process.log.close()


@pytest.fixture
def runs(config_file, tmp_path):
  runs = Runs(config_file, tmp_path / 'run')
  yield runs
  runs.stop_all()


@pytest.fixture(scope='module')
def undisturbed(config_file, tmp_path_factory):
  """Work directory of a run without faults."""
  workdir = tmp_path_factory.mktemp('runs') / 'undisturbed'
  Runs(config_file, workdir).finish()
  return workdir


def rows(workdir):
  """Returns {(step, name): metric} without times; no row may repeat."""
  found = {}
  for row in metrics.read(workdir / 'metrics.jsonl'):
    for name, value in row.items():
      assert (row['step'], name) not in found or name == 'step'
      found[row['step'], name] = value
  times = ('train/step_s', 'train/tokens_per_s')
  return {key: v for key, v in found.items() if key[1] not in times}


def assert_same(workdir, other, same_rows=True):
  (step, _, arrays), (last, _, expected) = map(saved.newest, (workdir, other))
  assert step == last == STEPS
  assert arrays.keys() == expected.keys()
  for name, value in arrays.items():
    assert value.dtype == expected[name].dtype
    assert value.tobytes() == expected[name].tobytes(), name
  if same_rows:
    assert rows(workdir) == rows(other)


def evaluations(workdir):
  return {k: v for k, v in rows(workdir).items() if k[1].startswith('eval/')}


# SIGKILL


@pytest.mark.slow
def test_six_kills_at_random_moments(runs, undisturbed):
  """Kills happen during start-up, steps, saves and evaluations."""
  moments = random.Random(0)
  for kill in range(6):
    restarts = runs.restarts() + bool(kill)
    (process,) = runs.start(step_s=0.05)
    if kill % 4 == 1:
      time.sleep(moments.uniform(0, 3))
    else:
      runs.wait_for(7 * kill + 1, [process], restarts)
      time.sleep(moments.uniform(0, 0.25))
    assert process.poll() is None
    process.kill()
    process.wait()
  runs.finish()
  assert_same(runs.workdir, undisturbed)
  total = ledger.goodput(runs.workdir / 'ledger.jsonl')
  assert total['restarts'] >= 4 and total['lost_s'] > 0
  assert total['steps'] == STEPS


@pytest.mark.slow
def test_kill_during_a_save(runs, undisturbed):
  """Five saves of one run are killed, each at another moment."""
  for save, kill_s in ((14, 0.0), (21, 0.01), (28, 0.03), (35, 0.1), (42, 0.3)):
    (process,) = runs.start(step_s=0.05, kill_s=kill_s, kill_at=save)
    log = runs.end_of(process)
    assert process.returncode == -signal.SIGKILL
    if save > 14:
      assert_resumes_at(log, save - 14, save - 7)
  assert_resumes_at(runs.finish(), 35, 42)
  assert_same(runs.workdir, undisturbed)
  left = {p.name for p in (runs.workdir / 'checkpoints').iterdir()}
  assert left == {'56', str(STEPS)}


def assert_resumes_at(log, *steps):
  assert int(re.search(r'resuming at step (\d+)\n', log)[1]) in steps


@pytest.fixture(scope='module')
def undisturbed_two(config_file, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('runs') / 'two'
  Runs(config_file, workdir).finish(processes=2)
  return workdir


@pytest.mark.slow
def test_kill_of_one_of_two_processes_during_a_save(runs, undisturbed_two):
  """First process 1 is killed, and after a restart process 0."""
  for victim, save in ((1, 14), (0, 28)):
    both = runs.start(processes=2, process=victim, kill_s=0.02, kill_at=save)
    runs.end_of(both[victim])
    assert both[victim].returncode == -signal.SIGKILL
    died = time.monotonic()
    errors = runs.end_of(both[1 - victim], timeout=60)
    assert both[1 - victim].returncode not in (0, 2), errors[-3000:]
    # A heartbeat of 10 s, on a busy machine.
    assert time.monotonic() - died < 25
    if victim == 0:
      assert_resumes_at(runs.end_of(both[0]), 7, 14)
  assert_resumes_at(runs.finish(processes=2), 21, 28)
  assert_same(runs.workdir, undisturbed_two)


# SIGTERM


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes(runs, undisturbed):
  """One run receives a SIGTERM in every phase."""
  for term in ([0, 'compile'], [23, 'step'], [25, 'eval'], [28, 'save']):
    log = runs.finish(status=75, term=term)
    assert f'step {term[0]} is saved' in log
    assert saved.newest(runs.workdir)[0] == term[0]
    if term == [25, 'eval']:
      assert_resumes_at(log, 23)
  assert_resumes_at(runs.finish(), 28)
  assert_same(runs.workdir, undisturbed, same_rows=False)
  assert evaluations(runs.workdir) == evaluations(undisturbed)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_saves_one_step(runs, undisturbed_two):
  """The processes agree on a step within two seconds, at 0.2 s per step.

  Both receive it; `every` is the interval between steps that have the phase.
  """
  step = 0
  for target, phase, every in ((1, 'compile', None), (0, 'save', 7)):
    resumed, term = step, (step // every + 1) * every if every else 0
    log = runs.finish(
      processes=2, status=75, step_s=0.2, process=target, term=[term, phase]
    )
    step, _, _ = saved.newest(runs.workdir)
    assert term <= step < term + 13
    assert f'step {step} is saved' in log
    if resumed:
      assert_resumes_at(log, resumed)
  assert_resumes_at(runs.finish(processes=2), step)
  assert_same(runs.workdir, undisturbed_two, same_rows=False)
  assert evaluations(runs.workdir) == evaluations(undisturbed_two)


# A second process


@pytest.mark.slow
def test_second_process_is_refused_and_the_first_is_unharmed(runs, undisturbed):
  """Also a second run of two processes, of which both end in order."""
  (first,) = runs.start(step_s=0.5)
  runs.wait_for(3, [first])
  for processes in (1, 2):
    before = (runs.workdir / 'ledger.jsonl').read_bytes()
    for second in runs.start(processes=processes):
      errors = runs.end_of(second, timeout=100)
      assert second.returncode == 75, errors[-3000:]
      (line,) = [x for x in errors.splitlines() if x.startswith('error: ')]
      assert f'process {first.pid} on {socket.gethostname()} ' in line
    assert (runs.workdir / 'ledger.jsonl').read_bytes().startswith(before)
  assert first.poll() is None
  first.send_signal(signal.SIGTERM)
  log = runs.end_of(first)
  assert first.returncode == 75, log[-3000:]
  assert runs.restarts() == 0
  runs.finish()  # the lock has ended with the process
  assert_same(runs.workdir, undisturbed, same_rows=False)


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
@pytest.mark.parametrize(
  'damage, processes',
  [(flip, 2), (truncate, 1), (shutil.rmtree, 1)],
)
def test_damaged_checkpoint_is_moved_aside(request, runs, damage, processes):
  reference = request.getfixturevalue(
    'undisturbed_two' if processes == 2 else 'undisturbed'
  )
  shutil.copytree(reference, runs.workdir)
  newest = runs.workdir / 'checkpoints' / str(STEPS)
  damage(newest)
  newest.mkdir(exist_ok=True)
  for _ in range(3):  # two processes may need a restart to agree
    both = runs.start(processes=processes)
    logs = [runs.end_of(p, timeout=200) for p in both]
    if all(p.returncode == 0 for p in both):
      break
  assert [p.returncode for p in both] == [0] * processes, logs[0][-3000:]
  assert 'resuming at step 56' in logs[0]
  assert (runs.workdir / 'checkpoints.aside' / str(STEPS)).is_dir()
  assert_same(runs.workdir, reference)


@pytest.fixture
def small_disk(runs):
  """Mounts a disk of 4 MB for the checkpoints of the run."""
  checkpoints = runs.workdir / 'checkpoints'
  checkpoints.mkdir(parents=True)
  mount = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'none', str(checkpoints)]
  if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip('only root may mount a small disk')
  yield checkpoints
  runs.stop_all()
  subprocess.run(['umount', str(checkpoints)], check=True)


def fill(disk):
  """Fills a disk; returns the file that fills it."""
  ballast = disk / 'ballast'
  with open(ballast, 'wb', buffering=0) as f:
    try:
      while f.write(bytes(4096)):
        pass
    except OSError:
      return ballast


@pytest.mark.slow
def test_run_continues_while_the_disk_is_full(runs, undisturbed, small_disk):
  (process,) = runs.start('--config.checkpoint.max_failures=100', step_s=0.1)
  runs.wait_for(10, [process])
  ballast = fill(small_disk)
  runs.wait_for(25, [process])
  ballast.unlink()
  errors = runs.end_of(process, timeout=120)
  assert process.returncode == 0, errors[-3000:]
  message = 'checkpoint of step 21 is not saved: No space left on device; make'
  assert message in errors and 'the run continues' in errors
  assert_same(runs.workdir, undisturbed)


@pytest.mark.slow
def test_disk_that_stays_full_ends_the_run(runs, undisturbed, small_disk):
  (process,) = runs.start('--config.checkpoint.max_failures=1', step_s=0.1)
  runs.wait_for(10, [process])
  ballast = fill(small_disk)
  errors = runs.end_of(process, timeout=120)
  assert process.returncode == 2
  (line,) = [x for x in errors.splitlines() if x.startswith('error: ')]
  assert 'step 21 is not saved: No space left on device' in line
  assert line.endswith('the newest complete checkpoint is step 7')
  ballast.unlink()
  assert 'resuming at step 7\n' in runs.finish()
  assert_same(runs.workdir, undisturbed, same_rows=False)


def limit_files(process, size):
  """Makes a running process fail at writes beyond a size of a file, bytes."""
  hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.slow
def test_no_row_is_lost_while_nothing_can_be_written(runs, undisturbed):
  """Neither metrics nor ledger, events, checkpoints or the log."""
  (process,) = runs.start('--config.checkpoint.max_failures=100', step_s=0.1)
  runs.wait_for(10, [process])
  limit_files(process, 0)
  time.sleep(1.5)
  reached = runs.reached()
  assert process.poll() is None and reached < 30
  limit_files(process, resource.RLIM_INFINITY)
  runs.wait_for(reached + 6, [process])
  runs.end_of(process)
  assert process.returncode == 0
  assert_same(runs.workdir, undisturbed)
  total = ledger.goodput(runs.workdir / 'ledger.jsonl')
  assert total['steps'] == STEPS and total['restarts'] == 0
  for name in ('metrics.jsonl', 'ledger.jsonl'):
    for line in (runs.workdir / name).read_text().splitlines():
      json.loads(line)


@pytest.mark.slow
def test_sigterm_ends_a_run_that_cannot_write(runs):
  (process,) = runs.start('--config.checkpoint.max_failures=100', step_s=0.1)
  runs.wait_for(10, [process])
  limit_files(process, 0)
  time.sleep(1)
  process.send_signal(signal.SIGTERM)
  process.wait(timeout=10)
  # The checkpoint cannot be saved: 2; and Python makes 120 of any status if
  # the log of the process cannot be written.
  assert process.returncode in (2, 120)
  assert_resumes_at(runs.finish(term=[20, 'step'], status=75), 7)


# Stalled


@pytest.mark.slow
def test_stalled_batch_is_reported_with_stacks(runs, undisturbed):
  log = runs.finish('--config.train.stall_s=0.5', stall=[20, 1.5])
  assert "stall: 'data' has lasted" in log
  assert 'in late\n    time.sleep(stall_s)' in log
  assert_same(runs.workdir, undisturbed)
  total = ledger.goodput(runs.workdir / 'ledger.jsonl')
  assert total['seconds']['data'] > 1.5


# Number of processes


@pytest.mark.slow
def test_run_alternates_between_one_and_two_processes(runs, undisturbed):
  """Losses agree up to rounding: data and noise are the same."""
  runs.finish('--config.train.steps=60', term=[10, 'step'], status=75)
  both = runs.start(processes=2, step_s=0.1)
  runs.wait_for(30, both)
  both[1].send_signal(signal.SIGTERM)
  for process in both:
    process.wait(timeout=120)
  runs.finish()
  bounds, expected = evaluations(runs.workdir), evaluations(undisturbed)
  assert bounds.keys() == expected.keys()
  for key, value in bounds.items():
    assert value == pytest.approx(expected[key], rel=1e-4, abs=1e-6)


# NaN and spikes


@pytest.mark.slow
def test_nan_steps_are_skipped_and_many_in_a_row_stop_the_run(runs):
  nan_steps = [9, 20, 21, *range(40, 60)]
  log = runs.finish(
    '--config.guard.max_in_a_row=4', nan_steps=nan_steps, status=2
  )
  for step in (9, 20, 21, 40, 41, 42, 43):
    assert f'step {step}: update skipped' in log
    first = (step - 1) * 16
    assert f'samples {first} to {first + 15}\n' in log
  assert '4 updates in a row were skipped, up to step 43' in log
  dump = json.loads((runs.workdir / 'skipped_to_step_43.json').read_text())
  assert [u['step'] for u in dump['updates']] == [40, 41, 42, 43]
  assert len(dump['texts_of_the_last']) == 16
  skip = re.search(r'--config\.data\.skip_samples="(\(.*?\),\))"', log)[1]
  assert skip == '((624, 688),)'
  log = runs.finish(f'--config.data.skip_samples={skip}', nan_steps=[9, 20, 21])
  assert 'changed since' in log and 'skip_samples' in log
  # The run resumed after step 42, inside the range of skipped samples.
  step, meta, state = saved.newest(runs.workdir)
  assert (step, meta['position']) == (STEPS, 688 + (STEPS - 42) * 16)
  assert state["['guard']['skipped']"] == 6


@pytest.mark.slow
def test_spikes_are_skipped_once_the_window_is_full(runs):
  """Steps 1 to 128 fill the guard's window. Steps 140 and 141 are spikes."""
  log = runs.finish(
    '--config.guard.spike_sigmas=12',
    '--config.train.steps=160',
    '--config.eval.every_steps=160',
    spike_steps=[140, 141],
  )
  skipped = re.findall(r'step (\d+): update skipped', log)
  assert skipped == ['140', '141']
  step, _, state = saved.newest(runs.workdir)
  assert step == 160 and state["['guard']['skipped']"] == 2
  counts = [v for k, v in state.items() if k.endswith("['count']")]
  assert counts and all(count == 158 for count in counts)


@pytest.mark.slow
def test_skip_samples_applies_across_restarts(runs):
  """Restarts do not change the state of a run that skips samples."""
  steps = '--config.train.steps=32'
  flag = '--config.data.skip_samples=((128, 256),)'
  runs.finish(steps, flag, term=[12, 'step'], status=75)
  runs.finish(steps, flag)
  first = saved.newest(runs.workdir)
  shutil.rmtree(runs.workdir)
  runs.finish(steps, flag)
  again = saved.newest(runs.workdir)
  assert first[1]['position'] == again[1]['position'] == 32 * 16 + 128
  for name, value in first[2].items():
    assert value.tobytes() == again[2][name].tobytes(), name
