"""Writes small files completely or not at all."""

import contextlib
import functools
import os

from maskdiff.errors import UserError
from maskdiff.files import reading


def write(path, content, mode=0o666):
  """Writes a file; a reader sees the old or the new contents, never a part.

  A symbolic link at `path` is replaced, not followed: a link that somebody
  placed in a work directory must not redirect a write.

  Args:
    path: path of the file.
    content: str, written as UTF-8, or bytes.
    mode: permissions of a new file, before the umask.

  Raises:
    OSError: the file cannot be written. The old file is kept.
  """
  path = os.fspath(path)
  if isinstance(content, str):
    content = content.encode()
  # Hidden, with the pid: the name collides with no file of the user and with no
  # other process that writes the same file.
  folder, name = os.path.split(path)
  temporary = os.path.join(folder, f'.{name}.{os.getpid()}.tmp')
  with contextlib.suppress(FileNotFoundError):
    os.unlink(temporary)
  try:
    # 'x' refuses an existing file or link.
    opener = functools.partial(os.open, mode=mode)
    with open(temporary, 'xb', opener=opener) as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


def write_if_changed(path, content, mode=0o666):
  """Writes a file as `write`, unless it has this content already.

  So a run can resume on a full disk.

  Args:
    path, mode: see `write`. A file with more permissions is written again.
    content: bytes.

  Raises:
    OSError: see `write`.
  """
  with contextlib.suppress(UserError):  # such as: it does not exist
    same = reading.read_bytes(path, len(content)) == content
    more = os.lstat(path).st_mode & 0o666 & ~mode
    if same and not more and not os.path.islink(path):
      return
  write(path, content, mode)
