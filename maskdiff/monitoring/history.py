"""Reads a run back from its work directory: config, metrics, ledger, plan.

The run may still be training. Incomplete lines are skipped. If a file does not
exist yet, its attribute is empty.
"""

import dataclasses
import json
import os
import re

import numpy as np

from maskdiff import config as config_lib
from maskdiff.errors import UserError, no_workdir
from maskdiff.monitoring import ledger, metrics, stage_file
from maskdiff.objectives.table import OBJECTIVES

RATIO = '/nll_at_mask_ratio_'


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

  @property
  def causal(self):
    """Whether the objective predicts tokens from left to right."""
    name = self.config.get('objective.name')
    return name in OBJECTIVES and OBJECTIVES[name].left_to_right

  @property
  def last_step(self):
    """Last step that has a row of metrics."""
    return max(row['step'] for row in self.rows)


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
    UserError: the directory or its metrics do not exist, or its plan.json or
      stage.json is invalid.
  """
  if not os.path.isdir(workdir):
    raise no_workdir(workdir)
  file = lambda name: os.path.join(workdir, name)
  rows = metrics.read(file('metrics.jsonl'))
  rows = [r for r in rows if isinstance(r, dict) and 'step' in r]
  if not rows:
    raise UserError(
      f'{workdir} has no rows of metrics: give the --workdir of a '
      'launch/pretrain.py run that has finished its first evaluation'
    )
  own_plan = file('plan.json')
  lines, goodput = _read_ledger(file('ledger.jsonl'))
  return Run(
    name=os.path.basename(os.path.abspath(workdir)),
    workdir=str(workdir),
    rows=rows,
    config=_read_config(file('config.json')),
    header=_text(file('header.txt')),
    skipped=[x for x in lines if x.get('event') == 'skipped'],
    goodput=goodput,
    plan=read_plan(own_plan) if os.path.exists(own_plan) else plan,
    panels=stage_file.read_panels(workdir),
  )


def _text(path):
  """Returns the contents of a text file; '' if it does not exist."""
  if not os.path.exists(path):
    return ''
  with open(path, encoding='utf-8', errors='replace') as f:
    return f.read()


def _read_config(path):
  """Returns a config.json by dotted key, with defaults; {} without a file."""
  try:
    saved = json.loads(_text(path))
  except json.JSONDecodeError:  # no file, or it is being written
    return {}
  defaults = config_lib.flatten(config_lib.default())
  return json.loads(json.dumps(defaults)) | config_lib.flatten(saved)


def _read_ledger(path):
  """Returns the lines of a ledger and their goodput; [] and None if empty."""
  if not os.path.exists(path):
    return [], None
  lines = ledger.read(path)
  return lines, ledger.goodput(path) if lines else None


def read_plan(path):
  """Reads a plan of a training, as launch/plan.py --json writes it.

  Raises:
    UserError: the file cannot be read or is not the plan of one training.
  """
  try:
    with open(path) as f:
      plan = json.load(f)
  except OSError as error:
    raise UserError(
      f'cannot read the plan {path} ({error.strerror})'
    ) from error
  except ValueError as error:
    raise UserError(f'the plan {path} is not JSON ({error})') from error
  if isinstance(plan, list):
    raise UserError(f'{path} is a sweep: plan one config, without --sweep')
  if not isinstance(plan, dict) or plan.get('mode') != 'train':
    raise UserError(
      f'{path} is not the plan of a training: write one with launch/plan.py '
      '--json FILE'
    )
  return plan


def series(run, key):
  """Returns the values of a metric over the steps of a run.

  Returns:
    Two float64 arrays, steps and values, from the rows with a finite value.
  """
  pairs = [
    (row['step'], row[key])
    for row in run.rows
    if isinstance(row.get(key), (int, float)) and np.isfinite(row[key])
  ]
  steps, values = np.array(pairs, float).reshape(-1, 2).T
  return steps, values


def tokens_at(run, steps):
  """Returns the number of tokens trained on up to each step, float64.

  The tokens per step are read from the rows of metrics, so the count is right
  even if the batch size changed during the run.
  """
  knots, per_step = [(0.0, 0.0)], None
  for row in run.rows:
    if {'train/tokens_per_s', 'train/step_s'} <= row.keys():
      per_step = round(row['train/tokens_per_s'] * row['train/step_s'])
      step, tokens = knots[-1]
      if row['step'] > step:
        knots.append((row['step'], tokens + (row['step'] - step) * per_step))
  if per_step is None:
    c = run.config
    per_step = c.get('train.batch', 0) * c.get('data.length', 0)
  at, total = np.array(knots).T
  steps = np.asarray(steps, float)
  beyond = np.maximum(steps - at[-1], 0) * per_step
  return np.interp(steps, at, total) + beyond


def datasets(run):
  """Returns '', for all held-out datasets together, and the name of each."""
  found = (
    re.fullmatch('eval/(.+)/loss_nats_per_token', key)
    for row in run.rows
    for key in row
  )
  names = {match[1] for match in found if match}
  return ['', *sorted(names)]


def prefix(dataset):
  """Returns the prefix of the metric names of one of `datasets`."""
  return f'eval/{dataset}' if dataset else 'eval'


def bits_per_nat(run, dataset=''):
  """Returns bits per byte / nats per token, on held-out text, or None."""
  p = prefix(dataset)
  for row in reversed(run.rows):
    loss, bits = (
      row.get(f'{p}/{x}') for x in ('loss_nats_per_token', 'bits_per_byte')
    )
    if loss and bits and np.isfinite([loss, bits]).all():
      return bits / loss
  return None


def by_ratio(run, where):
  """Returns the loss by mask ratio from the newest row that has it.

  Args:
    run: Run.
    where: 'train', or `prefix` of a dataset.

  Returns:
    The step, or None; and a list of (mask ratio, nats per masked token).
  """
  start = where + RATIO
  for row in reversed(run.rows):
    found = sorted(
      (float(key.removeprefix(start)), value)
      for key, value in row.items()
      if key.startswith(start)
    )
    if found:
      return row['step'], found
  return None, []


def samples(run):
  """Returns a dict from prompt number to its samples, [(step, text), ...]."""
  found = {}
  for row in run.rows:
    for key, value in row.items():
      if key.startswith('sample/') and isinstance(value, str):
        found.setdefault(int(key.partition('/')[2]), []).append(
          (row['step'], value)
        )
  return dict(sorted(found.items()))


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
