"""What a work directory tells of a run: one that is over, or still going on.

Everything is read from files that the run appends to, so that a line which is
only half written is passed over and what is not there yet is simply missing.
"""

import dataclasses
import json
import os
import re

import numpy as np

from maskdiff import config as config_lib
from maskdiff.errors import UserError, no_workdir
from maskdiff.monitoring import ledger, metrics
from maskdiff.objectives.table import OBJECTIVES

RATIO = '/nll_at_mask_ratio_'


@dataclasses.dataclass(frozen=True)
class Run:
  """A run as it stands.

  Attributes:
    name: of its directory.
    workdir: the directory.
    rows: dicts of metrics.jsonl, each with `step`.
    config: dict from a key such as 'train.batch' to its value, with defaults
      where the run does not say; {} without a config.json.
    header: header.txt, or ''.
    skipped: dicts of the ledger, one for each update that was skipped.
    goodput: of `ledger.goodput`, or None without a ledger.
    plan: dict with the keys of planner.plan.FIELDS, or None.
  """

  name: str
  workdir: str
  rows: list
  config: dict
  header: str = ''
  skipped: list = ()
  goodput: dict | None = None
  plan: dict | None = None

  @property
  def causal(self):
    name = self.config.get('objective.name')
    return name in OBJECTIVES and OBJECTIVES[name].left_to_right

  @property
  def last_step(self):
    return max(row['step'] for row in self.rows)


def read_runs(workdirs, plan=None):
  """Reads runs.

  Args:
    workdirs: directories.
    plan: file of launch/plan.py --json, for runs that have no plan.json.

  Returns:
    List of Run.

  Raises:
    UserError: a directory or its metrics are not there, two have the same
      name, or a plan cannot be used.
  """
  known = read_plan(plan) if plan else None
  runs, places = [], {}
  for workdir in workdirs:
    run = read_run(workdir, known)
    if run.name in places:
      raise UserError(
        f'{places[run.name]} and {workdir} have the same name {run.name!r}: '
        'give each run once, and rename one of two directories'
      )
    places[run.name] = workdir
    runs.append(run)
  return runs


def read_run(workdir, plan=None):
  """Reads a run; `plan` is for one without a plan.json of its own.

  Raises:
    UserError: there is no run.
  """
  if not os.path.isdir(workdir):
    raise no_workdir(workdir)
  file = lambda name: os.path.join(workdir, name)
  rows = metrics.read(file('metrics.jsonl'))
  rows = [r for r in rows if isinstance(r, dict) and 'step' in r]
  if not rows:
    raise UserError(
      f'{workdir} has no rows of metrics: give the --workdir of a '
      'launch/pretrain.py that has come to its first evaluation'
    )
  own = file('plan.json')
  lines, total = _read_ledger(file('ledger.jsonl'))
  return Run(
    name=os.path.basename(os.path.abspath(workdir)),
    workdir=str(workdir),
    rows=rows,
    config=_read_config(file('config.json')),
    header=_text(file('header.txt')),
    skipped=[x for x in lines if x.get('event') == 'skipped'],
    goodput=total,
    plan=read_plan(own) if os.path.exists(own) else plan,
  )


def _text(path):
  if not os.path.exists(path):
    return ''
  with open(path, encoding='utf-8', errors='replace') as f:
    return f.read()


def _read_config(path):
  try:
    theirs = json.loads(_text(path))
  except json.JSONDecodeError:  # none, or one that is being written
    return {}
  defaults = config_lib.flatten(config_lib.default())
  return json.loads(json.dumps(defaults)) | config_lib.flatten(theirs)


def _read_ledger(path):
  """Its lines and what they add up to; [] and None if there is nothing."""
  if not os.path.exists(path):
    return [], None
  lines = ledger.read(path)
  return lines, ledger.goodput(path) if lines else None


