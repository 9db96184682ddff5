"""A write leaves the old file or the whole new one."""

import os

import pytest

from maskdiff.files import atomic


def test_content_is_written_whole(tmp_path):
  path = tmp_path / 'a'
  for content in ('ü', b'\xff', ''):
    atomic.write(path, content)
    bytes_ = content.encode() if isinstance(content, str) else content
    assert path.read_bytes() == bytes_
  assert [p.name for p in tmp_path.iterdir()] == ['a']


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'a'
  path.write_text('old')

  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('os.fsync', full)
  with pytest.raises(OSError, match='No space'):
    atomic.write(path, 'new')
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['a']


def test_planted_links_are_not_followed(tmp_path):
  victim = tmp_path / 'victim'
  victim.write_text('private')
  path = tmp_path / 'a'
  path.symlink_to(victim)
  (tmp_path / f'.a.{os.getpid()}.tmp').symlink_to(victim)
  atomic.write(path, 'new')
  assert victim.read_text() == 'private'
  assert path.read_text() == 'new' and not path.is_symlink()


def test_neighbours_of_a_file_are_kept(tmp_path):
  for name in ('a.tmp', '.a.tmp', 'a.part'):
    (tmp_path / name).write_text('mine')
  atomic.write(tmp_path / 'a', 'new')
  assert {p.read_text() for p in tmp_path.iterdir()} == {'mine', 'new'}
  assert len([*tmp_path.iterdir()]) == 4


def test_mode_of_a_new_file(tmp_path):
  path = tmp_path / 'a'
  atomic.write(path, 'x', mode=0o600)
  assert path.stat().st_mode & 0o777 == 0o600


def test_file_with_the_same_content_is_left_alone(tmp_path, monkeypatch):
  path, victim = tmp_path / 'a', tmp_path / 'victim'
  atomic.write_if_changed(path, b'content')
  before = path.stat().st_ino
  atomic.write_if_changed(path, b'content')
  assert path.stat().st_ino == before
  for content in (b'conten', b'content ', b''):
    atomic.write_if_changed(path, content)
    assert path.read_bytes() == content
  path.chmod(0o644)
  atomic.write_if_changed(path, b'', 0o600)  # it was readable by all
  assert path.stat().st_mode & 0o777 == 0o600
  path.rename(victim)
  path.symlink_to(victim)
  atomic.write_if_changed(path, b'')
  assert not path.is_symlink()
