"""Curves of runs as Plotly figures, for the page that report.py makes.

What a trace is drawn with besides is in its `meta`: `run`, the number of the
run that it belongs to; `tokens`, its other x axis; `bits`, a factor from nats
per token to bits per byte; `choice`, which of the panel's choices it is of.
"""

import html
import math
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from maskdiff.monitoring import history, ledger

# Told apart by those who see no red or no green, on white and on black.
COLOURS = (
  *('#3b82c4', '#e07b28', '#2f9e68', '#b05fb5'),
  *('#d64f5a', '#8a8f2a', '#2a9fb0', '#9a7257'),
)
DASHES = ('solid', 'dash', 'dot', 'dashdot')  # when the colours are used up
# Of mask ratios, from light to dark, and of the kinds of time.
SHADES = ('#f2b134', '#e8743b', '#c9466b', '#8b4a9c', '#4a5aa8')
TIMES = dict(
  zip(
    (*ledger.KINDS, 'repeated', 'down'),
    (
      *('#8fa3b5', '#6f8fc9', '#b58fd1', '#e0a94f', '#2f9e68'),
      *('#3aa7b5', '#9a7257', '#c9ced3', '#d64f5a', '#5b6169'),
    ),
    strict=True,
  )
)
EARLY = 0.05  # of a run, what the height of an axis does not depend on
SMOOTHING = 0.02  # of the rows, on either side


class Panel(NamedTuple):
  """A figure of the page.

  Attributes:
    id: of its element.
    title, note: texts.
    figure: plotly Figure.
    choices: names that the reader chooses among; [] where there is no choice.
    over_time: whether its x axis is steps or tokens.
    range: of the y axis when it opens.
    range_bits: the same in bits per byte; None if it has no such unit.
  """

  id: str
  title: str
  note: str
  figure: go.Figure
  choices: list = ()
  over_time: bool = True
  range: list | None = None
  range_bits: list | None = None


def panels(runs):
  """The figures, those that have something to show."""
  made = [
    _heldout(runs),
    _training(runs),
    _newest_by_ratio(runs),
    _training_by_ratio(runs),
    _plain(
      runs,
      'learning_rate',
      'Learning rate',
      'Of the optimizer, at the last step of each row.',
      'train/learning_rate',
    ),
    _plain(
      runs,
      'grad_norm',
      'Gradient norm',
      'The largest of each row, before clipping; smoothed in bold.',
      'train/grad_norm',
      how=np.max,
      smooth=True,
    ),
    _plain(
      runs,
      'tokens_per_s',
      'Tokens per second',
      'Of all devices, while training; evaluations are not counted.',
      'train/tokens_per_s',
    ),
    _plain(
      runs,
      'mfu',
      'Model FLOPs utilization, %',
      'Share of the peak of all devices that is spent on the model.',
      'train/mfu',
      scale=100,
    ),
    _step_time(runs),
    _skipped(runs),
    _goodput(runs),
  ]
  return [panel for panel in made if panel is not None and panel.figure.data]


# Panels


def _heldout(runs):
  """The bound of every dataset, with error bars."""
  figure, shown, choices = _figure(), [], []
  for i, run in enumerate(runs):
    for dataset in history.datasets(run):
      p = history.prefix(dataset)
      steps, loss = history.series(run, f'{p}/loss_nats_per_token')
      if not len(steps):
        continue
      known = dict(
        zip(*history.series(run, f'{p}/stderr_nats_per_token'), strict=True)
      )
      bars = [known.get(step, 0.0) for step in steps]
      name = dataset or 'all'
      choices += [name] if name not in choices else []
      bits = history.bits_per_nat(run, dataset)
      trace = _line(run, i, steps, loss, name, bits, mode='lines+markers')
      trace.marker.size = 6 if len(steps) < 60 else 3
      trace.error_y = dict(array=_numbers(bars), thickness=1.2, width=2)
      figure.add_trace(trace)
      shown += [(steps, loss + side * np.array(bars), bits) for side in (-1, 1)]
  return _with_ranges(
    Panel(
      'heldout',
      'Held-out loss',
      'On text that no run was trained on: an upper bound for masked '
      'diffusion, exact for autoregression. Bars are one standard error.',
      figure,
      choices if len(choices) > 1 else [],
    ),
    shown,
  )


def _training(runs):
  figure, shown = _figure(), []
  for i, run in enumerate(runs):
    steps, loss = history.series(run, 'train/loss_nats_per_token')
    bits = history.bits_per_nat(run)
    shown += _noisy(figure, run, i, steps, loss, np.mean, None, bits)
  return _with_ranges(
    Panel(
      'training',
      'Training loss',
      'Faint: the mean of each row of metrics, noisy since tokens weigh 1/t. '
      'Bold: smoothed over neighbouring rows.',
      figure,
    ),
    shown,
  )