def read_plan(path):
  """A plan of a training, as launch/plan.py --json has written it.

  Raises:
    UserError: it is something else.
  """
  try:
    with open(path) as f:
      plan = json.load(f)
  except OSError as error:
    raise UserError(
      f'cannot read the plan {path} ({error.strerror})'
    ) from error
  except ValueError as error:
    raise UserError(f'the plan {path} is no JSON ({error})') from error
  if isinstance(plan, list):
    raise UserError(f'{path} is a sweep: plan one config, without --sweep')
  if not isinstance(plan, dict) or plan.get('mode') != 'train':
    raise UserError(
      f'{path} is no plan of a training: launch/plan.py --json FILE writes one'
    )
  return plan


def series(run, key):
  """A value over the run.

  Returns:
    steps and values, two float64 arrays of the rows that have a finite one.
  """
  pairs = [
    (row['step'], row[key])
    for row in run.rows
    if isinstance(row.get(key), (int, float)) and np.isfinite(row[key])
  ]
  steps, values = np.array(pairs, float).reshape(-1, 2).T
  return steps, values


def tokens_at(run, steps):
  """Tokens that were trained on until each step, float64.

  A row says how many a step took at that time, so that runs whose batch was
  changed on the way are counted right.
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
  """Names of the parts of its held-out text; [''] where it is one."""
  found = (
    re.fullmatch('eval/(.+)/loss_nats_per_token', key)
    for row in run.rows
    for key in row
  )
  names = {match[1] for match in found if match}
  return ['', *sorted(names)]


def prefix(dataset):
  """What the names of the metrics of `datasets` begin with."""
  return f'eval/{dataset}' if dataset else 'eval'


def bits_per_nat(run, dataset=''):
  """Bits per byte that a nat per token is on held-out text; None if unknown."""
  p = prefix(dataset)
  for row in reversed(run.rows):
    loss, bits = (
      row.get(f'{p}/{x}') for x in ('loss_nats_per_token', 'bits_per_byte')
    )
    if loss and bits and np.isfinite([loss, bits]).all():
      return bits / loss
  return None


def by_ratio(run, where):
  """Loss by mask ratio in the newest row that has it.

  Args:
    run: Run.
    where: 'train', or `prefix` of a dataset.

  Returns:
    The step, or None; and a list of (ratio, nats per token).
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
  """The texts of each prompt: from its number to a list of (step, text)."""
  found = {}
  for row in run.rows:
    for key, value in row.items():
      if key.startswith('sample/') and isinstance(value, str):
        found.setdefault(int(key.partition('/')[2]), []).append(
          (row['step'], value)
        )
  return dict(sorted(found.items()))


def differences(runs):
  """Config keys that are not the same in all runs.

  Returns:
    Dict from a key to a list with a text for each run; '' where a run does
    not have it.
  """
  keys = sorted({key for run in runs for key in run.config})
  texts = {
    key: [_shown(run.config[key]) if key in run.config else '' for run in runs]
    for key in keys
  }
  return {key: row for key, row in texts.items() if len(set(row)) > 1}


def _shown(value):
  if isinstance(value, str) and value:
    return value
  return json.dumps(value, ensure_ascii=False)


def smooth(values, half):
  """Means over the `half` values before and after each, and it.

  At the start, where a loss falls steeply, there are as few after a value as
  before it; at the end there are those that there are.
  """
  values = np.asarray(values, float)
  total = np.concatenate([[0.0], np.cumsum(values)])
  at = np.arange(len(values))
  first = np.maximum(at - half, 0)
  end = np.minimum(at + np.minimum(at, half) + 1, len(values))
  return (total[end] - total[first]) / (end - first)


def thin(steps, values, how, most=1000):
  """At most so many points: each stands for as many neighbours.

  Args:
    steps, values: arrays of the same length.
    how: function from the values of neighbours to one, such as np.mean.
    most: number of points.

  Returns:
    steps, the last of every group, and values.
  """
  each = -(-len(steps) // most)
  if each <= 1:
    return steps, values
  groups = np.split(np.arange(len(steps)), range(each, len(steps), each))
  return (
    np.array([steps[g[-1]] for g in groups]),
    np.array([how(values[g]) for g in groups]),
  )
