"""Where text comes from: iterators of (document name, text).

A name is a relative posix path, unique within its source. Names decide the
held-out split and the order of documents, so they must not depend on where
the files happen to be installed.
"""

import os
import pathlib
import sysconfig
from collections.abc import Iterator

from maskdiff.errors import UserError

Document = tuple[str, str]

SUFFIXES = ('.py', '.txt', '.md')
_FOREIGN = {'site-packages', 'dist-packages', '__pycache__'}


def embedded() -> Iterator[Document]:
  """Every .py file of the Python standard library, sorted by path.

  About 1,800 files and 31 MB that every machine with Python already has. The
  corpus differs a little between Python versions (modules come and go, even
  in a patch release), and between builds that leave some modules out; numbers
  measured on it compare within one Python version.

  Returns:
    Iterator of (path relative to the library's root, text). Files that are
    not valid UTF-8 are left out; line ends are kept as they are.

  Raises:
    UserError: this Python was installed without its sources.
  """
  root = pathlib.Path(sysconfig.get_paths()['stdlib'])
  fix = 'use a Python with its standard library unpacked, or your own text'
  return _documents(root, ('.py',), fix)


def text_files(directory: str | pathlib.Path) -> Iterator[Document]:
  """Every .py, .txt and .md file below a directory, sorted by path.

  Returns:
    Iterator of (path relative to the directory, text), as `embedded`. Folders
    named site-packages, dist-packages or __pycache__ are left out.

  Raises:
    UserError: the directory is missing or holds no such file.
  """
  fix = f'give a directory with files that end in {", ".join(SUFFIXES)}'
  return _documents(pathlib.Path(directory), SUFFIXES, fix)


def _documents(root, suffixes, fix) -> Iterator[Document]:
  # Checked here and not in the generator below, so that a wrong directory is
  # reported by the call that names it.
  paths = {}
  for folder, folders, files in os.walk(root):
    # In place, so that the walk does not even enter them.
    folders[:] = [f for f in folders if f not in _FOREIGN]
    for path in (pathlib.Path(folder, file) for file in files):
      if path.suffix in suffixes:
        paths[path.relative_to(root).as_posix()] = path
  if not paths:
    raise UserError(f'no {"/".join(suffixes)} files in {root}: {fix}')
  return _read(paths)


def _read(paths: dict[str, pathlib.Path]) -> Iterator[Document]:
  for name in sorted(paths):
    try:
      yield name, paths[name].read_bytes().decode('utf-8')
    except UnicodeDecodeError:
      continue