def _newest_by_ratio(runs):
  """Held-out loss against the mask ratio."""
  figure, choices = _figure(), []
  for i, run in enumerate(runs):
    if run.causal:
      continue
    for dataset in history.datasets(run):
      step, found = history.by_ratio(run, history.prefix(dataset))
      if not found:
        continue
      name = dataset or 'all'
      choices += [name] if name not in choices else []
      ratios, losses = zip(*found, strict=True)
      trace = _line(run, i, ratios, losses, name, mode='lines+markers')
      trace.meta.pop('tokens')
      trace.hovertemplate = (
        f'%{{y:.3f}} nats, step {step:,.0f}<extra>{_name(run)}</extra>'
      )
      figure.add_trace(trace)
  figure.update_xaxes(title='mask ratio', range=[0, 1], dtick=0.2)
  figure.update_yaxes(title='nats/masked token')
  return Panel(
    'by_ratio',
    'Held-out loss by mask ratio',
    'Of the masked tokens, by the share that was masked, at the newest '
    'evaluation.' + _without_causal(runs),
    figure,
    choices if len(choices) > 1 else [],
    over_time=False,
  )


def _training_by_ratio(runs):
  """Training loss of each bucket of the mask ratio over time."""
  figure, shown, choices = _figure(), [], []
  buckets = {
    i: history.by_ratio(run, 'train')[1]
    for i, run in enumerate(runs)
    if not run.causal
  }
  alone = sum(map(bool, buckets.values())) == 1
  for i, found in buckets.items():
    for bucket, (ratio, _) in enumerate(found):
      key = f'train{history.RATIO}{ratio}'
      steps, loss = history.thin(*history.series(runs[i], key), np.mean)
      loss = history.smooth(loss, half_window(steps))
      name = f'{ratio:g}'
      choices += [name] if name not in choices else []
      trace = _line(runs[i], i, steps, loss, None if alone else name)
      if alone:
        trace.line = dict(color=SHADES[bucket % len(SHADES)], width=2)
        trace.name, trace.showlegend = f'ratio {name}', True
      figure.add_trace(trace)
      shown += [(steps, loss, None)]
  return _with_ranges(
    Panel(
      'training_by_ratio',
      'Training loss by mask ratio',
      'Of the masked tokens, by the share that was masked; smoothed.'
      + _without_causal(runs),
      figure,
      [] if alone else sorted(choices),
    ),
    shown,
    title='nats/masked token',
  )


def _without_causal(runs):
  some = any(run.causal for run in runs)
  return ' Autoregressive runs have no mask ratio.' if some else ''


def _plain(
  runs, id, title, note, key, how=None, scale=1, smooth=False, trim=False
):
  """A metric against time, from 0 on; of how high its highest rows are, the
  axis takes no notice if it is to `trim` them."""
  figure, shown = _figure(), []
  how = how or (lambda values: values[-1])
  for i, run in enumerate(runs):
    steps, values = history.series(run, key)
    values = values * scale
    if smooth:
      shown += _noisy(figure, run, i, steps, values, how)
    elif len(steps):
      steps, values = history.thin(steps, values, how)
      figure.add_trace(_line(run, i, steps, values))
      shown += (
        _without_outliers(steps, values, None)
        if trim
        else [(steps, values, None)]
      )
  return _with_ranges(Panel(id, title, note, figure), shown, 0)


