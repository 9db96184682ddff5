"""Files that flags name are whole, or are not written."""

import os
import stat

import pytest

from maskdiff.errors import UserError
from maskdiff.files import outputs


def full(*_):
  raise OSError(28, 'No space left on device')


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'a.html'
  outputs.write('html', str(path), 'é')
  assert path.read_text() == 'é'
  monkeypatch.setattr('os.fsync', full)
  for name in ('a.html', 'b.html'):
    with pytest.raises(
      UserError, match=r'--html: cannot write .*\(No space left on device\)'
    ):
      outputs.write('html', str(tmp_path / name), 'new')
  assert path.read_text() == 'é'
  assert names(tmp_path) == ['a.html']


def test_a_link_that_the_user_names_is_followed(tmp_path):
  (tmp_path / 'large').mkdir()
  link = tmp_path / 'a'
  link.symlink_to(tmp_path / 'large' / 'a')
  outputs.write('out', str(link), 'x')
  with outputs.lines('out', str(link), None) as write:
    write('y')
  assert link.is_symlink()
  assert (tmp_path / 'large' / 'a').read_text() == 'y\n'
  assert names(tmp_path / 'large') == ['a']


def test_devices_are_written_and_not_replaced(tmp_path):
  before = os.stat(os.devnull)
  outputs.check('out', os.devnull)
  outputs.write('out', os.devnull, 'x')
  with outputs.lines('out', os.devnull, None) as write:
    write('x')
  after = os.stat(os.devnull)
  assert stat.S_ISCHR(after.st_mode) and before.st_ino == after.st_ino


def test_a_check_leaves_nothing_behind(tmp_path):
  path = tmp_path / 'a'
  outputs.check('out', str(path))
  assert not names(tmp_path)
  path.write_text('old')
  outputs.check('out', str(path))
  assert path.read_text() == 'old' and names(tmp_path) == ['a']
  for wrong in (tmp_path, tmp_path / 'none' / 'a', path / 'b'):
    with pytest.raises(UserError, match='--out: cannot write'):
      outputs.check('out', str(wrong))


def test_lines_appear_when_they_are_complete(tmp_path):
  path = tmp_path / 'a'
  path.write_text('old')
  with outputs.lines('out', str(path), None) as write:
    write('é')
    assert path.read_text() == 'old'
    assert (tmp_path / 'a.part').read_text() == 'é\n'
    write('b')
  assert path.read_text() == 'é\nb\n' and names(tmp_path) == ['a']


def test_an_error_leaves_the_lines_before_it(tmp_path):
  path, notes = tmp_path / 'a', []
  with pytest.raises(KeyboardInterrupt):
    with outputs.lines('out', str(path), notes.append):
      raise KeyboardInterrupt
  assert not names(tmp_path) and not notes
  with pytest.raises(KeyboardInterrupt):
    with outputs.lines('out', str(path), notes.append) as write:
      write('a')
      raise KeyboardInterrupt
  assert (tmp_path / 'a.part').read_text() == 'a\n'
  assert notes == [f"1 lines are in '{path}.part'"]


def test_files_of_the_user_beside_the_output_are_kept(tmp_path):
  """Lines in a.part may be those that an earlier command has rescued."""
  for name in ('a.tmp', 'a.part', 'a.2.part'):
    (tmp_path / name).write_text('mine')
  outputs.check('out', str(tmp_path / 'a'))
  with outputs.lines('out', str(tmp_path / 'a'), None) as write:
    write('b')
    assert (tmp_path / 'a.3.part').read_text() == 'b\n'
  assert (tmp_path / 'a').read_text() == 'b\n'
  assert names(tmp_path) == ['a', 'a.2.part', 'a.part', 'a.tmp']
  for name in ('a.tmp', 'a.part', 'a.2.part'):
    assert (tmp_path / name).read_text() == 'mine'


@pytest.mark.parametrize('room', [0, 1, 2, 5, 8])
def test_no_line_is_lost_on_a_full_disk(tmp_path, monkeypatch, capsys, room):
  """The disk has room for a number of bytes, also within a line."""
  left = room

  def write(file, content):
    nonlocal left
    taken, left = content[:left], max(0, left - len(content))
    file.write(taken)
    if len(taken) < len(content):
      full()

  monkeypatch.setattr(outputs, '_write_all', write)
  notes = []
  with pytest.raises(UserError, match='No space left'):
    with outputs.lines('out', str(tmp_path / 'a'), notes.append) as write_line:
      for line in ('ab', 'cd', 'ef'):
        write_line(line)
  part = tmp_path / 'a.part'
  kept = part.read_text() if part.exists() else ''
  assert kept == 'ab\ncd\nef\n'[: room // 3 * 3]
  assert kept + capsys.readouterr().out == 'ab\ncd\nef\n'
  assert 'remaining lines follow on standard output' in notes[0]
  assert names(tmp_path) == (['a.part'] if kept else [])
