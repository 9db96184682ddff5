"""Names in the files of others lead to files of one folder only."""

import pytest

from maskdiff.errors import UserError
from maskdiff.files import paths, reading


def test_file_of_the_folder_is_found(tmp_path):
  (tmp_path / 'sub').mkdir()
  for name in ('a', 'sub/b', 'sub/../a', 'a..b', 'missing'):
    assert paths.inside(tmp_path, name) == f'{tmp_path}/{name}'


@pytest.mark.parametrize(
  'name', ['/etc/passwd', '../a', 'sub/../../a', 'link/a', '', 'a\0', None, 3]
)
def test_files_outside_the_folder_are_refused(tmp_path, name):
  folder = tmp_path / 'folder'
  (folder / 'sub').mkdir(parents=True)
  (folder / 'link').symlink_to(tmp_path)
  with pytest.raises(UserError, match='not a file of this folder'):
    paths.inside(folder, name)


def test_links_within_the_folder_are_followed(tmp_path):
  (tmp_path / 'a').write_text('x')
  (tmp_path / 'b').symlink_to('a')
  assert reading.read_text(paths.inside(tmp_path, 'b')) == 'x'