def _step_time(runs):
  """Seconds per step as measured, and as planned."""
  panel = _plain(
    runs,
    'step_s',
    'Step time, s',
    'Seconds per step, mean of each row.',
    'train/step_s',
    how=np.mean,
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
    trace = _line(run, i, ends, [step_s, step_s])
    trace.line.dash, trace.line.width = 'dot', 2
    trace.hovertemplate = f'%{{y:.4g}} planned<extra>{_name(run)}</extra>'
    panel.figure.add_trace(trace)
    high = max(high, 1.1 * step_s)
  return panel._replace(
    note=f'{panel.note} Dotted: as the plan has it.', range=[0, high]
  )


def _skipped(runs):
  """Updates skipped so far."""
  figure, shown = _figure(), []
  for i, run in enumerate(runs):
    steps, values = history.series(run, 'train/skipped_updates')
    if values.any():
      total = np.cumsum(values)
      steps, total = history.thin(steps, total, lambda v: v[-1])
      trace = _line(run, i, steps, total)
      trace.line.shape = 'hv'
      figure.add_trace(trace)
      shown += [(steps, total, None)]
  return _with_ranges(
    Panel(
      'skipped',
      'Skipped updates',
      'How many so far: their loss or gradient was bad. Runs without any are '
      'not drawn.',
      figure,
    ),
    shown,
    0,
  )


def _goodput(runs):
  """Where the time went, a bar for each run."""
  figure = _figure()
  shown = [(i, run) for i, run in enumerate(runs) if run.goodput]
  shown = [(i, run) for i, run in shown if run.goodput['wall_s']]
  order = ['step', *(kind for kind in TIMES if kind != 'step')]
  for kind in order:
    seconds = [run.goodput['seconds'][kind] for _, run in shown]
    if any(seconds):
      share = [
        100 * s / run.goodput['wall_s']
        for s, (_, run) in zip(seconds, shown, strict=True)
      ]
      figure.add_trace(
        go.Bar(
          x=_numbers(share),
          y=list(range(len(shown))),
          customdata=[_duration(s) for s in seconds],
          orientation='h',
          name=kind,
          marker=dict(color=TIMES[kind]),
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
    ticktext=[_name(run, 14) for _, run in shown],
  )
  return Panel(
    'goodput',
    'Where the time went',
    'Share of the time since the first start. Goodput is that of step: steps '
    'whose result was used, over all restarts.',
    figure,
    over_time=False,
  )


# Traces


def colour(i):
  """Of run number i."""
  return COLOURS[i % len(COLOURS)]


def dash(i):
  """How the lines of run number i are drawn, in Plotly's words."""
  return DASHES[i // len(COLOURS) % len(DASHES)]


def _figure():
  return go.Figure(layout=dict(template='none', showlegend=False))


def _name(run, most=40):
  """Its name as Plotly, which reads some HTML, will show it."""
  name = run.name if len(run.name) <= most else run.name[: most - 1] + '…'
  return html.escape(name)


def _line(run, i, steps, values, choice=None, bits=None, mode='lines'):
  """A trace of run number i."""
  return go.Scatter(
    x=_numbers(steps),
    y=_numbers(values),
    mode=mode if len(steps) > 1 else 'markers',
    name=_name(run),
    line=dict(color=colour(i), dash=dash(i), width=2),
    marker=dict(size=6, color=colour(i)),
    hovertemplate=f'%{{y:.4~g}}<extra>{_name(run)}</extra>',
    meta={
      'run': i,
      'tokens': _numbers(history.tokens_at(run, steps), 9),
      'bits': bits,
      'choice': choice,
    },
  )


def _noisy(figure, run, i, steps, values, how, choice=None, bits=None):
  """Adds a faint trace and its smoothed one; returns what sets the range."""
  if not len(steps):
    return []
  steps, values = history.thin(steps, values, how)
  half = half_window(steps)
  if half:
    faint = _line(run, i, steps, values, choice, bits)
    faint.opacity, faint.line.width = 0.5, 1
    faint.hoverinfo, faint.hovertemplate = 'skip', None
    figure.add_trace(faint)
  bold = history.smooth(values, half)
  figure.add_trace(_line(run, i, steps, bold, choice, bits))
  return [(steps, bold, bits), *_without_outliers(steps, values, bits)]


def half_window(steps):
  """Neighbours on either side that values are smoothed over."""
  return math.ceil(SMOOTHING * len(steps)) if len(steps) >= 10 else 0


def _without_outliers(steps, values, bits):
  """A series without its highest 5% and lowest 5%, if it is long enough."""
  if len(values) < 10:
    return [(steps, values, bits)]
  low, high = np.quantile(values, [0.05, 0.95])
  keep = (values >= low) & (values <= high)
  return [(steps[keep], values[keep], bits)]


def _numbers(values, digits=6):
  """A list as short as it can be written."""
  return [float(f'{float(v):.{digits}g}') for v in values]


def _with_ranges(panel, shown, low=None, title=None):
  """Sets the y axis: by what comes after the first steps of each series.

  Args:
    panel: Panel.
    shown: list of (steps, values, factor from nats to bits or None).
    low: where the axis begins; None for by what is shown.
    title: of the axis.
  """
  if title:
    panel.figure.update_yaxes(title=title)
  nats, bits = [], []
  for steps, values, factor in shown:
    if not len(steps):
      continue
    later = steps >= EARLY * max(s[-1] for s, _, _ in shown if len(s))
    kept = values[later] if later.sum() >= 3 else values
    nats += [kept.min(), kept.max()]
    if factor:
      bits += [kept.min() * factor, kept.max() * factor]
  complete = len(bits) == len(nats) > 0
  return panel._replace(
    range=_range(nats, low),
    range_bits=_range(bits, low) if complete else None,
  )


def _range(values, low):
  if not values:
    return None
  least, most = min(values), max(values)
  if low is not None:
    return [low, 1.08 * most or 1.0]
  pad = 0.06 * (most - least) or 0.05 * abs(most) or 1.0
  return [least - pad, most + pad]


def _duration(seconds):
  if seconds < 120:
    return f'{seconds:.1f} s'
  if seconds < 7200:
    return f'{seconds / 60:.1f} min'
  return f'{seconds / 3600:.1f} h'
