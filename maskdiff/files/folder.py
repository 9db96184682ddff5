"""Opens files of a folder that somebody else made, and no file outside it.

A name is resolved step by step from the descriptor of the folder, and no step
follows a link by itself. So a link that appears between a check and a read
changes nothing. Two kinds of links are allowed:

- to a file beside the link that is not hidden;
- as in the cache of the Hugging Face Hub, from snapshots/REVISION/ to
  ../../blobs/HASH, where both folders belong to the same repository.
"""

import contextlib
import os
import re
import stat

from maskdiff.errors import UserError
from maskdiff.files import reading

_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
# Names of blobs are hashes of git (SHA-1) or of large files (SHA-256).
_BLOB = re.compile(r'\.\./\.\./blobs/([0-9a-f]{40}|[0-9a-f]{64})')


def open_file(folder, name):
  """Opens a regular file of a folder for reading.

  Args:
    folder: path of the folder. The path itself may contain links.
    name: path relative to the folder, which may come from a file that is not
      trusted.

  Returns:
    Binary file object.

  Raises:
    UserError: the file does not exist, cannot be read, is not regular, or is
      not in the folder.
  """
  path = os.path.join(folder, str(name))
  if not _is_relative(name):
    raise UserError(
      f'{os.fspath(folder)!r} names the file {name!r}, which is not a file of '
      'this folder'
    )
  *parents, last = name.split('/')
  with contextlib.ExitStack() as stack:
    try:
      parent = _descend(folder, parents, stack)
      handle = _open(parent, last, path, stack)
    except OSError as error:
      raise UserError(f'cannot read {path!r} ({error.strerror})') from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
      os.close(handle)
      raise UserError(f'cannot read {path!r} (not a regular file)')
    return open(handle, 'rb')


def read_bytes(folder, name, max_bytes=reading.MAX_BYTES):
  """Returns the contents of a file of a folder.

  Raises:
    UserError: as `open_file`, or the file has more than `max_bytes` bytes.
  """
  path = os.path.join(folder, str(name))
  with open_file(folder, name) as file:
    return reading.read_opened(file, path, max_bytes)


def read_json(folder, name, max_bytes=reading.MAX_BYTES):
  """Returns the value of a JSON file of a folder; see reading.parse_json.

  Raises:
    UserError: as `read_bytes`; the file is not JSON; or an object has a key
      twice.
  """
  content = read_bytes(folder, name, max_bytes)
  path = os.path.join(folder, str(name))
  return reading.parse_json(content, repr(path), unique_keys=True)


def file_names(folder, subfolder=''):
  """Returns the names of the files of a folder, without hidden files.

  Args:
    folder: path of the folder.
    subfolder: '' or a relative path of a folder within it.

  Returns:
    Sorted list of names within the subfolder: of regular files, and of links,
    which `open_file` follows or refuses. Folders, links to folders, FIFOs and
    devices are left out.

  Raises:
    UserError: the subfolder is a link or cannot be read.
  """
  path = os.path.join(folder, subfolder)
  with contextlib.ExitStack() as stack:
    try:
      handle = _descend(folder, [p for p in subfolder.split('/') if p], stack)
      entries = stack.enter_context(os.scandir(handle))
      return sorted(
        entry.name
        for entry in entries
        if not entry.name.startswith('.')
        and not entry.is_dir()
        and (entry.is_symlink() or entry.is_file())
      )
    except OSError as error:
      raise UserError(f'cannot read {path!r} ({error.strerror})') from error


def check_links(folder, names):
  """Raises a UserError if one of the files is a link that may not be followed.

  Args:
    folder: path of the folder.
    names: names of files in it. Missing files are skipped.
  """
  for name in names:
    if os.path.islink(os.path.join(folder, name)):
      open_file(folder, name).close()


def _is_relative(name):
  return (
    isinstance(name, str)
    and '\0' not in name
    and all(part not in ('', '.', '..') for part in name.split('/'))
  )


def _descend(folder, parents, stack):
  """Returns the descriptor of a folder below another; the stack closes it."""
  # The user names the folder, so its path may contain links.
  handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)
  stack.callback(os.close, handle)
  for name in parents:
    if stat.S_ISLNK(_mode(name, handle)):
      raise UserError(
        f'{os.path.join(folder, *parents)!r} is a link to another folder, '
        'which is not followed: replace it by the folder itself'
      )
    handle = os.open(name, _FLAGS | os.O_DIRECTORY, dir_fd=handle)
    stack.callback(os.close, handle)
  return handle


def _open(parent, name, path, stack):
  """Returns the descriptor of a file; follows the two kinds of links.

  Args:
    parent: descriptor of the folder of the file.
    name: name of the file within it.
    path: path of the file, for error messages.
    stack: contextlib.ExitStack for other descriptors.
  """
  # Without O_NONBLOCK, opening a FIFO waits for a writer.
  flags = _FLAGS | os.O_NONBLOCK
  try:
    target = os.readlink(name, dir_fd=parent)
  except OSError:  # not a link
    return os.open(name, flags, dir_fd=parent)
  if '/' not in target and not target.startswith('.'):
    folder = parent
  elif _BLOB.fullmatch(target) and _is_snapshot(parent):
    folder = os.open('../../blobs', _FLAGS | os.O_DIRECTORY, dir_fd=parent)
    stack.callback(os.close, folder)
    target = os.path.basename(target)
  else:
    raise UserError(
      f'{path!r} is a link to {target!r}, which is not a file of this folder: '
      'replace the link by a copy of the file, or remove it'
    )
  try:
    return os.open(target, flags, dir_fd=folder)
  except FileNotFoundError as error:
    raise UserError(
      f'{path!r} is a link to {target!r}, which does not exist: download the '
      'file again, or remove the link'
    ) from error
  except OSError as error:
    if not stat.S_ISLNK(_mode(target, folder)):
      raise
    raise UserError(
      f'{path!r} is a link to {target!r}, which is a link too: replace it by a '
      'copy of the file, or remove it'
    ) from error


def _is_snapshot(handle):
  """Returns whether a folder is REVISION in a cache's snapshots/REVISION."""
  try:
    beside = os.stat('../../snapshots', dir_fd=handle, follow_symlinks=False)
    return os.path.samestat(beside, os.stat('..', dir_fd=handle))
  except OSError:
    return False


def _mode(name, folder):
  try:
    return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
  except OSError:
    return 0
