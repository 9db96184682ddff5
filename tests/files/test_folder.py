"""No file outside a folder is opened, and links that leave it are refused."""

import os

import pytest

from maskdiff.errors import UserError
from maskdiff.files import folder

HASH = 'a' * 40


@pytest.fixture
def root(tmp_path):
  """Returns a folder with a file; a private file is beside the folder."""
  (tmp_path / 'private').write_text('secret')
  made = tmp_path / 'in'
  (made / 'sub').mkdir(parents=True)
  (made / 'a.txt').write_text('inside')
  (made / 'sub' / 'b.txt').write_text('below')
  (made / '.hidden').write_text('secret')
  return made


def test_files_of_the_folder_are_read(root, tmp_path):
  assert folder.read_bytes(root, 'a.txt') == b'inside'
  assert folder.read_bytes(root, 'sub/b.txt') == b'below'
  (root / 'link').symlink_to('a.txt')
  assert folder.read_bytes(root, 'link') == b'inside'
  # The user names the folder, so that its own path may be a link.
  (tmp_path / 'other name').symlink_to(root)
  assert folder.read_bytes(tmp_path / 'other name', 'a.txt') == b'inside'


@pytest.mark.parametrize(
  'name',
  ['../private', '/etc/passwd', 'sub/../../private', '', '.', 'a\0b', 7, None],
)
def test_names_that_leave_the_folder_are_refused(root, name):
  with pytest.raises(UserError, match='which is not a file of this folder'):
    folder.open_file(root, name)


LINKS = {
  'relative': '../private',
  'absolute': '{}/private',
  'environment': '/proc/self/environ',
  'inside, by a long way': '../in/a.txt',
  'hidden': '.hidden',
  'below': 'sub/b.txt',
  'like a blob': f'../../blobs/{HASH}',
  'folder above': '..',
}


@pytest.mark.parametrize('target', LINKS.values(), ids=LINKS)
def test_links_out_of_the_folder_are_refused(root, tmp_path, target):
  blobs = tmp_path.parent / 'blobs'
  blobs.mkdir(exist_ok=True)
  (blobs / HASH).write_text('secret')
  (root / 'link').symlink_to(target.format(tmp_path))
  with pytest.raises(UserError, match='is a link to'):
    folder.open_file(root, 'link')


def test_chains_of_links_are_refused(root):
  (root / 'second').symlink_to('../private')
  (root / 'first').symlink_to('second')
  (root / 'loop').symlink_to('loop')
  for name in ('first', 'loop'):
    with pytest.raises(UserError, match='which is a link too'):
      folder.open_file(root, name)
  (root / 'dangling').symlink_to('nothing')
  with pytest.raises(UserError, match='which does not exist'):
    folder.open_file(root, 'dangling')


def test_linked_subfolder_is_refused(root, tmp_path):
  (tmp_path / 'secrets').mkdir()
  (tmp_path / 'secrets' / 'key').write_text('secret')
  (root / 'published').symlink_to(tmp_path / 'secrets')
  with pytest.raises(
    UserError, match='published.* is a link to another folder'
  ):
    folder.open_file(root, 'published/key')
  with pytest.raises(
    UserError, match='published.* is a link to another folder'
  ):
    folder.file_names(root, 'published')


@pytest.mark.parametrize('kind', ['fifo', 'folder', 'link to a fifo'])
def test_only_regular_files_are_opened(root, kind):
  if kind == 'folder':
    (root / 'x').mkdir()
  else:
    os.mkfifo(root / 'x')
  (root / 'link').symlink_to('x')
  with pytest.raises(UserError, match='not a regular file'):
    folder.open_file(root, 'link' if kind.startswith('link') else 'x')


def test_cache_of_the_hub_is_read(tmp_path):
  snapshot = tmp_path / 'models--a--b' / 'snapshots' / 'main'
  snapshot.mkdir(parents=True)
  blobs = tmp_path / 'models--a--b' / 'blobs'
  blobs.mkdir()
  (blobs / HASH).write_text('blob')
  (tmp_path / 'private').write_text('secret')
  (blobs / ('b' * 64)).symlink_to('../../private')
  (blobs / 'c').write_text('not named by a hash')
  (snapshot / 'config.json').symlink_to(f'../../blobs/{HASH}')
  assert folder.read_bytes(snapshot, 'config.json') == b'blob'
  for name in ('b' * 64, 'c', HASH + '/../../private', 'd' * 40):
    (snapshot / 'link').unlink(missing_ok=True)
    (snapshot / 'link').symlink_to(f'../../blobs/{name}')
    with pytest.raises(UserError, match='is a link to'):
      folder.open_file(snapshot, 'link')
  # Blobs belong to the folder snapshots beside them.
  (tmp_path / 'models--a--b' / 'other' / 'main').mkdir(parents=True)
  other = tmp_path / 'models--a--b' / 'other' / 'main'
  (other / 'config.json').symlink_to(f'../../blobs/{HASH}')
  with pytest.raises(UserError, match='is a link to'):
    folder.open_file(other, 'config.json')
  blobs.rename(tmp_path / 'elsewhere')
  blobs.symlink_to(tmp_path / 'elsewhere')
  with pytest.raises(UserError, match='cannot read'):
    folder.open_file(snapshot, 'config.json')


def test_link_that_appears_after_the_check_is_not_followed(root, monkeypatch):
  """A file is replaced by a link between the check and the open."""
  real = os.readlink

  def replaced(name, *, dir_fd):
    try:
      return real(name, dir_fd=dir_fd)
    finally:
      if name == 'a.txt':
        (root / 'a.txt').unlink()
        (root / 'a.txt').symlink_to('../private')

  monkeypatch.setattr(os, 'readlink', replaced)
  with pytest.raises(UserError, match='cannot read'):
    folder.open_file(root, 'a.txt')


def test_names_of_hidden_files_folders_and_fifos_are_left_out(root):
  (root / 'link').symlink_to('../private')
  (root / 'linked folder').symlink_to('sub')
  os.mkfifo(root / 'fifo')
  assert folder.file_names(root) == ['a.txt', 'link']
  assert folder.file_names(root, 'sub') == ['b.txt']
  with pytest.raises(UserError, match='link.* is a link to'):
    folder.check_links(root, folder.file_names(root))


def test_json_of_a_folder_is_bounded_and_has_unique_keys(root):
  (root / 'a.json').write_text('{"a": {"b": 1, "c": 2, "b": 3}}')
  with pytest.raises(UserError, match="the key 'b' is there twice"):
    folder.read_json(root, 'a.json')
  with pytest.raises(UserError, match='more than 10 bytes'):
    folder.read_json(root, 'a.json', 10)
