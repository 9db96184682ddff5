"""Bounded reads of files that somebody else may have written or damaged.

Each function either returns a value of the promised form or raises UserError.
It reads regular files only, so a FIFO or a device cannot block the caller, and
at most a given number of bytes. `lines` also reads the streams that a shell
passes by name, such as /dev/stdin and <(command).
"""

import contextlib
import json
import os
import stat

from maskdiff.errors import UserError, one_line

MAX_BYTES = 64 << 20
MAX_DEPTH = 100  # of JSON; code that walks values may recurse
MAX_LINE_BYTES = 4 << 20
MAX_LINES_BYTES = 1 << 30  # of a file that is read line by line
_STREAMS = ('/dev/stdin', '/dev/fd/', '/proc/self/fd/')


def open_regular(path, buffering=-1):
  """Opens a regular file for reading.

  Args:
    path: path; symbolic links are followed.
    buffering: see `open`.

  Returns:
    Binary file object.

  Raises:
    UserError: the file does not exist, cannot be opened or is not regular.
  """
  path = os.fspath(path)
  try:
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except (OSError, ValueError) as error:  # ValueError: a null character
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'cannot read {path!r} ({reason})') from error
  if not stat.S_ISREG(os.fstat(handle).st_mode):
    os.close(handle)
    raise UserError(f'cannot read {path!r} (not a regular file)')
  return open(handle, 'rb', buffering)


@contextlib.contextmanager
def reported(path):
  """Context manager: an OSError of reading a file becomes a UserError."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'cannot read {os.fspath(path)!r} ({error.strerror})'
    ) from error


def read_bytes(path, max_bytes=MAX_BYTES):
  """Returns the contents of a regular file.

  Raises:
    UserError: the file cannot be read, is not regular or has more than
      `max_bytes` bytes.
  """
  with open_regular(path) as file:
    return read_opened(file, path, max_bytes)


def read_opened(file, path, max_bytes=MAX_BYTES):
  """Returns the contents of an open binary file, see `read_bytes`.

  `path` is the path of the file, for error messages.
  """
  with reported(path):
    # Not by the size: files in /proc have size 0.
    content = file.read(max_bytes + 1)
  if len(content) > max_bytes:
    raise UserError(
      f'{os.fspath(path)!r} has more than {max_bytes:,} bytes, the limit for '
      'a file of this kind'
    )
  return content


def read_text(path, max_bytes=MAX_BYTES):
  """Returns the contents of a regular UTF-8 file, without a byte order mark.

  Raises:
    UserError: as `read_bytes`, or the file is not UTF-8.
  """
  content = read_bytes(path, max_bytes)
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(f'{os.fspath(path)!r} is not UTF-8 ({error})') from error


def lines(path):
  """Yields (where, text) for each line of a UTF-8 file that is not blank.

  `where` is FILE:NUMBER. The text has no line end and no byte order mark.

  Args:
    path: regular file; or /dev/stdin, or another stream of the shell.

  Raises:
    UserError: the file cannot be read or has more than MAX_LINES_BYTES bytes;
      or a line has more than MAX_LINE_BYTES, or is not UTF-8.
  """
  name, total = os.fspath(path), 0
  with open_stream(name) as file:
    number = 0
    while True:
      number += 1
      try:
        line = file.readline(MAX_LINE_BYTES + 1)
      except OSError as error:
        raise UserError(f'cannot read {name!r} ({error.strerror})') from error
      if not line:
        return
      total += len(line)
      if total > MAX_LINES_BYTES:
        raise UserError(
          f'{name!r} has more than {MAX_LINES_BYTES:,} bytes, the limit for '
          'a file of lines: split it'
        )
      where = f'{name}:{number}'
      text = decode_line(line, number == 1, where)
      if text.strip():
        yield where, text


def open_stream(path):
  """Opens a regular file, or a stream that a shell passes by name.

  Raises:
    UserError: see `open_regular`.
  """
  if not path.startswith(_STREAMS):
    return open_regular(path)
  try:
    return open(path, 'rb')
  except OSError as error:
    raise UserError(f'cannot read {path!r} ({error.strerror})') from error


def decode_line(line, first, where):
  """Returns a line as text, without its line end.

  Args:
    line: bytes; its end, if any, is a newline, or "\\r\\n" as on Windows.
    first: whether it is the first line, which may have a byte order mark.
    where: how errors call the line.

  Raises:
    UserError: the line has more than MAX_LINE_BYTES, or is not UTF-8.
  """
  if len(line) > MAX_LINE_BYTES:
    raise UserError(f'{where}: the line has more than {MAX_LINE_BYTES:,} bytes')
  line = line.removesuffix(b'\n').removesuffix(b'\r')
  try:
    return line.decode('utf-8-sig' if first else 'utf-8')
  except UnicodeDecodeError as error:
    raise UserError(f'{where}: not UTF-8 ({error})') from error


def parse_json(content, name, unique_keys=False):
  """Parses JSON.

  Args:
    content: str or bytes.
    name: how the error calls the content, for example a path and a line.
    unique_keys: whether to refuse an object that has a key twice. Readers
      disagree on which of the two values counts.

  Returns:
    The value. Its depth is at most MAX_DEPTH, and all strings in it can be
    encoded as UTF-8. Numbers may be NaN or infinite, which Python writes.

  Raises:
    UserError: the content is not JSON, not UTF-8, or nested too deeply; or an
      object has a key twice.
  """
  try:
    if isinstance(content, bytes):
      content = content.decode('utf-8-sig')
    hook = _unique if unique_keys else None
    value = json.loads(content, object_pairs_hook=hook)
  except RecursionError as error:
    raise UserError(_too_deep(name)) from error
  except ValueError as error:
    raise UserError(f'{name} is not valid JSON ({one_line(error)})') from error
  # The walks are slow. Few contents need them.
  if content.count('[') + content.count('{') > MAX_DEPTH:
    _check_depth(value, name)
  if '\\' in content and '\\u' in content:  # one character is found faster
    try:
      json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
      raise UserError(
        f'{name} has half of a surrogate pair (\\ud800 to \\udfff), which is '
        'not a character'
      ) from error
  return value


def read_json(path, max_bytes=MAX_BYTES):
  """Returns the value of a JSON file, see `parse_json`.

  Raises:
    UserError: as `read_bytes` and `parse_json`.
  """
  return parse_json(read_bytes(path, max_bytes), repr(os.fspath(path)))


def _unique(pairs):
  """Returns a dict of (key, value) pairs; raises ValueError for a key twice."""
  found = dict(pairs)
  if len(found) < len(pairs):
    seen = set()
    twice = next(key for key, _ in pairs if key in seen or seen.add(key))
    raise ValueError(f'the key {twice[:100]!r} is there twice')
  return found


def _check_depth(value, name):
  level, depth = [value], 0
  while level:
    depth += 1
    if depth > MAX_DEPTH + 1:
      raise UserError(_too_deep(name))
    level = [
      child
      for parent in level
      if isinstance(parent, (list, dict))
      for child in (parent.values() if isinstance(parent, dict) else parent)
    ]


def _too_deep(name):
  return f'{name} is nested more than {MAX_DEPTH} levels deep'
