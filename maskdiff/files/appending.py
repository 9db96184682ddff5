"""Appends to files that cannot be written for a while.

The disk or the quota is full, a mount is read-only or has gone: such a fault
must not end a training that lasts weeks. `Appender` then keeps the items in
memory, tries again from time to time, and writes them in their order.
"""

import collections
import contextlib
import json
import os
import stat
import time

from maskdiff.errors import UserError
from maskdiff.files import atomic, reading

MAX_PENDING_BYTES = 16 << 20  # in memory
RETRY_S, MAX_RETRY_S = 1, 60  # the interval doubles after every failure
QUIET_S = 600  # between two warnings about the same file
# An item that the system has accepted can still be lost: file systems of a
# network report some errors only later.
_RECENT_ITEMS = 256
_TAIL_BYTES = 4 << 20


class Appender:
  """Appends items to a file; never raises OSError.

  Attributes:
    dropped: number of items that were given up since the file failed, because
      the pending items had more than MAX_PENDING_BYTES.
  """

  def __init__(self, name, open_file, warn):
    """Opens the file.

    Args:
      name: path, for warnings.
      open_file: function that opens the file for appending, called at the start
        and after every failure. Takes the list of the last items that were
        written, and returns a file descriptor and the number of these items, at
        the end of the list, that the file does not hold. Repairs an item that
        is written in part.
      warn: function that prints a line.
    """
    self._name, self._open_file, self._warn = name, open_file, warn
    self._pending = collections.deque()
    self._pending_bytes = 0
    self._recent = collections.deque(maxlen=_RECENT_ITEMS)
    self._file, self._has_links = None, True
    self._failed, self._failures, self._retry_at = False, 0, 0.0
    self._warned, self._quiet_until = False, 0.0
    self.dropped = 0
    self._write_pending()

  @property
  def nearly_full(self):
    """Whether the pending items take more than half of the memory for them."""
    return self._pending_bytes > MAX_PENDING_BYTES // 2

  def append(self, item):
    """Writes an item, bytes; keeps it in memory if the file cannot be written.

    If there is too much in memory, the oldest items are dropped.
    """
    self._pending.append(item)
    self._pending_bytes += len(item)
    self._write_pending()
    while self._pending_bytes > MAX_PENDING_BYTES:
      self._pending_bytes -= len(self._pending.popleft())
      self.dropped += 1

  def close(self):
    """Writes what is pending, without waiting, and closes the file."""
    for _ in range(2):  # the second time to repair what closing has lost
      self._retry_at = 0.0
      self._write_pending()
      if self._file is None or self._close_file():
        break
    missing = self.dropped + len(self._pending)
    if missing:
      self._warn(f'warning: {self._name} lacks {_number(missing)}')
    self._pending.clear()

  def _write_pending(self):
    """Writes all pending items unless the file failed a short time ago."""
    if self._retry_at > time.monotonic():
      return
    try:
      self._open()
      while self._pending:
        self._write(self._pending[0])
        self._recent.append(self._pending.popleft())
        self._pending_bytes -= len(self._recent[-1])
    except (OSError, UserError) as error:
      self._on_failure(error)
    except BaseException:
      self._close_file()  # an interrupted write may have written a part
      raise
    else:
      self._on_success()

  def _open(self):
    if self._file is not None:
      # The file, or the whole directory, may have been deleted.
      if os.fstat(self._file).st_nlink or not self._has_links:
        return
      self._close_file()
    self._file, lost = self._open_file(list(self._recent))
    self._has_links = os.fstat(self._file).st_nlink > 0
    for _ in range(lost):
      self._pending.appendleft(self._recent.pop())
      self._pending_bytes += len(self._pending[0])

  def _write(self, item):
    """Writes an item completely or, as far as the system allows, not at all."""
    left = memoryview(item)
    try:
      while left:
        left = left[os.write(self._file, left) :]
    except OSError:
      if len(left) < len(item):
        with contextlib.suppress(OSError):
          size = os.fstat(self._file).st_size
          os.ftruncate(self._file, size - len(item) + len(left))
      raise

  def _on_failure(self, error):
    self._close_file()
    retry_s = min(RETRY_S * 2 ** min(self._failures, 10), MAX_RETRY_S)
    self._retry_at = time.monotonic() + retry_s
    self._failures += 1
    if self._failed:
      return
    self._failed = True
    # A disk that is nearly full fails again and again.
    self._warned = time.monotonic() >= self._quiet_until
    if self._warned:
      self._quiet_until = time.monotonic() + QUIET_S
      reason = getattr(error, 'strerror', None) or error
      self._warn(
        f'warning: cannot write {self._name} ({reason}); the run continues, '
        f'and up to {MAX_PENDING_BYTES >> 20} MiB wait in memory'
      )

  def _on_success(self):
    self._failures, self._retry_at = 0, 0.0
    if not self._failed:
      return
    self._failed = False
    if self._warned or self.dropped:
      lost = f'; it lacks {_number(self.dropped)}' if self.dropped else ''
      self._warn(f'{self._name} is written again{lost}')
    self.dropped = 0

  def _close_file(self):
    """Closes the file; returns whether this worked."""
    file, self._file = self._file, None
    try:
      if file is not None:
        os.close(file)
    except OSError as error:
      self._on_failure(error)
      return False
    return True


def _number(items):
  return '1 entry' if items == 1 else f'{items:,} entries'


def lines(path, warn, prepare=lambda: None):
  """Returns an Appender of lines, bytes that end with a newline.

  A last line that is not whole is removed. A link, FIFO or device at `path` is
  replaced, not followed.

  Args:
    path: path of the file, created if it does not exist.
    warn: function that prints a line.
    prepare: called until it succeeds, before the file is opened for the first
      time; may raise OSError.
  """
  path, prepared = os.fspath(path), False

  def open_file(recent):
    nonlocal prepared
    if not prepared:
      prepare()
      prepared = True
    file = _open_regular(path)
    try:
      return file, _repair(file, recent)
    except BaseException:
      os.close(file)
      raise

  return Appender(path, open_file, warn)


def _open_regular(path):
  """Opens a file of its own, without other names, for reading and appending."""
  with contextlib.suppress(FileNotFoundError):
    info = os.lstat(path)
    if not stat.S_ISREG(info.st_mode):
      os.unlink(path)
    elif info.st_nlink > 1:  # a hard link, perhaps to a file of others
      atomic.write(path, reading.read_bytes(path, info.st_size))
  flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
  safety = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
  return os.open(path, flags | safety, 0o666)


def _repair(file, recent):
  """Makes a file end with a whole line.

  Args:
    file: file descriptor.
    recent: lines that were written to the file.

  Returns:
    The number of lines at the end of `recent` that the file does not hold.
  """
  size = os.fstat(file).st_size
  tail = os.pread(file, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
  *whole, rest = tail.split(b'\n')
  if rest and not _is_json(rest) and (whole or len(tail) == size):
    os.ftruncate(file, size - len(rest))
  elif rest:  # it lacks only its end, or its start is too far back
    whole.append(rest)
    os.write(file, b'\n')
  held = set(whole)
  return next(
    (i for i, line in enumerate(reversed(recent)) if line[:-1] in held),
    len(recent),
  )


def _is_json(line):
  try:
    return isinstance(json.loads(line), dict)
  except (ValueError, RecursionError):
    return False
