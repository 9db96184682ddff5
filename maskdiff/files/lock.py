"""A lock of a directory that ends with its process, also between hosts.

The lock is a file in the directory, locked by flock. The kernel releases it
when the process ends, however it ends. Some file systems share flock only among
the processes of one mount (gcsfuse, some mounts of NFS), and some lack it. The
file therefore also names the host and the process that hold the lock, and a
thread of this process sets the time of the file every REFRESH_S seconds. That
needs no space, so it works on a full disk. If flock cannot prove that the
process in the file has ended, `locked` watches the file for WATCH_S seconds.
The file of a free lock is empty. Clocks of hosts are never compared.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import sys
import threading
import time
import uuid

from maskdiff.errors import InUse, UserError, one_line
from maskdiff.files import reading

NAME = '.lock'
REFRESH_S = 20
# gcsfuse and NFS cache the attributes of a file for up to 60 s, so a host can
# see a refresh 60 + REFRESH_S seconds after the one before.
WATCH_S = 100
_POLL_S = 2
_MAX_BYTES = 4096
_BOOT_ID = '/proc/sys/kernel/random/boot_id'

_handles = set()  # descriptors of the locks of this process


@contextlib.contextmanager
def locked(folder, log=print):
  """Context manager that locks an existing directory for this process.

  Processes that only read the directory need no lock. A forked child and a
  program that this process starts do not hold the lock.

  Args:
    folder: the directory.
    log: function that receives a line before a wait of up to WATCH_S seconds
      for a process that may have ended.

  Yields:
    Function without arguments that raises InUse if another process has taken
    the lock. That can happen where flock is not shared, if this process was
    stopped or cut off from the disk for more than WATCH_S seconds.

  Raises:
    InUse: another process holds the lock. The message has its host and pid.
    UserError: the directory cannot be written.
  """
  path = os.path.join(folder, NAME)
  handle, record = _acquire(path, log)
  _handles.add(handle)
  ended, takers = threading.Event(), []
  threading.Thread(
    target=_refresh, args=(path, record, ended, takers), daemon=True
  ).start()

  def check():
    if takers:  # the first record may have been read while it was written
      raise _in_use(path, _content(path) or takers[0])

  try:
    yield check
  finally:
    ended.set()
    if handle in _handles:  # not in a forked child
      # The file stays: on a full disk it could not be made again.
      if _content(path) == record:
        _write(path, b'')
      _handles.discard(handle)
      os.close(handle)


@contextlib.contextmanager
def reserved(path):
  """Context manager that locks the place of a new folder.

  Meanwhile the place is a directory with only the lock file. It is removed
  after an error if it did not exist before.

  Args:
    path: path of the new folder; it does not exist, or `is_empty`.

  Yields:
    Function without arguments to call before os.replace(folder, path), which
    needs an empty place.

  Raises:
    InUse, UserError: see `locked`.
  """
  existed = os.path.isdir(path)
  try:
    os.makedirs(path, exist_ok=True)
  except OSError as error:
    raise UserError(f'cannot make {path!r} ({error.strerror})') from error
  with locked(path):
    free = lambda: os.unlink(os.path.join(path, NAME))
    try:
      yield free
    except BaseException:
      if not existed:
        with contextlib.suppress(OSError):
          free()
          os.rmdir(path)
      raise


def is_empty(folder):
  """Returns whether a directory holds nothing, or only a lock file."""
  return set(os.listdir(folder)) <= {NAME}


def _acquire(path, log):
  """Locks the file; returns its descriptor and the record written to it."""
  while True:
    handle = _open(path)
    try:
      shared = _flock(path, handle)
      kernel = f'{_boot_id()} {os.fstat(handle).st_dev}'
      content = _content(path)
      # Processes of one kernel and mount share flock: the owner has ended.
      ended = shared and _parse(content).get('kernel') == kernel
      if content and not ended:
        _watch(path, content, log)
      # Somebody may have removed the file or the directory in the meantime.
      if _is_file(path, handle):
        record = _record(kernel)
        _write(path, record)
        return handle, record
    except BaseException:
      os.close(handle)
      raise
    os.close(handle)


def _open(path):
  flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
  try:
    handle = os.open(path, flags, 0o666)
  except OSError as error:
    fix = ': delete it' if error.errno in (errno.ELOOP, errno.EISDIR) else ''
    raise UserError(f'cannot lock {path!r} ({error.strerror}){fix}') from error
  info, problem = os.fstat(handle), ''
  if not stat.S_ISREG(info.st_mode):
    problem = 'not a regular file'
  elif info.st_nlink > 1:  # perhaps a file of others, which would be emptied
    problem = 'it is a hard link to another file'
  if problem:
    os.close(handle)
    raise UserError(f'cannot lock {path!r} ({problem}): delete it')
  return handle


def _flock(path, handle):
  """Locks an open file; returns whether the file system can.

  Raises:
    InUse: another process has locked the file.
  """
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
      raise _in_use(path, _content(path)) from error
    return False
  return True


def _watch(path, content, log):
  """Returns if the owner of a file shows no sign of life for WATCH_S seconds.

  Raises:
    InUse: the file was refreshed.
  """
  log(
    f'{_owner(content)} has used {os.path.dirname(path)!r} and did not end in '
    f'order, or still runs: watching it for up to {WATCH_S} s'
  )
  before, end = _time(path), time.monotonic() + WATCH_S
  while time.monotonic() < end:
    time.sleep(min(_POLL_S, WATCH_S / 10))
    found = _content(path)
    if not found:  # the owner has ended
      return
    if found != content or _time(path) != before:
      raise _in_use(path, found)


def _refresh(path, record, ended, takers):
  """Shows signs of life until `ended` is set, in a thread of its own.

  If another process has taken the lock, appends its record to `takers`.
  """
  while not ended.wait(REFRESH_S):
    # Without space, the record could not be written before.
    with contextlib.suppress(OSError):
      found = _content(path)
      if found == record:
        os.utime(path)
      elif found:
        takers.append(found)
        return
      elif found == b'':
        _write(path, record)


def _record(kernel):
  """Returns the contents of the file of this process, a line of JSON."""
  values = {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'command': os.path.basename(sys.argv[0])[:100],
    'since': time.strftime('%Y-%m-%d %H:%M:%S %z'),
    'kernel': kernel,
    'id': uuid.uuid4().hex,
  }
  return json.dumps(values).encode() + b'\n'


def _write(path, record):
  """Writes a record; without space the file stays empty, and flock holds."""
  # gcsfuse uploads a file when it is closed. 'r+': a file that was removed must
  # not come back. The file is never empty in between, as that of a free lock.
  with contextlib.suppress(OSError), open(path, 'r+b') as file:
    file.write(record)
    file.truncate()


def _content(path):
  """Returns the contents of a lock file; None if it cannot be read."""
  try:
    return reading.read_bytes(path, _MAX_BYTES)
  except UserError:
    return None


def _parse(content):
  """Returns the record in a file as a dict; {} if it holds no record."""
  try:
    values = reading.parse_json(content or b'', NAME)
  except UserError:
    return {}
  return values if isinstance(values, dict) else {}


def _owner(content):
  """Returns a phrase that names the process of a record."""
  values = _parse(content)
  if 'host' not in values or 'pid' not in values:
    return 'another process'
  phrase = f'process {values["pid"]} on {values["host"]}'
  if 'command' in values and 'since' in values:
    phrase += f' ({values["command"]}, since {values["since"]})'
  return one_line(phrase)


def _in_use(path, content):
  return InUse(
    f'{os.path.dirname(path)!r} is in use: {_owner(content)} writes to it; '
    'stop that process, or use another directory'
  )


def _boot_id():
  """Returns a text that differs between kernels."""
  try:
    return reading.read_text(_BOOT_ID, 100).strip()
  except UserError:
    return socket.gethostname()


def _time(path):
  """Returns the modification time of a file; None if it does not exist."""
  # Opening a file makes NFS fetch its attributes.
  with contextlib.suppress(UserError, OSError), reading.open_regular(path) as f:
    return os.fstat(f.fileno()).st_mtime_ns
  return None


def _is_file(path, handle):
  """Returns whether the path still names the open file."""
  try:
    return os.path.samestat(os.stat(path), os.fstat(handle))
  except OSError:
    return False


def _close_handles():
  """Closes the locks in a forked child, which would keep them locked."""
  while _handles:
    os.close(_handles.pop())


os.register_at_fork(after_in_child=_close_handles)
