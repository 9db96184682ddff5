"""Standard streams of a script: closed, without a reader, full, or ASCII.

`protect` is called once, before a script prints. After it:

- Text on standard output is printable: control characters of texts and names
  are escaped (errors.printable), and characters that the encoding lacks, too.
- If the reader of standard output has ended, as in `| head`, a write raises
  OutputClosed. If the disk is full, a write raises UserError.
- A message that cannot be written to standard error is dropped, because the
  loss of standard error must not end a run.
- A stream that was closed before the start reads and writes /dev/null. Without
  this, the next file that is opened would take the place of the stream.
"""

import io
import os
import sys

from maskdiff.errors import OutputClosed, UserError, printable


class _Raw(io.FileIO):
  """Bytes to a standard stream. After an error, further bytes are dropped."""

  broken = False

  def write(self, data):
    if self.broken:
      return len(data)
    try:
      return super().write(data)
    except OSError as error:
      self.broken = True
      if self.fileno() == 2:
        return len(data)
      if isinstance(error, BrokenPipeError):
        raise OutputClosed() from error
      raise UserError(
        f'cannot write to standard output ({error.strerror})'
      ) from error


class _Printable(io.TextIOWrapper):
  """Text to standard output, with control characters escaped."""

  def write(self, text):
    return super().write(printable(text))


def protect():
  """Replaces the standard streams; see the top of this file.

  Streams that are not those of the process, such as those of a test or of a
  notebook, stay as they are.
  """
  for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
    try:
      os.fstat(number)
    except OSError:
      handle = os.open(os.devnull, flags)
      if handle != number:  # a lower number is free as well
        os.dup2(handle, number)
        os.close(handle)
  if sys.stdin is None:
    sys.stdin = open(os.devnull, encoding='utf-8')
  sys.stdout = _replaced(sys.stdout, 1, _Printable)
  sys.stderr = _replaced(sys.stderr, 2, io.TextIOWrapper)


def clear_terminal():
  """Clears the terminal of standard output, which `protect` would escape."""
  _control(b'\x1b[2J\x1b[H')


def erase_lines(number):
  """Erases the last lines of the terminal of standard output.

  Args:
    number: lines above that of the cursor, which is at the start of its line.
  """
  if number:
    _control(b'\x1b[%dA\x1b[J' % number)


def _control(sequence):
  sys.stdout.flush()
  sys.stdout.buffer.write(sequence)
  sys.stdout.buffer.flush()


def _replaced(stream, number, form):
  """Returns the stream to use instead of standard output or error."""
  encoding, unbuffered = 'utf-8', False
  if stream is not None:
    if not _is_standard(stream, number):
      return stream
    stream.flush()
    encoding, unbuffered = stream.encoding, stream.write_through
  raw = _Raw(number, 'w', closefd=False)
  return form(
    io.BufferedWriter(raw),
    encoding=encoding,
    errors='backslashreplace',
    line_buffering=unbuffered or number == 2 or raw.isatty(),
  )


def _is_standard(stream, number):
  """Returns whether a stream is the one that Python opened for a descriptor."""
  try:
    # PYTHONUNBUFFERED leaves out the buffer between text and bytes.
    raw = getattr(stream.buffer, 'raw', stream.buffer)
    return type(raw) is io.FileIO and raw.fileno() == number
  except (AttributeError, OSError, ValueError):
    return False
