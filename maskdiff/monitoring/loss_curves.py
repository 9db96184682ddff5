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
      not_drawn=of_metrics(runs, _heldout_keys),
    ),
    shown,
  )


def _heldout_keys(run):
  return [
    f'{history.prefix(dataset)}/loss_nats_per_token'
    for dataset in history.datasets(run)
  ]


def training(runs):
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
      not_drawn=of_metrics(runs, lambda _: ['train/loss_nats_per_token']),
    ),
    shown,
  )
