"""Writes metrics to Weights & Biases (wandb); its errors never end a run."""

import contextlib
import html
import importlib
import importlib.util
import os
import secrets

from maskdiff.errors import UserError, one_line
from maskdiff.monitoring import terminal

# Seconds that wandb may delay a training at its start and at its end.
START_S, END_S = 30, 60


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

  The work directory stores the id of the wandb run, so that a resumed run
  continues in the same wandb run. wandb cannot go back to an earlier step, so
  repeated steps are written a second time: rows carry their own `step`, which
  replaces wandb's step counter.
  """

  def __init__(self, workdir, start_step, project, config):
    self._run = None
    path = os.path.join(workdir, 'wandb_id')
    with self._until_error('opening the run'):
      self._wandb = importlib.import_module('wandb')
      if not start_step or not os.path.exists(path):
        with open(path, 'w') as f:
          f.write(secrets.token_hex(4))
      with open(path) as f:
        run_id = f.read().strip()
      self._run = self._open(
        workdir,
        project=project,
        id=run_id,
        name=os.path.basename(os.path.abspath(workdir)),
        config=config,
      )
      self._run.define_metric('*', step_metric='step')

  def _open(self, workdir, **options):
    """Opens the wandb run; offline if the server cannot be reached."""
    options |= dict(
      dir=workdir,
      resume='allow',
      allow_val_change=True,  # the config may change when a run resumes
      settings=self._wandb.Settings(
        console='off',  # do not capture what the user prints
        init_timeout=START_S,
        finish_timeout=END_S,
      ),
    )
    try:
      return self._wandb.init(**options)
    except Exception as error:
      terminal.warn(
        f'warning: wandb: {one_line(error)}; rows are kept for `wandb sync` '
        f'in {os.path.join(workdir, "wandb")}'
      )
    with contextlib.suppress(Exception):
      self._wandb.teardown()  # a second init fails while the failed run is open
    return self._wandb.init(mode='offline', **options)

  @contextlib.contextmanager
  def _until_error(self, action):
    """Reports an error of `action` and stops writing to wandb."""
    try:
      yield
    except Exception as error:
      self._run = None
      terminal.warn(
        f'warning: wandb, {action}: {one_line(error)}; '
        'the run continues without it'
      )

  def scalars(self, step, values):
    """Writes a row of numbers; values that are lists are left out."""
    if self._run:
      numbers = {k: v for k, v in values.items() if not isinstance(v, list)}
      with self._until_error(f'the row of step {step}'):
        self._run.log({'step': step, **numbers})

  def text(self, step, name, text):
    """Writes a text as preformatted HTML."""
    if self._run:
      escaped = html.escape(text)
      text = f'<pre style="white-space: pre-wrap">{escaped}</pre>'
      with self._until_error(f'the text of step {step}'):
        self._run.log(
          {'step': step, name: self._wandb.Html(text, inject=False)}
        )

  def close(self):
    if self._run:
      with self._until_error('closing'):
        self._run.finish()
