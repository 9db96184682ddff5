"""Lists the input files of source folders.

The output of a preparation may be inside the source folder. Links may point out
of the folder, and FIFOs, sockets and devices may block a reader.
"""

import functools
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from maskdiff.data import readers
from maskdiff.errors import UserError

# Files that data.prepare and data.row_writer leave in their directories.
_PREPARED = {'.prepare', '.prepare.lock', '.unfinished'}


class Input(NamedTuple):
  """An input file.

  Attributes:
    name: path relative to the source.
    path: absolute path.
    size: size in bytes.
    format: key of readers.READERS.
    records: number of records of a 'tfds' shard.
  """

  name: str
  path: str
  size: int
  format: str
  records: int = 0


def walk(
  root: str,
  ignored: dict[str, int],
  foreign: Collection[str] = (),
  output: str | None = None,
) -> Iterator[str]:
  """Yields the paths of the files in a folder and its subfolders.

  Linked folders and folders of prepared rows are not entered.

  Args:
    root: the folder.
    ignored: counter of what is not entered; modified.
    foreign: names of folders that are not entered and not counted.
    output: directory that the preparation writes; not entered and not counted.

  Raises:
    UserError: a folder cannot be read.
  """
  # os.walk and recursive functions fail for folders nested 1,000 deep.
  waiting, real_root = [root], os.path.realpath(root)
  while waiting:
    folder = waiting.pop()
    if _within(real_root + folder.removeprefix(root), output):
      continue
    try:
      with os.scandir(folder) as found:
        entries = list(found)
    except OSError as e:
      raise readers.cannot_read(folder, e) from e
    if is_prepared(entry.name for entry in entries):
      ignored['folders of prepared rows'] += 1
      continue
    for entry in entries:
      if not _is_folder(entry):
        yield entry.path
      elif entry.name in foreign:
        continue
      elif entry.is_symlink():
        ignored['linked folders'] += 1
      else:
        waiting.append(entry.path)


def select(
  root: str,
  paths: Iterable[str],
  format_of: Callable[[str], str | None],
  ignored: dict[str, int],
  output: str | None = None,
) -> list[Input]:
  """Returns the input files among some paths, sorted.

  Files that are not regular, links that leave the root, and files of prepared
  rows are counted in `ignored`.

  Args:
    root: folder of the source.
    paths: paths of files below the root.
    format_of: (path) -> format, or None.
    ignored: counter of files that are not read, by suffix or reason; modified.
    output: directory whose files are not input.

  Raises:
    UserError: a file does not exist or cannot be examined.
  """
  real_root, found = os.path.realpath(root), []
  real_folder = functools.cache(os.path.realpath)
  prepared = functools.cache(lambda folder: is_prepared(os.listdir(folder)))
  for path in paths:
    format = format_of(path)
    folder = os.path.dirname(path)
    real = real_path(path, real_folder)
    if _within(real, output):
      continue
    if format is None:
      reason = os.path.splitext(path)[1] or 'no suffix'
    elif not _within(real, real_root) and not _is_hub_blob(
      real_folder(folder), real
    ):
      reason = 'links that leave the folder'
    elif prepared(folder):
      reason = 'files of prepared rows'
    elif not stat.S_ISREG(_stat(path).st_mode):
      reason = 'not regular files'
    else:
      found.append(examine(root, path, format))
      continue
    ignored[reason] += 1
  return sorted(found)


def real_path(path: str, real_folder: Callable[[str], str]) -> str:
  """Returns a path without links.

  Resolving every path from the root would take longer than the rest of
  planning, so folders are resolved once, and files only if they are links.

  Args:
    path: path of a file.
    real_folder: `os.path.realpath` with a cache, of folders.
  """
  if os.path.islink(path):
    return os.path.realpath(path)
  folder, file = os.path.split(path)
  return os.path.join(real_folder(folder), file)


def examine(root: str, path: str, format: str, records: int = 0) -> Input:
  """Returns the Input of one path, which the user may have named.

  Raises:
    UserError: the file does not exist or is not a regular file.
  """
  status = _stat(path)
  if not stat.S_ISREG(status.st_mode):
    raise readers.cannot_read(path, OSError('not a regular file'))
  name = path.removeprefix(root).lstrip('/')
  return Input(name, path, status.st_size, format, records)


def check_output(spec: str, path: str, output: str | None) -> None:
  """Raises UserError if a source is the output directory or inside it."""
  if _within(os.path.realpath(path), output):
    raise UserError(
      f'--source {spec} is in the output directory --out {output}: choose '
      'another --out, which may be a new folder inside the source'
    )


def is_prepared(names: Iterable[str]) -> bool:
  """Returns whether a folder with these entries holds prepared rows."""
  return any(n in _PREPARED or n.endswith('.array_record') for n in names)


def without_second_names(found: list[Input]) -> list[Input]:
  """Drops the links of a folder to other files of the same folder.

  Debian's standard library has such a link.
  """
  links = {i.path for i in found if os.path.islink(i.path)}
  if not links:
    return found
  real_paths = list(_real_paths(found))
  files = {real for i, real in real_paths if i.path not in links}
  return [
    i for i, real in real_paths if i.path not in links or real not in files
  ]


def _real_paths(inputs: list[Input]) -> Iterator[tuple[Input, str]]:
  """Yields each input and its path without links."""
  real_folder = functools.cache(os.path.realpath)
  for i in inputs:
    yield i, real_path(i.path, real_folder)


def check_named_once(inputs: list[Input]) -> None:
  """Raises UserError if two inputs are the same file."""
  seen = set()
  for i, real in _real_paths(inputs):
    if real in seen:
      raise UserError(
        f'{i.path} is named twice and would be used twice: name it once'
      )
    seen.add(real)


def _within(path: str, folder: str | None) -> bool:
  """Returns whether a path is a folder or in it; both are resolved."""
  if folder is None:
    return False
  return path == folder or path.startswith(folder.rstrip('/') + '/')


def _is_folder(entry: os.DirEntry) -> bool:
  try:
    return entry.is_dir()
  except OSError:  # a loop of links
    return False


def _is_hub_blob(folder: str, real: str) -> bool:
  """Returns whether a link is one of the Hugging Face cache.

  The cache holds files in blobs/ and names them by links in snapshots/.
  """
  repository, snapshots, _ = folder.partition('/snapshots/')
  return bool(snapshots) and os.path.dirname(real) == f'{repository}/blobs'


def _stat(path: str) -> os.stat_result:
  try:
    return os.stat(path)
  except OSError as e:
    raise readers.cannot_read(path, e) from e
