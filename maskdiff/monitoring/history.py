"""Reads a run back from its work directory: config, metrics, ledger, plan.

The run may still be training, and its files are not trusted. Damaged lines are
skipped and counted. If a file does not exist yet, its attribute is empty.
"""

import dataclasses
import functools
import json
import os
import re

import numpy as np

from maskdiff.errors import UserError, no_workdir
from maskdiff.monitoring import ledger, metrics_file, stage_file
from maskdiff.monitoring.json_lines import finite
from maskdiff.monitoring.run_files import read_config, read_header, read_plan
from maskdiff.objectives.table import OBJECTIVES

RATIO = '/nll_at_mask_ratio_'
WINDOW_POSITION = '/nll_at_window_position_'
EMA = 'ema_'  # begins the names of metrics of the moving average
BOUND = 'train/loss_nats_per_token'
OTHER_LOSS = 'train/objective_nats_per_token'  # not the bound
# Numbers at the end of these names.
NUMBERS = {RATIO: r'[01](?:\.[0-9]{1,9})?', WINDOW_POSITION: '[1-9][0-9]{0,5}'}
# More datasets, mask ratios or prompts than these make no readable page.
MAX_CHOICES = 100


@dataclasses.dataclass(frozen=True)
class Run:
  """Contents of the work directory of a run.

  Attributes:
    name: name of the directory.
    workdir: path of the directory.
    rows: dicts of metrics.jsonl, each with `step`.
    config: dict from a key such as 'train.batch' to its value, with defaults
      for keys that the run's config.json does not have; {} without a
      config.json.
    header: contents of header.txt, or ''.
    skipped: dicts of the ledger, one per skipped update.
    goodput: result of `ledger.goodput`; None without a ledger.
    plan: dict with the keys of planner.fields.FIELDS, or None.
    panels: panels of the stage of the run, see `stage_file.read_panels`.
    warnings: lines about damaged lines and files that were left out.
  """

  name: str
  workdir: str
  rows: list
  config: dict
  header: str = ''
  skipped: list = ()
  goodput: dict | None = None
  plan: dict | None = None
  panels: tuple = stage_file.PRETRAINING
  warnings: tuple = ()

  @property
  def causal(self):
    """Whether the objective predicts tokens from left to right."""
    name = self.config.get('objective.name')
    return name in OBJECTIVES and OBJECTIVES[name].left_to_right

  @property
  def last_step(self):
    """Last step that has a row of metrics."""
    return max(row['step'] for row in self.rows)

  @functools.cached_property
  def keys(self):
    """Set of the keys of all rows."""
    return {key for row in self.rows for key in row}

  @functools.cached_property
  def tokens(self):
    """Numbers of steps and of tokens up to them, and tokens per later step."""
    knots, per_step = [(0.0, 0.0)], None
    for row in self.rows:
      per_s = finite(row.get('train/tokens_per_s'))
      step_s = finite(row.get('train/step_s'))
      if per_s is not None and step_s is not None:
        per_step = round(per_s * step_s)
        step, tokens = knots[-1]
        if row['step'] > step:
          knots.append((row['step'], tokens + (row['step'] - step) * per_step))
    if per_step is None:
      c = self.config
      per_step = c.get('train.batch', 0) * c.get('data.length', 0)
    return *np.array(knots, float).T, float(per_step)


def read_runs(workdirs, plan=None):
  """Reads several runs.

  Args:
    workdirs: work directories.
    plan: file written by launch/plan.py --json, for runs without a plan.json.

  Returns:
    List of Run.

  Raises:
    UserError: a directory or its metrics do not exist, two directories have
      the same name, or a plan is invalid.
  """
  default_plan = read_plan(plan) if plan else None
  runs, workdir_of = [], {}
  for workdir in workdirs:
    run = read_run(workdir, default_plan)
    if run.name in workdir_of:
      raise UserError(
        f'{workdir_of[run.name]} and {workdir} have the same name '
        f'{run.name!r}: give each run once, and rename one of two directories'
      )
    workdir_of[run.name] = workdir
    runs.append(run)
  return runs


def read_run(workdir, plan=None):
  """Reads a run.

  Args:
    workdir: work directory.
    plan: dict to use if the directory has no plan.json.

  Raises:
    UserError: the directory or its metrics do not exist or cannot be read, or
      its plan.json or stage.json is invalid.
  """
  if not os.path.isdir(workdir):
    raise no_workdir(workdir)
  file = lambda name: os.path.join(workdir, name)
  metrics = metrics_file.read(file('metrics.jsonl'))
  warnings = [metrics.warning(file('metrics.jsonl'))]
  if not metrics.values:
    raise UserError(
      f'{workdir} has no rows of metrics'
      + (f' ({warnings[0]})' if warnings[0] else '')
      + ': give the --workdir of a launch/pretrain.py run that has finished '
      'its first evaluation'
    )
  own_plan = file('plan.json')
  lines, goodput, problem = _read_ledger(file('ledger.jsonl'))
  warnings.append(problem)
  config, problem = read_config(file('config.json'))
  warnings.append(problem)
  header, problem = read_header(file('header.txt'))
  warnings.append(problem)
  return Run(
    name=os.path.basename(os.path.abspath(workdir)),
    workdir=str(workdir),
    rows=metrics.values,
    config=config,
    header=header,
    skipped=[x for x in lines if x.get('event') == 'skipped'],
    goodput=goodput,
    plan=read_plan(own_plan) if os.path.exists(own_plan) else plan,
    panels=stage_file.read_panels(workdir),
    warnings=tuple(filter(None, warnings)),
  )


