"""Figures of the report: metrics of runs over time, and goodput."""

import functools

import numpy as np
import plotly.graph_objects as go

from maskdiff.errors import UserError, one_line
from maskdiff.monitoring import (
  history,
  ledger,
  loss_curves,
  loss_parts,
  smoothing,
  traces,
)
from maskdiff.monitoring.panel import (
  Panel,
  make_figure,
  of_metrics,
  with_ranges,
)
from maskdiff.monitoring.stage_file import NAME, Curve
from maskdiff.monitoring.traces import Series

# Panels that a stage declares by name, with the functions that draw them.
FIGURES = {
  'heldout': loss_curves.heldout,
  'training': loss_curves.training,
  'by_ratio': functools.partial(loss_parts.heldout, loss_parts.MASK_RATIOS),
  'training_by_ratio': functools.partial(
    loss_parts.training, loss_parts.MASK_RATIOS
  ),
}
# Curves of every run.
CURVES = (
  Curve(
    'learning_rate',
    'Learning rate',
    'At the last step of each row of metrics.',
    'train/learning_rate',
  ),
  Curve(
    'grad_norm',
    'Gradient norm',
    'Largest of each row of metrics, before clipping. Bold: smoothed.',
    'train/grad_norm',
    smooth=True,
    reduce='max',
  ),
  Curve(
    'tokens_per_s',
    'Tokens per second',
    'Of all devices. Evaluations are not counted.',
    'train/tokens_per_s',
  ),
  Curve(
    'mfu',
    'Model FLOPs utilization, %',
    'Model FLOPs per second, relative to the peak of all devices. They count '
    'the logits of every token, as published figures do, although the loss '
    'skips unmasked tokens; they do not count recomputation.',
    'train/mfu',
    scale=100,
  ),
)
STEP_TIME = Curve(
  'step_s',
  'Step time, s',
  'Mean of each row of metrics, in seconds.',
  'train/step_s',
  reduce='mean',
)
REDUCE = {'last': lambda values: values[-1], 'max': np.max, 'mean': np.mean}


def panels(runs):
  """Returns the panels that have values: first the panels of the stages.

  Args:
    runs: list of history.Run.

  Raises:
    UserError: a run has a panel that this version does not know.
  """
  of_stages = dict.fromkeys(panel for run in runs for panel in run.panels)
  candidates = [
    *(_of_stage(runs, panel) for panel in of_stages),
    loss_parts.heldout(loss_parts.WINDOW_POSITIONS, runs),
    loss_parts.training(loss_parts.WINDOW_POSITIONS, runs),
    *(_curve(runs, curve) for curve in CURVES),
    _step_time(runs),
    _skipped(runs),
    _goodput(runs),
  ]
  return [p for p in candidates if p.figure.data or p.not_drawn]


def _of_stage(runs, panel):
  """Draws a panel of `Stage.panels`, a Curve or a name in FIGURES."""
  if isinstance(panel, Curve):
    return _curve(runs, panel)
  if panel not in FIGURES:
    raise UserError(
      f'{NAME} of a run names the panel {one_line(repr(panel))}, which this '
      'version of maskdiff does not draw; use the version that wrote the run'
    )
  return FIGURES[panel](runs)


def _curve(runs, curve, trim=False):
  """Returns the panel of a Curve.

  Args:
    runs: list of history.Run.
    curve: Curve.
    trim: whether outliers may lie outside the y axis.
  """
  figure, shown = make_figure(), []
  reduce = REDUCE[curve.reduce]
  for i, run in enumerate(runs):
    steps, values = history.series(run, curve.key)
    values = values * curve.scale
    if curve.smooth:
      shown += traces.add_noisy_line(figure, run, i, steps, values, reduce)
    elif len(steps):
      steps, values = smoothing.thin(steps, values, reduce)
      figure.add_trace(traces.line(run, i, steps, values))
      if trim:
        steps, values = smoothing.without_outliers(steps, values)
      shown.append(Series(steps, values))
  not_drawn = of_metrics(runs, lambda _: [curve.key])
  panel = Panel(
    *(curve.id, curve.title, curve.note, figure), not_drawn=not_drawn
  )
  return with_ranges(panel, shown, 0 if curve.from_zero else None)


