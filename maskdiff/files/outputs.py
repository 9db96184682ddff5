"""Files that flags such as --out and --html name: whole, or not written.

A file that exists keeps its contents until the new contents are complete. A
path that is not a regular file, such as /dev/stdout or a FIFO, is written
directly.
"""

import contextlib
import itertools
import os
import stat
import sys
import tempfile

from maskdiff.errors import UserError, writing
from maskdiff.files import atomic


def check(flag, path):
  """Checks before long work that a file can be written later; leaves no file.

  Raises:
    UserError: the file cannot be written.
  """
  with writing(flag, path):
    if _is_special(path):
      return
    if os.path.isdir(path):
      raise IsADirectoryError('it is a directory')
    with tempfile.NamedTemporaryFile(
      dir=os.path.dirname(os.path.realpath(path)), prefix='.'
    ):
      pass


def write(flag, path, content):
  """Writes a file completely or not at all.

  Args:
    flag: name of the flag, for errors.
    path: path; the target of a symbolic link is replaced, not the link.
    content: str or bytes.

  Raises:
    UserError: the file cannot be written.
  """
  with writing(flag, path):
    if _is_special(path):
      content = content.encode() if isinstance(content, str) else content
      with open(path, 'wb') as file:
        file.write(content)
    else:
      atomic.write(os.path.realpath(path), content)


@contextlib.contextmanager
def lines(flag, path, note):
  """Yields a function that writes a line; the file is complete at the end.

  The lines are in PATH.part until the end, or in PATH.2.part if an earlier
  command has left lines in PATH.part, and so on. If an error ends the block,
  its whole lines stay there. If a line cannot be written, for example because
  the disk is full, this line and the later ones are printed, so that none is
  lost.

  Args:
    flag: name of the flag, for errors.
    path: path.
    note: function that receives a message for the user.

  Raises:
    UserError: the file cannot be opened; or, at the end of the block, a line
      could not be written.
  """
  special = _is_special(path)
  target = path if special else os.path.realpath(path)
  with writing(flag, path):
    if os.path.isdir(path):
      raise IsADirectoryError('it is a directory')
    # Without a buffer, a line is on disk or has failed when `write` returns.
    if special:
      part, file = target, open(target, 'wb', buffering=0)
    else:
      part, file = _open_part(target)
  ends, problem = [0], None  # sizes of the file after each line

  def write_line(text):
    nonlocal problem
    if problem is None:
      content = f'{text}\n'.encode()
      try:
        _write_all(file, content)
        ends.append(ends[-1] + len(content))
        return
      except OSError as error:
        problem = UserError(
          f'--{flag}: cannot write {path!r} ({error.strerror})'
        )
      note(f'{problem}; the remaining lines follow on standard output')
    print(text, file=sys.stdout, flush=True)

  finished = False
  try:
    with file:
      yield write_line
    finished = problem is None
    if finished and not special:
      with writing(flag, path):
        os.replace(part, target)
  finally:
    if not finished and not special:
      _keep_whole_lines(part, ends, note)
  if problem:
    raise problem


def _open_part(target):
  """Returns the path of a new file beside the target, and the open file."""
  for number in itertools.count(1):
    part = f'{target}.{number}.part' if number > 1 else f'{target}.part'
    with contextlib.suppress(FileExistsError):
      return part, open(part, 'xb', buffering=0)


def _keep_whole_lines(part, ends, note):
  if len(ends) == 1:
    os.unlink(part)
  else:
    os.truncate(part, ends[-1])
    note(f'{len(ends) - 1} lines are in {part!r}')


def _write_all(file, content):
  while content:  # a write to a nearly full disk may be short
    content = content[file.write(content) :]


def _is_special(path):
  try:
    mode = os.stat(path).st_mode
  except OSError:
    return False
  # A regular file behind /dev/stdout is open, so it must not be replaced.
  return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)) or os.path.abspath(
    path
  ).startswith(('/dev/', '/proc/'))
