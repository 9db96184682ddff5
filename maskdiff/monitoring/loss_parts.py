"""Figures of the report: loss by mask ratio, and by position in a window."""

import dataclasses
from collections.abc import Callable

import numpy as np

from maskdiff.monitoring import history, smoothing, traces
from maskdiff.monitoring.panel import (
  Panel,
  make_figure,
  not_drawn,
  with_ranges,
)
from maskdiff.monitoring.traces import Series


@dataclasses.dataclass(frozen=True)
class Parts:
  """Parts of the predicted tokens, whose losses are metrics of their own.

  Attributes:
    metric: names of metrics up to the number of a part; see history.by_part.
    id: id of the held-out panel.
    name: name of the number, such as 'mask ratio'.
    label: the same in a legend, such as 'ratio'.
    tokens: the tokens of a part, for the note of a panel.
    unit: unit of the loss.
    axis: settings of the axis of the number.
    is_drawn: (history.Run) -> whether to draw a run that has the metrics.
    missing: sentence about runs that are not drawn.
  """

  metric: str
  id: str
  name: str
  label: str
  tokens: str
  unit: str
  axis: dict
  is_drawn: Callable = lambda run: True
  missing: str = ''

  def note(self, runs):
    """Returns `missing` if a run is not drawn, else ''."""
    return '' if all(map(self.is_drawn, runs)) else f' {self.missing}'


MASK_RATIOS = Parts(
  metric=history.RATIO,
  id='by_ratio',
  name='mask ratio',
  label='ratio',
  tokens='masked tokens by the share of tokens that was masked',
  unit='nats/masked token',
  axis=dict(range=[0, 1], dtick=0.2),
  is_drawn=lambda run: not run.causal,
  missing='Autoregressive runs have no mask ratio.',
)
WINDOW_POSITIONS = Parts(
  metric=history.WINDOW_POSITION,
  id='by_window_position',
  name='position in a window',
  label='position',
  tokens='tokens by position in a window; 1 is the first that it predicts',
  unit='nats/token',
  axis=dict(rangemode='tozero'),
)


def heldout(parts, runs):
  """Returns a panel of the held-out loss of each part, newest evaluation.

  Args:
    parts: Parts.
    runs: list of history.Run.
  """
  figure, choices, counts = make_figure(), [], []
  for i, run in enumerate(runs):
    if not parts.is_drawn(run):
      continue
    for dataset in history.datasets(run):
      step, found = history.by_part(run, history.prefix(dataset), parts.metric)
      finite = [(number, loss) for number, loss in found if loss is not None]
      counts.append((run, len(found) - len(finite), len(found)))
      if not finite:
        continue
      name = dataset or 'all'
      choices += [name] if name not in choices else []
      numbers, losses = zip(*finite, strict=True)
      trace = traces.line(run, i, numbers, losses, name, mode='lines+markers')
      trace.meta.pop('tokens')
      label = traces.run_name(run)
      trace.hovertemplate = (
        f'%{{y:.3f}} nats, step {step:,.0f}<extra>{label}</extra>'
      )
      figure.add_trace(trace)
  figure.update_xaxes(title=parts.name, **parts.axis)
  figure.update_yaxes(title=parts.unit)
  return Panel(
    parts.id,
    f'Held-out loss by {parts.name}',
    f'Loss of {parts.tokens}. At the newest evaluation.' + parts.note(runs),
    figure,
    choices if len(choices) > 1 else [],
    over_time=False,
    not_drawn=not_drawn(counts),
  )


def training(parts, runs):
  """Returns a panel of the training loss of each part over time.

  A single run shows all parts. With several runs a menu selects the part.
  Arguments as for `heldout`.
  """
  figure, shown, choices, counts = make_figure(), [], [], []
  key = lambda number: f'train{parts.metric}{number:g}'
  found = {
    i: [number for number, _ in history.by_part(run, 'train', parts.metric)[1]]
    for i, run in enumerate(runs)
    if parts.is_drawn(run)
  }
  single = sum(map(bool, found.values())) == 1
  for i, numbers in found.items():
    keys = [key(number) for number in numbers]
    counts.append((runs[i], *history.not_finite(runs[i], keys)))
    per_shade = -(-len(numbers) // len(traces.SHADES))
    for index, number in enumerate(numbers):
      steps, loss = history.series(runs[i], key(number))
      if not len(steps):
        continue
      steps, loss = smoothing.thin(steps, loss, np.mean)
      loss = smoothing.smooth(loss, smoothing.half_window(steps))
      choices += [number] if number not in choices else []
      choice = None if single else f'{number:g}'
      trace = traces.line(runs[i], i, steps, loss, choice)
      if single:
        shade, repeat = divmod(index, per_shade)
        trace.line = dict(
          color=traces.SHADES[shade], dash=traces.DASHES[repeat % 4], width=2
        )
        trace.name, trace.showlegend = f'{parts.label} {number:g}', True
      figure.add_trace(trace)
      shown.append(Series(steps, loss))
  return with_ranges(
    Panel(
      f'training_{parts.id}',
      f'Training loss by {parts.name}',
      f'Loss of {parts.tokens}. Smoothed.' + parts.note(runs),
      figure,
      [] if single else [f'{number:g}' for number in sorted(choices)],
      not_drawn=not_drawn(counts),
    ),
    shown,
    title=parts.unit,
  )
