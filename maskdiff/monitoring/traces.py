"""Makes Plotly traces of runs, and computes the range of the y axis.

The `meta` of a trace holds values that report.html needs for its menus:
`run`, the index of the run; `tokens`, the other x axis; `bits`, a factor from
nats per token to bits per byte, or None; `choice`, the entry of the panel's
menu to which the trace belongs, or None.
"""

import html
from typing import NamedTuple

import plotly.graph_objects as go

from maskdiff.monitoring import history, smoothing

# Distinguishable with colour blindness, on white and on black.
COLOURS = (
  *('#3b82c4', '#e07b28', '#2f9e68', '#b05fb5'),
  *('#d64f5a', '#8a8f2a', '#2a9fb0', '#9a7257'),
)
DASHES = ('solid', 'dash', 'dot', 'dashdot')  # one per round of COLOURS
# Mask ratios or positions in a window, from low to high.
SHADES = ('#f2b134', '#e8743b', '#c9466b', '#8b4a9c', '#4a5aa8')
# Kinds of time in the ledger.
TIMES = {
  'init': '#8fa3b5',
  'restore': '#6f8fc9',
  'compile': '#b58fd1',
  'data': '#e0a94f',
  'rollout': '#7cb342',
  'step': '#2f9e68',
  'eval': '#3aa7b5',
  'save': '#9a7257',
  'other': '#c9ced3',
  'repeated': '#d64f5a',
  'down': '#5b6169',
}


class Series(NamedTuple):
  """Points that determine the range of the y axis.

  Attributes:
    steps, values: arrays of the same length.
    bits: factor from nats per token to bits per byte; None if unknown.
  """

  steps: object
  values: object
  bits: float | None = None


def colour(i):
  """Returns the colour of run number i."""
  return COLOURS[i % len(COLOURS)]


def dash(i):
  """Returns the Plotly dash style of run number i."""
  return DASHES[i // len(COLOURS) % len(DASHES)]


def short_name(run, max_length=40):
  """Returns a run's name, shortened."""
  if len(run.name) > max_length:
    return run.name[: max_length - 1] + '…'
  return run.name


def run_name(run, max_length=40):
  """Returns a run's name, shortened and escaped, since Plotly reads HTML."""
  return html.escape(short_name(run, max_length))


def line(run, i, steps, values, choice=None, bits=None, mode='lines'):
  """Returns a trace of run number i; the module docstring explains `meta`."""
  return go.Scatter(
    x=numbers(steps),
    y=numbers(values),
    mode=mode if len(steps) > 1 else 'markers',
    name=run_name(run),
    line=dict(color=colour(i), dash=dash(i), width=2),
    marker=dict(size=6, color=colour(i)),
    hovertemplate=f'%{{y:.4~g}}<extra>{run_name(run)}</extra>',
    meta={
      'run': i,
      'tokens': numbers(history.tokens_at(run, steps), 9),
      'bits': bits,
      'choice': choice,
    },
  )


def add_noisy_line(figure, run, i, steps, values, reduce, bits=None):
  """Adds a faint trace of the values and a bold one of their moving average.

  Args:
    figure: plotly Figure.
    run, i: the run and its number.
    steps, values: arrays of the same length.
    reduce: see `smoothing.thin`.
    bits: factor from nats per token to bits per byte, or None.

  Returns:
    List of Series for `axis_ranges`.
  """
  if not len(steps):
    return []
  steps, values = smoothing.thin(steps, values, reduce)
  half = smoothing.half_window(steps)
  if half:
    faint = line(run, i, steps, values, bits=bits)
    faint.opacity, faint.line.width = 0.5, 1
    faint.hoverinfo, faint.hovertemplate = 'skip', None
    figure.add_trace(faint)
  bold = smoothing.smooth(values, half)
  figure.add_trace(line(run, i, steps, bold, bits=bits))
  return [
    Series(steps, bold, bits),
    Series(*smoothing.without_outliers(steps, values), bits),
  ]


def numbers(values, digits=6):
  """Returns floats rounded to significant digits, to keep the JSON short."""
  return [float(f'{float(v):.{digits}g}') for v in values]


def axis_ranges(series, low=None):
  """Returns ranges of the y axis that show all series except the first steps.

  Args:
    series: list of Series.
    low: lower end of the axis; None to fit the values.

  Returns:
    [low, high] in the unit of the values, and in bits per byte. Both are None
    without values. The second is also None if a series has no factor.
  """
  series = [s for s in series if len(s.steps)]
  last_step = max((s.steps[-1] for s in series), default=0)
  nats, bits = [], []
  for steps, values, factor in series:
    later = smoothing.after_first_steps(steps, last_step)
    visible = values[later] if later.sum() >= 3 else values
    nats += [visible.min(), visible.max()]
    if factor:
      bits += [visible.min() * factor, visible.max() * factor]
  complete = len(bits) == len(nats) > 0
  return _padded(nats, low), _padded(bits, low) if complete else None


def _padded(values, low):
  if not values:
    return None
  smallest, largest = min(values), max(values)
  if low is not None:
    # A metric from a file may be negative where none is expected.
    return [min(low, smallest), 1.08 * largest or 1.0]
  pad = 0.06 * (largest - smallest) or 0.05 * abs(largest) or 1.0
  return [smallest - pad, largest + pad]
