"""A disk that is full for a while, see the fixture `disk`."""

import errno
import os


class Disk:
  """Takes the place of os.write.

  Attributes:
    room: bytes that can still be written; None for any number.
    error: number of the error of further writes.
  """

  def __init__(self):
    self.room, self.error = None, errno.ENOSPC

  def write(self, file, content, write=os.write):
    if self.room is None:
      return write(file, content)
    if not self.room:
      raise OSError(self.error, os.strerror(self.error))
    done = write(file, content[: self.room])
    self.room -= done
    return done
