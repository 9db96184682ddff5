"""Writes a folder completely or not at all.

The folder is written as `.NAME.XXXXXXXX` beside its final place. This folder
holds a lock file while its process lives: the kernel releases flock when the
process ends, however it ends. So the next process can remove what a killed one
left, and never removes the folder of a live one. Some file systems do not share
flock between hosts, so the lock file also names the host, and folders of other
hosts are reported only.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
import stat

from maskdiff.errors import UserError, inline
from maskdiff.files import lock, reading

_LOCK = '.unfinished'


@contextlib.contextmanager
def new_folder(path, flag='out'):
  """Yields a temporary folder, and renames it to `path` on success.

  Meanwhile `path` is an empty folder that this process has locked.

  Args:
    path: path of the new folder. It may be an empty folder, whose permissions
      stay, or a link to one.
    flag: name of the flag that gave the path, for error messages.

  Raises:
    UserError: `path` is a file or a folder that is not empty, or the temporary
      folder cannot be made or renamed.
    InUse: another process writes to `path`.
  """
  path = _final(path)
  _require_empty(path, flag)
  parent, name = os.path.split(path)
  with contextlib.ExitStack() as stack:
    while True:
      new = os.path.join(parent, f'.{name}.{secrets.token_hex(4)}')
      try:
        os.makedirs(new)
        stack.callback(shutil.rmtree, new, ignore_errors=True)
        mode = os.stat(path if os.path.isdir(path) else new).st_mode
        os.chmod(new, 0o700)  # others see complete files only
        if _lock(new, stack):
          break
      except OSError as error:
        raise UserError(
          f'--{flag}: cannot make {inline(new)} ({error.strerror})'
        ) from error
    free = stack.enter_context(lock.reserved(path))
    # A process that has just ended may have filled it.
    _require_empty(path, flag)
    yield new
    try:
      os.unlink(os.path.join(new, _LOCK))
      os.chmod(new, stat.S_IMODE(mode))
      free()
      os.replace(new, path)
    except OSError as error:
      raise UserError(
        f'cannot write {inline(path)} ({error.strerror})'
      ) from error


def remove_unfinished(path):
  """Removes the temporary folders of dead processes that would write `path`.

  Args:
    path: argument of `new_folder`.

  Returns:
    list of lines to print: the removed folders with their sizes, and folders
    that remain because it is not sure that their process has ended.
  """
  parent, name = os.path.split(_final(path))
  pattern = re.compile(rf'\.{re.escape(name)}\.[0-9a-f]{{8}}')
  try:
    names = sorted(os.listdir(parent))
  except OSError:  # writing the folder reports it
    return []
  found = (os.path.join(parent, n) for n in names if pattern.fullmatch(n))
  lines = [_remove(p) for p in found if os.path.isdir(p)]
  return [line for line in lines if line]


def _final(path):
  """Returns the absolute path to which the folder is renamed at the end."""
  # A folder cannot replace a link to an empty folder, only the folder itself.
  return (
    os.path.realpath(path) if os.path.isdir(path) else os.path.abspath(path)
  )


def _require_empty(path, flag):
  """Raises UserError if something exists at a path, except a lock file."""
  if os.path.lexists(path) and (
    not os.path.isdir(path) or not lock.is_empty(path)
  ):
    raise UserError(f'--{flag} {inline(path)} exists already: choose another')


def _lock(folder, stack):
  """Locks a folder that this process made, until the stack closes.

  Returns:
    Whether the folder is still there: between its creation and the lock, it
    looks like that of a dead process.
  """
  path = os.path.join(folder, _LOCK)
  file = stack.enter_context(open(path, 'x'))
  with contextlib.suppress(OSError):  # a file system without flock
    fcntl.flock(file, fcntl.LOCK_EX)
  file.write(socket.gethostname())
  file.flush()
  try:
    return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
  except FileNotFoundError:
    return False


def _remove(folder):
  """Removes a folder if its process has ended; returns a line, or None."""
  path = os.path.join(folder, _LOCK)
  unsure = lambda why: (
    f'{inline(folder)} may be left from a process that was killed{why}: delete '
    'it if none writes to it'
  )
  if os.path.islink(folder) or not os.path.lexists(path):
    return unsure('')
  try:
    with reading.open_regular(path) as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      host = file.read(1000).decode(errors='replace')
      if host != socket.gethostname():
        return unsure(f' on host {host!r}')
      num_bytes = _size(folder)
      shutil.rmtree(folder)
  except BlockingIOError:
    return None  # its process lives
  except (OSError, UserError) as error:
    return unsure(f' and cannot be removed ({error})')
  return (
    f'removed {inline(folder)}, {num_bytes / 1e9:.2f} GB, left by a process '
    'that was killed'
  )


def _size(folder):
  """Returns the number of bytes on disk of the files of a folder."""
  total = 0
  for parent, _, names in os.walk(folder):
    for name in names:
      with contextlib.suppress(OSError):
        total += os.lstat(os.path.join(parent, name)).st_blocks * 512
  return total
