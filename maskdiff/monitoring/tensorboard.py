"""Writes TensorBoard event files, in the thread of the caller.

The SummaryWriter of tensorboardX writes in a thread. That thread dies at the
first error of the disk, and the training then waits for it for ever.
"""

import contextlib
import itertools
import os
import socket
import struct
import time

from maskdiff.files.appending import Appender


class Board:
  """Writes scalars and texts for TensorBoard; errors of the disk never raise.

  After an error the rows continue in a new event file: TensorBoard reads an
  event file up to the first record that is not whole.
  """

  def __init__(self, folder, start_step, warn):
    """Opens an event file.

    Args:
      folder: folder of the event files; created.
      start_step: step after which older events of the folder are void.
      warn: function that prints a line.
    """
    from tensorboardX.proto.event_pb2 import SessionLog

    # Only the process that writes needs tensorboardX.
    start = SessionLog(status=SessionLog.START)
    purge = start_step + 1 if start_step else 0
    self._file = Appender(folder, _opener(folder), warn)
    self._file.append(_event(purge, session_log=start))

  def scalars(self, step, values):
    """Writes the numbers among the values of a dict, under their names."""
    from tensorboardX.proto.summary_pb2 import Summary

    summary = Summary(
      value=[
        Summary.Value(tag=name, simple_value=_number(value))
        for name, value in values.items()
        if _number(value) is not None
      ]
    )
    self._file.append(_event(step, summary=summary))

  def text(self, step, name, text):
    """Writes a text as preformatted Markdown."""
    from tensorboardX.summary import text as summary_of_text

    summary = summary_of_text(name, f'```\n{text}\n```')
    self._file.append(_event(step, summary=summary))

  def close(self):
    self._file.close()


def _opener(folder):
  """Returns the function that opens a new event file for an Appender."""
  counter = itertools.count()
  last_path, last_recent = None, None

  def open_file(recent):
    nonlocal last_path, last_recent
    if last_path and recent == last_recent:  # it holds no whole event
      with contextlib.suppress(OSError):
        os.unlink(last_path)
    last_path, last_recent = None, recent
    if os.path.islink(folder):  # planted, perhaps to a folder of others
      os.unlink(folder)
    # Not its parents: a work directory that is gone must not come back empty.
    with contextlib.suppress(FileExistsError):
      os.mkdir(folder)
    name = f'events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}'
    # TensorBoard reads the files in the order of their names.
    path = f'{name}.{os.getpid()}.{next(counter):06}'
    path = os.path.join(folder, path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    file, last_path = os.open(path, flags, 0o666), path
    head = _event(0, file_version='brain.Event:2')
    try:
      if os.write(file, head) < len(head):
        raise OSError('there is no room')
    except OSError:
      os.close(file)
      raise
    return file, 0

  return open_file


def _number(value):
  """Returns a number, or an array that holds one, as a float; else None."""
  if isinstance(value, str):
    return None
  try:
    return float(value)
  except (TypeError, ValueError):
    return None


def _event(step, **fields):
  """Returns an event as a record: length, checksum, event, checksum."""
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.record_writer import masked_crc32c

  event = Event(step=step, wall_time=time.time(), **fields).SerializeToString()
  size = struct.pack('<Q', len(event))
  checksum = lambda content: struct.pack('<I', masked_crc32c(content))
  return size + checksum(size) + event + checksum(event)
