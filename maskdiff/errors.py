"""The one exception that means: the user can fix this."""


class UserError(ValueError):
  """A bad config, file or argument. The message is one line and names the fix.

  Scripts in launch/ print it without a traceback and exit with status 2.
  """
