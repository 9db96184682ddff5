"""Preemption, and agreement between processes on config and code."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import threading
import time

import forked
import pytest

from maskdiff.distributed import consensus
from maskdiff.distributed.consensus import Preemption

ROOT = pathlib.Path(__file__).resolve().parents[2]

# A single process


def test_sigterm_makes_every_later_poll_true():
  before = signal.getsignal(signal.SIGTERM)
  with Preemption() as preemption:
    assert not preemption.poll() and not preemption.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    assert preemption.poll() and preemption.poll()
    os.kill(os.getpid(), signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) is before


def test_handler_is_restored_after_an_error():
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(KeyError), Preemption():
    assert signal.getsignal(signal.SIGTERM) is not before
    raise KeyError
  assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_install_no_handler():
  before, polls = signal.getsignal(signal.SIGTERM), []

  def work():
    with Preemption() as preemption:
      polls.append((preemption.poll(), signal.getsignal(signal.SIGTERM)))

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert polls == [(False, before)]


def test_single_process_always_agrees():
  consensus.agree({'config': 'a'})


def test_code_version_covers_every_room(tmp_path, monkeypatch):
  package = tmp_path / 'maskdiff'
  shutil.copytree(ROOT / 'maskdiff', package)
  version = consensus.code_version()
  monkeypatch.setattr(
    consensus, '__file__', str(package / 'distributed' / 'consensus.py')
  )
  assert consensus.code_version() == version
  (package / 'data' / 'notes.txt').write_text('not code')
  assert consensus.code_version() == version
  rooms = [path.parent for path in package.rglob('__init__.py')]
  assert {package, package / 'data', package / 'distributed'} <= set(rooms)
  versions = [version]

  def record():
    versions.append(consensus.code_version())

  for room in rooms:
    file = max(room.glob('*.py'), key=lambda path: path.stat().st_size)
    file.write_text(file.read_text() + '#\n')
    record()
    file.rename(room / 'renamed.py')
    record()
    (room / 'added.py').write_text('')
    record()
  assert len(set(versions)) == len(versions) == 1 + 3 * len(rooms)


# Several processes

BEGIN = """
import functools, os, sys, time
from maskdiff.distributed import consensus, runtime
print = functools.partial(print, flush=True)
from maskdiff.errors import Preempted
me = int(os.environ['JAX_PROCESS_ID'])
"""


def start(program, *arguments, processes=2):
  """Starts a program in several processes; returns them."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    address = f'localhost:{s.getsockname()[1]}'
  environ = {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'JAX_COORDINATOR_ADDRESS': address,
    'JAX_NUM_PROCESSES': str(processes),
  }
  started = []
  for i in range(processes):
    read, write = os.pipe()
    process = forked.start(
      ['-c', BEGIN + program, *arguments],
      env=environ | {'JAX_PROCESS_ID': str(i)},
      stdin=subprocess.DEVNULL,
      stdout=write,
      stderr=subprocess.PIPE,
    )
    os.close(write)
    process.stdout = open(read)
    started.append(process)
  return started


def end_of(process):
  """Waits for the end; returns the output that is not read, and the errors."""
  _, errors = process.communicate(timeout=100)
  return process.stdout.read(), errors


@pytest.fixture
def run():
  """`start`, whose processes are killed after the test."""
  started = []

  def run(*args, **kwargs):
    started.extend(start(*args, **kwargs))
    return started

  yield run
  for process in started:
    process.kill()
    process.communicate()
    process.stdout.close()


def wait_for(line, process):
  """Reads the output of a process until this line."""
  for text in process.stdout:
    if text.rstrip() == line:
      return
  raise AssertionError(end_of(process)[1])


POLLS = """
try:
  with runtime.started(), consensus.Preemption() as preemption:
    print('here')
    time.sleep(float(sys.argv[1]))
    n = 1
    while not preemption.poll():
      n += 1
      time.sleep(0.02 if me else 0.008)
      assert n < 2000
    print(f'ends at {n}, {preemption.poll()}')
    raise Preempted(n)
except Preempted:
  sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  'preempted, compile_s',
  [
    ([0], 0),
    ([1], 0),
    ([1], 1.5),
    ([0, 1], 0),
  ],
)
def test_sigterm_to_any_process_stops_all_at_the_same_poll(
  run, preempted, compile_s
):
  """The processes poll at different speeds, and never while they compile."""
  processes = run(POLLS, compile_s)
  for process in processes:
    wait_for('here', process)
  time.sleep(0.3)
  for i in preempted:
    processes[i].send_signal(signal.SIGTERM)
  ends = set()
  for process in processes:
    out, err = end_of(process)
    assert process.returncode == 75, err
    assert 'Traceback' not in err and '*** Check failure' not in err
    ends.add(re.search(r'^ends at (\d+), True$', out, re.MULTILINE)[1])
  assert len(ends) == 1
  assert (ends == {'1'}) == bool(compile_s)


AGREES = """
with runtime.started():
  same = {'config': 'c0', 'code': 'v0', 'data': 'd0'}
  consensus.agree(same)
  print('agreed')
  consensus.agree(same | ({'config': f'c{me}', 'data': 'd7'} if me else {}))
"""


@pytest.mark.slow
def test_differences_are_reported_by_all_processes(run):
  processes = run(AGREES, processes=3)
  for i, process in enumerate(processes):
    out, err = end_of(process)
    assert 'agreed' in out.splitlines()
    assert process.returncode == 2, err
    (line,) = [x for x in err.splitlines() if x.startswith('error: ')]
    assert 'config is c0 in process 0, but c1 in process 1, c2 in' in line
    assert 'data is d0 in process 0, but d7 in process 1, d7 in' in line
    assert 'code' not in line.partition(';')[0]
    assert f'(process {i} of 3' in line


def test_at_most_four_differing_processes_are_listed():
  others = [(i, {'code': f'v{i}'}) for i in range(1, 9)]
  message = consensus._disagreement({'config': 'c', 'code': 'v0'}, others)
  assert 'v1 in process 1' in message and 'v4 in process 4' in message
  assert 'v4 in process 4 and 4 more' in message
  assert 'config' not in message


DIES = """
with runtime.started(heartbeat_s=10):
  consensus.agree({})
  print('here')
  time.sleep(200)
"""


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_killed_process_ends_the_others_within_the_heartbeat(run, killed):
  processes = run(DIES)
  for process in processes:
    wait_for('here', process)
  processes[killed].kill()
  began = time.monotonic()
  _, err = end_of(processes[1 - killed])
  seconds = time.monotonic() - began
  assert seconds < 20, 'longer than the heartbeat plus a margin for load'
  assert processes[1 - killed].returncode not in (0, 2), err
