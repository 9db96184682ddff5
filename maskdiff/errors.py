"""How a run ends other than done: the errors that mean something to others."""

import contextlib

STATUS_UNEXPECTED = 1
STATUS_USER = 2  # a restart would only repeat it
STATUS_AGAIN = 75  # EX_TEMPFAIL: the same command may do better, or goes on


class UserError(ValueError):
  """A bad config, file or argument. The message is one line and names the fix.

  Scripts in launch/ print it without a traceback and exit with status 2.
  """


class NotJoined(UserError):
  """Other processes of the run were not there in time.

  A restart can find them, so that scripts exit with status 75.
  """


class Preempted(Exception):
  """The run was told to end, and has saved what it had done.

  Scripts in launch/ exit with status 75: the same command goes on.
  """

  def __init__(self, step):
    """`step` is the one that was saved."""
    super().__init__(f'told to end; step {step} is saved')
    self.step = step


@contextlib.contextmanager
def writing(flag, path):
  """Turns errors of the disk into a UserError that names the flag of a file."""
  try:
    yield
  except OSError as error:
    raise UserError(f'--{flag}: cannot write {path!r} ({error})') from error
