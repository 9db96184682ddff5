"""Numbers out of a run: JSON lines, TensorBoard, wandb, and the terminal.

`metrics.jsonl` in the work directory is the source of truth: one object per
row with `step` and scalars whose names carry their units.
"""

import contextlib
import html
import importlib.util
import json
import os
import secrets
import sys

import tensorboardX
import tqdm

from maskdiff.distributed.chips import PEAK_FLOPS
from maskdiff.errors import UserError, one_line

# How long wandb may hold up a training at its start, and at its end.
WANDB_START_S, WANDB_END_S = 30, 60


def utilization(tokens_per_s, flops_per_token, devices):
  """Model FLOPs utilization in [0, 1], or None where the peak is not known."""
  peak = PEAK_FLOPS.get(devices[0].device_kind)
  if peak is None:
    return None
  return tokens_per_s * flops_per_token / (peak * len(devices))


class Writer:
  """Appends scalars and texts to files; does nothing if not `active`."""

  def __init__(
    self, workdir, start_step, active, wandb_project='', config=None
  ):
    """Opens the files, dropping rows after `start_step`.

    A run that died after its last checkpoint has written rows of steps that
    it will do again; one that starts from scratch (0) keeps none.

    Args:
      workdir: directory of the run.
      start_step: the step that it goes on from.
      active: whether this process writes.
      wandb_project: where wandb gets the same; '' for nowhere.
      config: dict of what wandb is to keep as the run's config.
    """
    self._active = active
    if not active:
      return
    path = os.path.join(workdir, 'metrics.jsonl')
    rows = read(path)
    with open(path + '.tmp', 'w') as f:
      f.writelines(
        json.dumps(r) + '\n'
        for r in rows
        if start_step and r['step'] <= start_step
      )
    os.replace(path + '.tmp', path)
    self._rows = open(path, 'a')
    self._board = tensorboardX.SummaryWriter(
      os.path.join(workdir, 'tensorboard'),
      purge_step=start_step + 1 if start_step else 0,
    )
    self._wandb = None
    if wandb_project:
      self._wandb = _Wandb(workdir, start_step, wandb_project, config)

  def scalars(self, step, values):
    """Writes a row; values that are lists go to the JSON lines alone."""
    if not self._active:
      return
    self._rows.write(json.dumps({'step': step, **values}) + '\n')
    self._rows.flush()
    for name, value in values.items():
      if not isinstance(value, list):
        self._board.add_scalar(name, value, step)
    if self._wandb:
      self._wandb.scalars(step, values)

  def text(self, step, name, text):
    """Writes a text, such as a sample."""
    if self._active:
      self._rows.write(json.dumps({'step': step, name: text}) + '\n')
      self._rows.flush()
      self._board.add_text(name, f'```\n{text}\n```', step)
      if self._wandb:
        self._wandb.text(step, name, text)

  def close(self):
    if self._active:
      self._rows.close()
      self._board.close()
      if self._wandb:
        self._wandb.close()


def require_wandb(project):
  """Raises UserError if there is a project, and no wandb to write to it."""
  found = importlib.util.find_spec('wandb')
  # A folder that only has the name, such as wandb's own output, has no origin.
  if project and (found is None or found.origin is None):
    raise UserError(
      f'config.train.wandb_project={project!r} needs wandb: pip install wandb, '
      "or --config.train.wandb_project='' to do without"
    )


class _Wandb:
  """A run of wandb's, which the training does without if anything fails.

  Its id is kept in the work directory, so that a run which is resumed goes on
  there. wandb never goes back, so steps that are done again are written again:
  rows are placed by their `step`, not by wandb's own count.
  """

  def __init__(self, workdir, start_step, project, config):
    self._run = None
    path = os.path.join(workdir, 'wandb_id')
    with self._tried('opening the run'):
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

  def _open(self, workdir, **about):
    """Opens the run, and offline if there is no way to the server."""
    about |= dict(
      dir=workdir,
      resume='allow',
      allow_val_change=True,  # of the config, from one start to the next
      settings=self._wandb.Settings(
        console='off',  # what is printed is the user's own
        init_timeout=WANDB_START_S,
        finish_timeout=WANDB_END_S,
      ),
    )
    try:
      return self._wandb.init(**about)
    except Exception as error:
      _say(
        f'warning: wandb: {one_line(error)}; rows are kept for `wandb sync` in '
        f'{os.path.join(workdir, "wandb")}'
      )
    with contextlib.suppress(Exception):
      self._wandb.teardown()  # else the run that failed is in its way
    return self._wandb.init(mode='offline', **about)

  @contextlib.contextmanager
  def _tried(self, what):
    """Says what failed, once, and that it is done without from then on."""
    try:
      yield
    except Exception as error:
      self._run = None
      _say(f'warning: wandb, {what}: {one_line(error)}; going on without it')

  def scalars(self, step, values):
    if self._run:
      numbers = {k: v for k, v in values.items() if not isinstance(v, list)}
      with self._tried(f'the row of step {step}'):
        self._run.log({'step': step, **numbers})

  def text(self, step, name, text):
    if self._run:
      page = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
      with self._tried(f'the text of step {step}'):
        self._run.log(
          {'step': step, name: self._wandb.Html(page, inject=False)}
        )

  def close(self):
    if self._run:
      with self._tried('closing'):
        self._run.finish()


def _say(text):
  """A line on standard error that leaves a progress bar whole."""
  tqdm.tqdm.write(text, file=sys.stderr)


def read(path):
  """The rows of a metrics.jsonl; [] if there is none.

  A last line that a crash left unfinished is passed over.
  """
  if not os.path.exists(path):
    return []
  rows = []
  with open(path) as f:
    for line in f:
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return rows


class Progress:
  """A bar with the time left on a terminal, plain lines elsewhere."""

  def __init__(self, start_step, steps, active):
    self._steps, self._active, self._bar = steps, active, None
    if active and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        total=steps, initial=start_step, unit='step', dynamic_ncols=True
      )

  def update(self, step, step_s, text):
    """Shows that `step` steps are done, at `step_s` seconds each lately."""
    if self._bar:
      self._bar.update(step - self._bar.n)
      self._bar.set_postfix_str(text)
    elif self._active:
      left = _duration(step_s * (self._steps - step))
      self.say(f'step {step}/{self._steps}  {text}  {left} left')

  def say(self, text):
    """Prints a message without breaking the bar."""
    if self._bar:
      self._bar.write(text, file=sys.stderr)
    elif self._active:
      print(text, file=sys.stderr, flush=True)

  def close(self):
    if self._bar:
      self._bar.close()


def _duration(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'


def table(rows):
  """Lines up rows of cells in columns; numbers to the right."""
  cells = [
    [f'{c:,}' if isinstance(c, int) else str(c) for c in r] for r in rows
  ]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(
      c.rjust(w) if isinstance(raw, int) else c.ljust(w)
      for c, raw, w in zip(line, row, widths, strict=True)
    ).rstrip()
    for line, row in zip(cells, rows, strict=True)
  )