def _step_time(runs):
  """Returns a panel of the seconds per step, measured and planned."""
  panel = _curve(runs, STEP_TIME, trim=True)
  planned = [
    (i, run)
    for i, run in enumerate(runs)
    if run.plan and run.plan.get('step_s')
  ]
  if not planned:
    return panel
  high = panel.range[1] if panel.range else 0
  for i, run in planned:
    step_s = run.plan['step_s']
    ends = [0, run.last_step]
    trace = traces.line(run, i, ends, [step_s, step_s])
    trace.line.dash, trace.line.width = 'dot', 2
    trace.hovertemplate = (
      f'%{{y:.4g}} planned<extra>{traces.run_name(run)}</extra>'
    )
    panel.figure.add_trace(trace)
    high = max(high, 1.1 * step_s)
  return panel._replace(
    note=f'{panel.note} Dotted: the plan of launch/plan.py.', range=[0, high]
  )


def _skipped(runs):
  """Returns a panel of the cumulative number of skipped updates."""
  figure, shown = make_figure(), []
  for i, run in enumerate(runs):
    steps, values = history.series(run, 'train/skipped_updates')
    if values.any():
      total = np.cumsum(values)
      steps, total = smoothing.thin(steps, total, lambda v: v[-1])
      trace = traces.line(run, i, steps, total)
      trace.line.shape = 'hv'
      figure.add_trace(trace)
      shown.append(Series(steps, total))
  return with_ranges(
    Panel(
      'skipped',
      'Skipped updates',
      'Cumulative number of updates skipped because of their loss or gradient '
      'norm. Runs without skipped updates are not drawn.',
      figure,
      not_drawn=of_metrics(runs, lambda _: ['train/skipped_updates']),
    ),
    shown,
    0,
  )


def _goodput(runs):
  """Returns a panel of the share of wall time by kind, one bar per run."""
  figure = make_figure()
  shown = [(i, run) for i, run in enumerate(runs) if run.goodput]
  shown = [(i, run) for i, run in shown if run.goodput['wall_s']]
  order = ['step', *(kind for kind in traces.TIMES if kind != 'step')]
  for kind in order:
    seconds = [run.goodput['seconds'][kind] for _, run in shown]
    if any(seconds):
      share = [
        100 * s / run.goodput['wall_s']
        for s, (_, run) in zip(seconds, shown, strict=True)
      ]
      figure.add_trace(
        go.Bar(
          x=traces.numbers(share),
          y=list(range(len(shown))),
          customdata=[_duration(s) for s in seconds],
          orientation='h',
          name=kind,
          marker=dict(color=traces.TIMES[kind]),
          showlegend=True,
          hovertemplate=f'{kind} %{{x:.1f}}%, %{{customdata}}<extra></extra>',
          meta={},
        )
      )
  figure.update_layout(barmode='stack', hovermode='closest', bargap=0.3)
  figure.update_xaxes(range=[0, 101], ticksuffix='%', dtick=25)
  figure.update_yaxes(
    autorange='reversed',
    tickvals=list(range(len(shown))),
    ticktext=[traces.run_name(run, 14) for _, run in shown],
  )
  return Panel(
    'goodput',
    'Where the time went',
    'Share of the wall time since the first start, over all restarts. Goodput '
    f'is the share of {_useful()}: work whose result was used.',
    figure,
    over_time=False,
  )


def _useful():
  """Returns the useful kinds of time as text."""
  kinds = [kind for kind, about in ledger.KINDS.items() if about.useful]
  return ' and '.join(f'`{kind}`' for kind in kinds)


def _duration(seconds):
  """Formats seconds with a suitable unit."""
  if seconds < 120:
    return f'{seconds:.1f} s'
  if seconds < 7200:
    return f'{seconds / 60:.1f} min'
  return f'{seconds / 3600:.1f} h'
