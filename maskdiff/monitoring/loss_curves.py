"""Figures of the report: held-out loss and training loss."""

import numpy as np

from maskdiff.monitoring import history, traces
from maskdiff.monitoring.panel import (
  Panel,
  make_figure,
  of_metrics,
  with_ranges,
)
from maskdiff.monitoring.traces import Series


def heldout(runs):
  """Returns a panel of the held-out bound of each dataset, with error bars.

  A run with a moving average of its weights has a second, dotted curve.
  """
  figure, shown, choices, averaged = make_figure(), [], [], False
  for i, run in enumerate(runs):
    for dataset in history.datasets(run):
      for weights in ('', history.EMA):
        trace, series = _heldout_line(run, i, dataset, weights)
        if trace is None:
          continue
        name = trace.meta['choice']
        choices += [name] if name not in choices else []
        averaged |= bool(weights)
        figure.add_trace(trace)
        shown += series
  return with_ranges(
    Panel(
      'heldout',
      'Held-out loss',
      'On text not trained on: an upper bound for masked diffusion, exact '
      'for autoregression. Bars are one standard error.'
      + ' Dotted: the moving average of the weights.'
      * averaged,
      figure,
      choices if len(choices) > 1 else [],
      not_drawn=of_metrics(runs, _heldout_keys),
    ),
    shown,
  )


def _heldout_line(run, i, dataset, weights):
  """Returns the trace of a held-out bound, or None, and a list of Series.

  Args:
    run, i: the run and its number.
    dataset: one of `history.datasets`.
    weights: '', or history.EMA for the moving average of the weights.
  """
  p = f'{history.prefix(dataset)}/{weights}'
  steps, loss = history.series(run, f'{p}loss_nats_per_token')
  if not len(steps):
    return None, []
  stderr = dict(
    zip(*history.series(run, f'{p}stderr_nats_per_token'), strict=True)
  )
  bars = np.array([stderr.get(step, 0.0) for step in steps])
  bits = history.bits_per_nat(run, dataset)
  trace = traces.line(
    run, i, steps, loss, dataset or 'all', bits, mode='lines+markers'
  )
  trace.marker.size = 6 if len(steps) < 60 else 3
  trace.error_y = dict(array=traces.numbers(bars), thickness=1.2, width=2)
  if weights:
    trace.line.dash, trace.marker.symbol = 'dot', 'circle-open'
    label = f'{traces.run_name(run)}, moving average'
    trace.hovertemplate = f'%{{y:.4~g}}<extra>{label}</extra>'
  return trace, [Series(steps, loss + side * bars, bits) for side in (-1, 1)]


def _heldout_keys(run):
  return [
    f'{history.prefix(dataset)}/{weights}loss_nats_per_token'
    for dataset in history.datasets(run)
    for weights in ('', history.EMA)
  ]


def training(runs):
  """Returns a panel of the training loss, as logged and smoothed."""
  figure, shown = make_figure(), []
  for i, run in enumerate(runs):
    steps, loss = history.series(run, history.BOUND)
    bits = history.bits_per_nat(run)
    shown += traces.add_noisy_line(figure, run, i, steps, loss, np.mean, bits)
  return with_ranges(
    Panel(
      'training',
      'Training loss',
      'Faint: mean of each row of metrics, which is noisy because tokens have '
      'weight 1/t. Bold: smoothed over neighbouring rows.',
      figure,
      not_drawn=of_metrics(runs, lambda _: [history.BOUND]),
    ),
    shown,
  )
