"""No line is lost or cut while a file cannot be written."""

import errno
import os
import resource
import shutil
import stat

import pytest

from maskdiff.files import appending

LINES = [b'{"line": %d}\n' % i for i in range(20)]


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'folder' / 'a.jsonl'


@pytest.fixture
def warnings():
  return []


@pytest.fixture
def file(path, warnings):
  path.parent.mkdir()
  return appending.lines(path, warnings.append)


@pytest.mark.parametrize(
  'error',
  [
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.ESTALE, errno.EIO),
  ],
)
@pytest.mark.parametrize('room', [0, 1, 5, len(LINES[0]) - 1])
def test_lines_wait_until_there_is_room(
  file, path, disk, warnings, error, room
):
  """A write may stop at any byte; the file never ends within a line."""
  file.append(LINES[0])
  disk.room, disk.error = room, error
  for line in LINES[1:10]:
    file.append(line)
    assert path.read_bytes() == LINES[0]
  disk.room = None
  file.append(LINES[10])
  assert path.read_bytes() == b''.join(LINES[:11])
  file.close()
  assert warnings == [
    f'warning: cannot write {path} ({os.strerror(error)}); the run continues, '
    'and up to 16 MiB wait in memory',
    f'{path} is written again',
  ]


def test_oldest_lines_are_dropped_and_counted(
  file, path, disk, warnings, monkeypatch
):
  monkeypatch.setattr(appending, 'MAX_PENDING_BYTES', 3 * len(LINES[0]))
  disk.room = 0
  for line in LINES[:9]:
    file.append(line)
  assert file.nearly_full
  disk.room = None
  file.append(LINES[9])
  assert path.read_bytes() == b''.join(LINES[6:10])
  assert warnings[1:] == [f'{path} is written again; it lacks 6 entries']
  file.close()


def test_closed_file_names_the_lines_that_it_lacks(file, path, disk, warnings):
  disk.room = 0
  file.append(LINES[0])
  file.close()
  assert warnings[1:] == [f'warning: {path} lacks 1 entry']


def test_retries_are_rare(file, disk, monkeypatch):
  """A hundred rows per second must not mean a hundred attempts."""
  monkeypatch.setattr(appending, 'RETRY_S', 1)
  file.append(LINES[0])
  attempts = []
  write = lambda *_: attempts.append(1) or disk.write(*_)
  monkeypatch.setattr(os, 'write', write)
  disk.room = 0
  for line in LINES:
    file.append(line)
  assert len(attempts) == 1


def test_disk_at_its_edge_is_reported_once(file, path, disk, warnings):
  for line in LINES:
    disk.room = 0
    file.append(line)
    disk.room = None
    file.append(line)
  assert len(warnings) == 2


def test_directory_that_vanishes_and_comes_back(file, path, disk, warnings):
  """The last lines are in memory, so that the new file has them."""
  for line in LINES[:3]:
    file.append(line)
  shutil.rmtree(path.parent)
  file.append(LINES[3])
  assert not path.parent.exists()
  assert 'No such file or directory' in warnings[0]
  path.parent.mkdir()
  file.append(LINES[4])
  assert path.read_bytes() == b''.join(LINES[:5])


def test_lines_that_the_system_lost_are_written_again(file, path, disk):
  """A network file system accepts lines and fails later."""
  for line in LINES[:6]:
    file.append(line)
  os.truncate(path, sum(map(len, LINES[:3])) + 4)
  disk.room, disk.error = 0, errno.EDQUOT
  file.append(LINES[6])
  disk.room = None
  file.append(LINES[7])
  assert path.read_bytes() == b''.join(LINES[:8])


def test_error_while_closing_is_repaired(file, path, monkeypatch):
  close, failed = os.close, []

  def lose(handle):
    close(handle)
    if not failed and stat.S_ISREG(os.stat(path).st_mode):
      failed.append(1)
      os.truncate(path, 4)
      raise OSError(errno.EDQUOT, 'Disk quota exceeded')

  for line in LINES:
    file.append(line)
  monkeypatch.setattr(os, 'close', lose)
  file.close()
  assert failed and path.read_bytes() == b''.join(LINES)


def test_interrupted_write_is_repaired(file, path, disk, monkeypatch):
  """Ctrl-C in the middle of a line."""
  file.append(LINES[0])

  def interrupt(handle, content):
    disk.write(handle, content[:5])
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(os, 'write', interrupt)
    file.append(LINES[1])
  file.close()
  assert path.read_bytes() == b''.join(LINES[:2])


@pytest.mark.parametrize(
  'before, after',
  [
    (b'', b''),
    (b'{"a": 1}\n', b'{"a": 1}\n'),
    (b'{"a": 1}\n{"b"', b'{"a": 1}\n'),
    (b'{"a": 1}\n{"b": 2}', b'{"a": 1}\n{"b": 2}\n'),
    (b'{"b"', b''),
    (b'\xff\n\xff\xfe', b'\xff\n'),
    (b'[' * 10**5, b''),
  ],
)
def test_last_line_is_made_whole(path, before, after, warnings):
  path.parent.mkdir()
  path.write_bytes(before)
  file = appending.lines(path, warnings.append)
  file.append(LINES[0])
  file.close()
  assert path.read_bytes() == after + LINES[0]


def test_links_and_fifos_are_replaced(path, tmp_path, warnings):
  victim = tmp_path / 'victim'
  victim.write_text('private')
  path.parent.mkdir()
  for plant in (
    lambda: path.symlink_to(victim),
    lambda: path.hardlink_to(victim),
    lambda: path.symlink_to('/dev/full'),
    lambda: os.mkfifo(path),  # opening it would wait for a reader
  ):
    plant()
    file = appending.lines(path, warnings.append)
    file.append(LINES[0])
    file.close()
    assert path.is_file() and not path.is_symlink()
    assert path.read_bytes().endswith(LINES[0])
    path.unlink()
  assert victim.read_text() == 'private'
  assert warnings == []


def test_directory_in_place_of_the_file_is_a_warning(path, warnings):
  path.mkdir(parents=True)
  file = appending.lines(path, warnings.append)
  file.append(LINES[0])
  file.close()
  assert len(warnings) == 2 and 'lacks 1 entry' in warnings[1]


def test_preparation_is_repeated_until_it_succeeds(path, warnings, disk):
  path.parent.mkdir()
  calls = []

  def prepare():
    calls.append(1)
    if len(calls) < 3:
      raise OSError(errno.ENOSPC, 'No space left on device')

  file = appending.lines(path, warnings.append, prepare)
  for line in LINES:
    file.append(line)
  assert len(calls) == 3
  assert path.read_bytes() == b''.join(LINES)
  file.close()


def test_limit_of_the_file_size(file, path, warnings):
  """A limit of the system, without any replaced function."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    for line in LINES:
      file.append(line)
      assert path.read_bytes().endswith(b'\n')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert 'File too large' in warnings[0]
  file.close()
  assert path.read_bytes() == b''.join(LINES)
