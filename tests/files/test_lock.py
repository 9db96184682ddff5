"""A lock ends with its process and names it, with flock and without."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from maskdiff.errors import InUse, UserError
from maskdiff.files import lock

# Locks the folder of the argument, says so, and waits for standard input. A
# program that it starts and a child that it forks live on.
CHILD = """
import os, subprocess, sys, time
from maskdiff.files import lock
with lock.locked(sys.argv[1]):
  pid = os.fork()
  if not pid:
    sys.stdout.close()
    time.sleep(30)
    os._exit(0)
  program = subprocess.Popen(['sleep', '30'], stdout=subprocess.DEVNULL)
  print(pid, program.pid, flush=True)
  sys.stdin.read()
"""


def start(folder):
  """Returns a process that holds the lock, and the pids of its children."""
  process = subprocess.Popen(
    [sys.executable, '-c', CHILD, str(folder)],
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  return process, [int(pid) for pid in process.stdout.readline().split()]


def test_a_killed_process_loses_the_lock_though_its_children_live(tmp_path):
  process, children = start(tmp_path)
  try:
    with pytest.raises(InUse) as refused, lock.locked(tmp_path):
      pass
    assert f'process {process.pid} on {os.uname().nodename} ' in str(
      refused.value
    )
    assert refused.value.status == 75
    process.kill()
    process.wait()
    assert (tmp_path / lock.NAME).read_bytes()  # it had no time to empty it
    # The forked child closes its copy when it runs for the first time.
    for last in (*[False] * 100, True):
      try:
        with lock.locked(tmp_path, log=pytest.fail):
          break
      except InUse:
        if last:
          raise
        time.sleep(0.1)
  finally:
    process.kill()
    for pid in children:
      os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_the_file_is_emptied_and_can_be_locked_again(tmp_path):
  for _ in range(2):
    with lock.locked(tmp_path) as check:
      check()
      record = json.loads((tmp_path / lock.NAME).read_text())
      assert record['pid'] == os.getpid()
      with pytest.raises(InUse), lock.locked(tmp_path):
        pass
    assert (tmp_path / lock.NAME).read_bytes() == b''


def test_an_error_inside_releases_the_lock(tmp_path):
  with pytest.raises(RuntimeError), lock.locked(tmp_path):
    raise RuntimeError
  assert (tmp_path / lock.NAME).read_bytes() == b''


# Hosts that do not share flock


@pytest.fixture
def fast(monkeypatch):
  """Refreshes often; a dead process is replaced soon."""
  monkeypatch.setattr(lock, 'REFRESH_S', 0.02)
  monkeypatch.setattr(lock, '_POLL_S', 0.02)
  monkeypatch.setattr(lock, 'WATCH_S', 0.5)


@pytest.fixture
def patient(fast, monkeypatch):
  """As `fast`, for live processes, also on a busy machine."""
  monkeypatch.setattr(lock, 'WATCH_S', 30)


def no_flock(monkeypatch, number=errno.ENOLCK):
  def refuse(handle, operation):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, 'flock', refuse)


def leave(folder, **changes):
  """Leaves the file of a process of another host."""
  record = {'host': 'host-3', 'pid': 12, 'kernel': 'other 1', 'id': 'x'}
  (folder / lock.NAME).write_text(json.dumps(record | changes))


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_flock_a_live_process_is_seen_by_its_refreshes(
  tmp_path, patient, monkeypatch, number
):
  no_flock(monkeypatch, number)
  lines = []
  with lock.locked(tmp_path):
    with pytest.raises(InUse, match=f'process {os.getpid()} on '):
      with lock.locked(tmp_path, lines.append):
        pass
  assert 'watching it for up to 30 s' in lines[0]
  with lock.locked(tmp_path, pytest.fail):  # it has ended in order
    pass


def test_a_dead_process_of_another_host_is_waited_for_and_replaced(
  tmp_path, fast
):
  leave(tmp_path)
  lines, before = [], time.monotonic()
  with lock.locked(tmp_path, lines.append) as check:
    assert 0.5 <= time.monotonic() - before < 5
    assert lines[0].startswith('process 12 on host-3 has used ')
    time.sleep(0.1)
    check()
    assert json.loads((tmp_path / lock.NAME).read_text())['pid'] == os.getpid()


def test_two_hosts_that_wait_for_a_dead_one_do_not_both_get_the_lock(
  tmp_path, patient
):
  leave(tmp_path)
  watching = threading.Event()
  errors = []

  def wait():
    try:
      with lock.locked(tmp_path, lambda line: watching.set()):
        pass
    except InUse as error:
      errors.append(str(error))

  thread = threading.Thread(target=wait)
  thread.start()
  watching.wait()
  leave(tmp_path, host='host-4')
  thread.join()
  assert 'process 12 on host-4 writes to it' in errors[0]


def test_a_lock_that_another_host_has_taken_is_noticed(tmp_path, fast):
  with lock.locked(tmp_path) as check:
    check()
    leave(tmp_path)
    with pytest.raises(InUse, match='process 12 on host-3 writes to it'):
      for _ in range(200):
        time.sleep(0.02)
        check()
  assert b'host-3' in (tmp_path / lock.NAME).read_bytes()


# Disks and files


def test_the_lock_holds_on_a_full_disk_and_is_refreshed(
  tmp_path, fast, monkeypatch
):
  write = lock._write
  monkeypatch.setattr(lock, '_write', lambda path, record: None)
  with lock.locked(tmp_path):
    with pytest.raises(InUse, match='another process writes to it'):
      with lock.locked(tmp_path):
        pass
    monkeypatch.setattr(lock, '_write', write)  # the disk has space again
    for _ in range(200):
      time.sleep(0.02)
      if (tmp_path / lock.NAME).stat().st_size:
        break
    assert json.loads((tmp_path / lock.NAME).read_text())['pid'] == os.getpid()


def test_a_file_that_was_removed_is_made_again(tmp_path):
  """A conversion moves its result over the directory."""
  with lock.locked(tmp_path):
    os.unlink(tmp_path / lock.NAME)
    with lock.locked(tmp_path) as check:
      check()
      with pytest.raises(InUse), lock.locked(tmp_path):
        pass


def test_a_full_disk_is_no_obstacle_to_a_refresh(tmp_path, fast, monkeypatch):
  with lock.locked(tmp_path):
    monkeypatch.setattr(lock, '_write', pytest.fail)
    os.utime(tmp_path / lock.NAME, (1, 1))
    for _ in range(200):
      time.sleep(0.02)
      if (tmp_path / lock.NAME).stat().st_mtime > 1:
        break
    assert (tmp_path / lock.NAME).stat().st_mtime > 1
    monkeypatch.undo()


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='cannot lock .*No such file'):
    with lock.locked(tmp_path / 'none'):
      pass

  def read_only(*args):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(os, 'open', read_only)
  with pytest.raises(UserError, match='cannot lock .*Read-only file system'):
    with lock.locked(tmp_path):
      pass


@pytest.mark.parametrize('kind', ['link', 'hard link', 'fifo', 'folder'])
def test_a_planted_file_is_refused(tmp_path, kind):
  path, victim = tmp_path / lock.NAME, tmp_path / 'victim'
  victim.write_text('kept')
  if kind == 'link':
    path.symlink_to(victim)
  elif kind == 'hard link':
    path.hardlink_to(victim)
  elif kind == 'fifo':
    os.mkfifo(path)
  else:
    path.mkdir()
  with pytest.raises(UserError, match='cannot lock.*: delete it'):
    with lock.locked(tmp_path):
      pass
  assert victim.read_text() == 'kept'


@pytest.mark.parametrize(
  'content',
  [b'\xff', b'[1]', b'{"kernel": 3}', b'[' * 4000, b'{"host": "\\u001b[2J"}'],
)
def test_a_damaged_file_is_a_process_without_a_name(tmp_path, fast, content):
  (tmp_path / lock.NAME).write_bytes(content)
  lines = []
  with lock.locked(tmp_path, lines.append):
    pass
  assert lines[0].startswith('another process has used')
