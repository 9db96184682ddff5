"""Exceptions that launch scripts act on, and the exit status of each."""

import contextlib
import difflib
import unicodedata

STATUS_UNEXPECTED = 1
STATUS_USER = 2  # do not restart: the same error would follow
STATUS_AGAIN = 75  # EX_TEMPFAIL: start the same command again
STATUS_OUTPUT_CLOSED = 141  # as of a program that SIGPIPE ended, in a shell


class UserError(ValueError):
  """A bad config, file or argument. The message is one line and names the fix.

  Scripts in launch/ print it without a traceback and exit with `status`.
  """

  status = STATUS_USER


class NotJoined(UserError):
  """The other processes of the run did not start in time.

  The status is 75, since a restart can find them.
  """

  status = STATUS_AGAIN


class InUse(UserError):
  """Another process writes to the same directory.

  The status is 75, since that process may be one that is about to end: a host
  that is lost, or a process that still saves its state.
  """

  status = STATUS_AGAIN


class Preempted(Exception):
  """The run received SIGTERM and saved its state.

  Scripts in launch/ exit with status 75: the same command resumes the run.
  """

  def __init__(self, step):
    """`step` is the step of the saved checkpoint."""
    super().__init__(f'preempted; step {step} is saved')
    self.step = step


class OutputClosed(Exception):
  """The reader of standard output has ended, as in `| head`.

  Scripts in launch/ print nothing and exit with status 141.
  """


def no_checkpoint(workdir):
  """Returns the UserError for a work directory without a checkpoint."""
  return UserError(
    f'{workdir} holds no checkpoint; train one with launch/pretrain.py '
    f'--workdir {workdir}'
  )


def no_workdir(workdir):
  """Returns the UserError for a work directory that does not exist."""
  return UserError(f'there is no work directory {workdir!r}')


def require_utf8(path):
  """Raises UserError if a path has bytes that are not UTF-8."""
  try:
    str(path).encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'the path {str(path)!r} is not UTF-8: rename the folder'
    ) from error


def printable(text):
  """Returns a text without characters that control a terminal.

  Texts of models, files and users may hold escape sequences, which would move
  the cursor or retitle the window. Control characters except newline and tab
  become escapes such as \\x1b, and lone surrogates become \\ud800.
  """
  return ''.join(
    c
    if c in '\n\t' or unicodedata.category(c) not in ('Cc', 'Cs')
    else c.encode('unicode_escape').decode()
    for c in text
  )


def inline(text, length=5000):
  """Returns a text or path that can stand within one line of a terminal.

  All characters that are not printable become escapes, also newlines and the
  marks that reverse the direction of a text. The rest beyond `length`
  characters is cut off.
  """
  return ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode()
    for c in str(text)[:length]
  )


def one_line(error, length=200):
  """Returns the message of an error as one line of at most `length` characters.

  Control characters are escaped. If the message is empty, returns the name of
  the error's class.
  """
  line = ' '.join(str(error).split())[:length]
  return printable(line) or type(error).__name__


def suggestion(word, known):
  """Returns '; did you mean ...?' with the closest known word.

  Returns '' if no known word is close.
  """
  close = difflib.get_close_matches(str(word), list(known), n=1)
  return f'; did you mean {close[0]!r}?' if close else ''


@contextlib.contextmanager
def writing(flag, path):
  """Context manager: an OSError becomes a UserError with the flag and path."""
  try:
    yield
  except OSError as error:
    reason = error.strerror or error  # without the name of a temporary file
    raise UserError(f'--{flag}: cannot write {path!r} ({reason})') from error
