"""Figures of the report: metrics of runs over time, and goodput."""

import numpy as np
import plotly.graph_objects as go

from maskdiff.monitoring import history, mask_ratio_curves, smoothing, traces
from maskdiff.monitoring.panel import Panel, make_figure, with_ranges
from maskdiff.monitoring.traces import Series


def panels(runs):
  """Returns the panels that have data.

  Args:
    runs: list of history.Run.
  """
  candidates = [
    _heldout(runs),
    _training(runs),
    mask_ratio_curves.heldout(runs),
    mask_ratio_curves.training(runs),
    _plain(
      runs,
      'learning_rate',
      'Learning rate',
      'At the last step of each row of metrics.',
      'train/learning_rate',
    ),
    _plain(
      runs,
      'grad_norm',
      'Gradient norm',
      'Largest of each row of metrics, before clipping. Bold: smoothed.',
      'train/grad_norm',
      reduce=np.max,
      smooth=True,
    ),
    _plain(
      runs,
      'tokens_per_s',
      'Tokens per second',
      'Of all devices. Evaluations are not counted.',
      'train/tokens_per_s',
    ),
    _plain(
      runs,
      'mfu',
      'Model FLOPs utilization, %',
      'Model FLOPs per second, relative to the peak of all devices.',
      'train/mfu',
      scale=100,
    ),
    _step_time(runs),
    _skipped(runs),
    _goodput(runs),
  ]
  return [panel for panel in candidates if panel.figure.data]


def _heldout(runs):
  """Returns a panel of the held-out bound of each dataset, with error bars."""
  figure, shown, choices = make_figure(), [], []
  for i, run in enumerate(runs):
    for dataset in history.datasets(run):
      p = history.prefix(dataset)
      steps, loss = history.series(run, f'{p}/loss_nats_per_token')
      if not len(steps):
        continue
      stderr = dict(
        zip(*history.series(run, f'{p}/stderr_nats_per_token'), strict=True)
      )
      bars = [stderr.get(step, 0.0) for step in steps]
      name = dataset or 'all'
      choices += [name] if name not in choices else []
      bits = history.bits_per_nat(run, dataset)
      trace = traces.line(run, i, steps, loss, name, bits, mode='lines+markers')
      trace.marker.size = 6 if len(steps) < 60 else 3
      trace.error_y = dict(array=traces.numbers(bars), thickness=1.2, width=2)
      figure.add_trace(trace)
      shown += [
        Series(steps, loss + side * np.array(bars), bits) for side in (-1, 1)
      ]
  return with_ranges(
    Panel(
      'heldout',
      'Held-out loss',
      'On text not trained on: an upper bound for masked diffusion, exact '
      'for autoregression. Bars are one standard error.',
      figure,
      choices if len(choices) > 1 else [],
    ),
    shown,
  )


def _training(runs):
  """Returns a panel of the training loss, as logged and smoothed."""
  figure, shown = make_figure(), []
  for i, run in enumerate(runs):
    steps, loss = history.series(run, 'train/loss_nats_per_token')
    bits = history.bits_per_nat(run)
    shown += traces.add_noisy_line(figure, run, i, steps, loss, np.mean, bits)
  return with_ranges(
    Panel(
      'training',
      'Training loss',
      'Faint: mean of each row of metrics, which is noisy because tokens have '
      'weight 1/t. Bold: smoothed over neighbouring rows.',
      figure,
    ),
    shown,
  )


def _plain(
  runs, id, title, note, key, reduce=None, scale=1, smooth=False, trim=False
):
  """Returns a panel of a metric over time, with a y axis from 0.

  Args:
    runs: list of history.Run.
    id, title, note: see Panel.
    key: name of the metric.
    reduce: see `smoothing.thin`; by default the last value of a group.
    scale: factor of the values.
    smooth: whether to add a moving average.
    trim: whether outliers may lie outside the y axis.
  """
  figure, shown = make_figure(), []
  reduce = reduce or (lambda values: values[-1])
  for i, run in enumerate(runs):
    steps, values = history.series(run, key)
    values = values * scale
    if smooth:
      shown += traces.add_noisy_line(figure, run, i, steps, values, reduce)
    elif len(steps):
      steps, values = smoothing.thin(steps, values, reduce)
      figure.add_trace(traces.line(run, i, steps, values))
      if trim:
        steps, values = smoothing.without_outliers(steps, values)
      shown.append(Series(steps, values))
  return with_ranges(Panel(id, title, note, figure), shown, 0)


def _step_time(runs):
  """Returns a panel of the seconds per step, measured and planned."""
  panel = _plain(
    runs,
    'step_s',
    'Step time, s',
    'Mean of each row of metrics, in seconds.',
    'train/step_s',
    reduce=np.mean,
    trim=True,
  )
  planned = [
    (i, run) for i, run in enumerate(runs) if run.plan and run.plan['step_s']
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
    'is the share of `step`: steps whose result was used.',
    figure,
    over_time=False,
  )


def _duration(seconds):
  """Formats seconds with a suitable unit."""
  if seconds < 120:
    return f'{seconds:.1f} s'
  if seconds < 7200:
    return f'{seconds / 60:.1f} min'
  return f'{seconds / 3600:.1f} h'
