"""Writes metrics to Weights & Biases (wandb); its errors never end a run."""

import contextlib
import html
import importlib
import importlib.util
import os
import queue
import re
import secrets
import threading
import time

from maskdiff.errors import UserError, one_line
from maskdiff.files import atomic, reading
from maskdiff.monitoring import terminal

# Seconds that wandb may take to open a run, and to end it.
START_S, END_S = 30, 60
_WITHOUT_SERVER = ('offline', 'disabled')  # values of WANDB_MODE
MAX_WAITING = 10_000  # rows and texts that wandb has not taken yet


def require_wandb(project):
  """Raises UserError if a project is set and wandb is not installed."""
  found = importlib.util.find_spec('wandb')
  # A folder named wandb, such as wandb's own output, is found without origin.
  if project and (found is None or found.origin is None):
    raise UserError(
      f'config.train.wandb_project={project!r} needs wandb: pip install wandb, '
      "or --config.train.wandb_project='' to train without it"
    )


class WandbRun:
  """A wandb run; after the first error the training continues without it.

  A thread calls wandb, so that neither a slow server nor wandb's own processes
  delay the training. Only `close` waits, for at most END_S. wandb never asks
  for a login: without one it writes to disk, for `wandb sync`.

  The work directory stores the id of the wandb run, so that a resumed run
  continues in the same wandb run. wandb cannot go back to an earlier step, so
  repeated steps are written a second time: rows carry their own `step`, which
  replaces wandb's step counter.
  """

  def __init__(self, workdir, start_step, project, config):
    """Starts the thread, which opens the run.

    Args: see `metrics.Writer`.
    """
    self._waiting = queue.Queue(MAX_WAITING)
    self._off, self._dropped = False, 0
    self._wandb = self._run = None
    arguments = workdir, start_step, project, config
    self._thread = threading.Thread(
      target=self._work, args=arguments, name='wandb', daemon=True
    )
    self._thread.start()

  def scalars(self, step, values):
    """Writes a row of numbers; values that are lists are left out."""
    numbers = {k: v for k, v in values.items() if not isinstance(v, list)}
    make = lambda: {'step': step, **numbers}
    self._put(f'the row of step {step}', make)

  def text(self, step, name, text):
    """Writes a text as preformatted HTML."""
    text = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
    make = lambda: {'step': step, name: self._wandb.Html(text, inject=False)}
    self._put(f'the text of step {step}', make)

  def close(self):
    """Ends the run, after what is waiting; gives up after END_S."""
    deadline = time.monotonic() + (0 if self._off else END_S)
    with contextlib.suppress(queue.Full):
      self._waiting.put(None, timeout=max(0, deadline - time.monotonic()))
    self._thread.join(max(0, deadline - time.monotonic()))
    late = self._thread.is_alive()
    if not self._off and (late or self._dropped):
      number = self._dropped + (self._waiting.qsize() if late else 0)
      terminal.warn(
        f'warning: wandb did not take all rows in time; it lacks about {number}'
      )
    self._off = True

  def _put(self, action, make):
    if self._off:
      return
    try:
      self._waiting.put_nowait((action, make))
    except queue.Full:
      self._dropped += 1

  def _work(self, workdir, start_step, project, config):
    """Opens the run and writes until `close`, or until the first error."""
    action = 'opening the run'
    try:
      self._wandb = importlib.import_module('wandb')
      run_id = _run_id(os.path.join(workdir, 'wandb_id'), start_step)
      self._run = self._open(
        workdir,
        project=project,
        id=run_id,
        name=os.path.basename(os.path.abspath(workdir)),
        config=config,
      )
      self._run.define_metric('*', step_metric='step')
      while waiting := self._waiting.get():
        action, make = waiting
        self._run.log(make())
      action = 'closing'
      self._run.finish()
    except BaseException as error:  # wandb also calls sys.exit
      if not self._off:
        self._off = True
        terminal.warn(
          f'warning: wandb, {action}: {one_line(error)}; '
          'the run continues without it'
        )

  def _open(self, workdir, **options):
    """Opens the wandb run; offline without a login or without a server."""
    options |= dict(
      dir=workdir,
      resume='allow',
      allow_val_change=True,  # the config may change when a run resumes
      settings=self._wandb.Settings(
        console='off',  # do not capture what the user prints
        silent=True,  # its animations would break the progress bar
        init_timeout=START_S,
        finish_timeout=END_S,
      ),
    )
    try:
      if _needs_login(self._wandb):
        raise UserError('there is no login (`wandb login`)')
      run = self._wandb.init(**options)
      if self._wandb.setup().settings.mode not in _WITHOUT_SERVER:
        terminal.warn(f'wandb: {run.url}')
      return run
    except BaseException as error:
      terminal.warn(
        f'warning: wandb: {one_line(error)}; rows are kept for `wandb sync` '
        f'in {os.path.join(workdir, "wandb")}'
      )
    with contextlib.suppress(Exception):
      self._wandb.teardown()  # a second init fails while the failed run is open
    return self._wandb.init(mode='offline', **options)


def _needs_login(wandb):
  """Returns whether wandb would ask for an API key."""
  settings = wandb.setup().settings
  if settings.mode in _WITHOUT_SERVER:
    return False
  settings.relogin = False  # it would ask in spite of a key
  return not wandb.login(prompt=False, verify=False)


def _run_id(path, start_step):
  """Returns the id of the wandb run of a work directory; a new run makes it."""
  with contextlib.suppress(UserError):
    if start_step and re.fullmatch(
      '[a-zA-Z0-9_-]{1,64}', text := reading.read_text(path, 100).strip()
    ):
      return text
  text = secrets.token_hex(4)
  atomic.write(path, text)
  return text
