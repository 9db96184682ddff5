"""New folders are complete or absent; leftovers of killed processes go."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import pytest

from maskdiff.errors import UserError
from maskdiff.files import lock, new_folder

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Prints the path of its temporary folder, and waits for the end of its input.
WRITER = """
import sys
from maskdiff.files import new_folder
with new_folder.new_folder(sys.argv[1]) as new:
  with open(new + '/weights', 'wb') as file:
    file.write(bytes(1_000_000))
  print(new, flush=True)
  sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
  """Yields a live process that writes tmp_path/out, and its folder."""
  process = subprocess.Popen(
    [sys.executable, '-c', WRITER, str(tmp_path / 'out')],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  )
  yield process, pathlib.Path(process.stdout.readline().strip())
  process.kill()
  process.communicate()


def test_folder_of_a_killed_process_is_removed(writer, tmp_path):
  process, left = writer
  path = tmp_path / 'out'
  assert new_folder.remove_unfinished(path) == []
  assert (left / 'weights').exists()  # its process lives
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert (left / 'weights').exists()
  (line,) = new_folder.remove_unfinished(path)
  assert f'removed {left}, 0.00 GB, left by a process' in line
  assert os.listdir(tmp_path) == ['out']
  assert os.listdir(path) == [lock.NAME]
  with new_folder.new_folder(path):
    pass
  assert os.listdir(path) == []


def make_leftover(parent, host=None, name='.out.0123abcd'):
  (parent / name).mkdir()
  (parent / name / 'weights').write_text('x')
  if host is not None:
    (parent / name / '.unfinished').write_text(host)
  return parent / name


def test_doubtful_leftovers_are_reported_and_kept(tmp_path):
  other = make_leftover(tmp_path, 'another-host')
  old = make_leftover(tmp_path, name='.out.ffffffff')
  lines = new_folder.remove_unfinished(tmp_path / 'out')
  assert [other.name in lines[0], old.name in lines[1]] == [True, True]
  assert "on host 'another-host': delete it if none writes" in lines[0]
  assert (other / 'weights').exists() and (old / 'weights').exists()


def test_only_leftovers_of_the_same_path_are_touched(tmp_path):
  host = socket.gethostname()
  names = ('.out.backup12', '.other.0123abcd', '.out.0123abcde', 'out.0123abcd')
  kept = [make_leftover(tmp_path, host, name) for name in names]
  private = make_leftover(tmp_path, host, 'private')
  (tmp_path / '.out.00000000').symlink_to(private)
  make_leftover(tmp_path, host)
  lines = new_folder.remove_unfinished(tmp_path / 'out')
  assert 'may be left' in lines[0] and lines[1].startswith('removed')
  for path in (*kept, private):
    assert (path / 'weights').exists()
  assert not (tmp_path / '.out.0123abcd').exists()


def test_folder_is_complete_or_absent(tmp_path):
  with pytest.raises(KeyboardInterrupt):
    with new_folder.new_folder(tmp_path / 'out') as new:
      pathlib.Path(new, 'part').write_text('x')
      raise KeyboardInterrupt
  assert os.listdir(tmp_path) == []
  with new_folder.new_folder(tmp_path / 'out') as new:
    pathlib.Path(new, 'whole').write_text('x')
    assert os.listdir(tmp_path / 'out') == [lock.NAME]
  assert os.listdir(tmp_path) == ['out']
  assert os.listdir(tmp_path / 'out') == ['whole']
  with pytest.raises(UserError, match='out exists already: choose another'):
    with new_folder.new_folder(tmp_path / 'out'):
      pass


def test_permissions_of_an_empty_folder_stay(tmp_path):
  (tmp_path / 'out').mkdir(mode=0o700)
  with new_folder.new_folder(tmp_path / 'out') as new:
    assert os.stat(new).st_mode & 0o777 == 0o700
  assert (tmp_path / 'out').stat().st_mode & 0o777 == 0o700


def test_a_link_to_an_empty_folder_stays_a_link(tmp_path):
  target, link = tmp_path / 'disk' / 'out', tmp_path / 'link'
  target.mkdir(parents=True)
  link.symlink_to(target)
  with new_folder.new_folder(link) as new:
    pathlib.Path(new, 'whole').write_text('x')
  assert link.is_symlink() and os.listdir(target) == ['whole']
  assert os.listdir(tmp_path / 'disk') == ['out']