def _read_ledger(path):
  """Returns lines of a ledger, [] without any; goodput or None; a warning."""
  if not os.path.exists(path):
    return [], None, ''
  try:
    found = ledger.read_lines(path)
    goodput = ledger.goodput(path) if found.values else None
  except UserError as error:
    return [], None, f'the ledger is left out: {error}'
  return found.values, goodput, found.warning(path)


def series(run, key):
  """Returns the values of a metric over the steps of a run.

  Returns:
    Two float64 arrays, steps and values, from the rows with a finite value.
  """
  pairs = [
    (row['step'], value)
    for row in run.rows
    if (value := finite(row.get(key))) is not None
  ]
  steps, values = np.array(pairs, float).reshape(-1, 2).T
  return steps, values


def not_finite(run, keys):
  """Counts the values of metrics that `series` leaves out.

  Returns:
    The number of values that are not finite numbers, and of all values.
  """
  values = [row[key] for row in run.rows for key in keys if key in row]
  return sum(finite(value) is None for value in values), len(values)


def newest(run, key):
  """Returns the newest row that has a metric, even if not finite, or None."""
  return next((row for row in reversed(run.rows) if key in row), None)


def tokens_at(run, steps):
  """Returns the number of tokens trained on up to each step, float64.

  The tokens per step are read from the rows of metrics, so the count is right
  even if the batch size changed during the run.
  """
  at, total, per_step = run.tokens
  steps = np.asarray(steps, float)
  beyond = np.maximum(steps - at[-1], 0) * per_step
  return np.interp(steps, at, total) + beyond


def datasets(run):
  """Returns '', for all held-out datasets together, and the name of each."""
  pattern = 'eval/(.+)/loss_nats_per_token'
  found = (re.fullmatch(pattern, key) for key in run.keys)
  names = {match[1] for match in found if match}
  return ['', *sorted(names)[:MAX_CHOICES]]


def prefix(dataset):
  """Returns the prefix of the metric names of one of `datasets`."""
  return f'eval/{dataset}' if dataset else 'eval'


def bits_per_nat(run, dataset=''):
  """Returns bits per byte / nats per token, on held-out text, or None."""
  p = prefix(dataset)
  for row in reversed(run.rows):
    loss, bits = (
      finite(row.get(f'{p}/{x}'))
      for x in ('loss_nats_per_token', 'bits_per_byte')
    )
    if loss and bits and loss > 0 and bits > 0:
      return bits / loss
  return None


def by_part(run, where, metric):
  """Returns the loss of each part of the tokens from the newest row with it.

  Args:
    run: Run.
    where: 'train', or `prefix` of a dataset.
    metric: RATIO for mask ratios, WINDOW_POSITION for positions in a window.

  Returns:
    The step, or None; and a list of (number of the part, such as its mask
    ratio; nats per token), in the order of the numbers. A loss that is not
    finite is None.
  """
  pattern = re.escape(where + metric) + f'({NUMBERS[metric]})'
  matches = [m for key in run.keys if (m := re.fullmatch(pattern, key))]
  for row in reversed(run.rows if matches else ()):
    found = {float(m[1]): finite(row[m[0]]) for m in matches if m[0] in row}
    if found:
      return row['step'], sorted(found.items())[:MAX_CHOICES]
  return None, []


def samples(run):
  """Returns a dict from prompt number to its samples, [(step, text), ...]."""
  matches = (re.fullmatch('sample/(0|[1-9][0-9]{0,8})', k) for k in run.keys)
  keys = sorted((int(match[1]), match[0]) for match in matches if match)
  found = {
    number: [
      (row['step'], row[key])
      for row in run.rows
      if isinstance(row.get(key), str)
    ]
    for number, key in keys[:MAX_CHOICES]
  }
  return {number: texts for number, texts in found.items() if texts}


def differences(runs):
  """Returns the config keys whose values differ between runs.

  Returns:
    Dict from key to a list of texts, one per run; '' if a run does not have
    the key.
  """
  keys = sorted({key for run in runs for key in run.config})
  texts = {
    key: [_format(run.config[key]) if key in run.config else '' for run in runs]
    for key in keys
  }
  return {key: row for key, row in texts.items() if len(set(row)) > 1}


def _format(value):
  if isinstance(value, str) and value:
    return value
  return json.dumps(value, ensure_ascii=False)
