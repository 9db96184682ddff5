"""Figures of the report: loss by mask ratio, for masked diffusion."""

import numpy as np

from maskdiff.monitoring import history, smoothing, traces
from maskdiff.monitoring.panel import (
  Panel,
  make_figure,
  not_drawn,
  of_metrics,
  with_ranges,
)
from maskdiff.monitoring.traces import Series


def heldout(runs):
  """Returns a panel of the held-out loss by mask ratio, newest evaluation."""
  figure, choices, counts = make_figure(), [], []
  for i, run in enumerate(runs):
    if run.causal:
      continue
    for dataset in history.datasets(run):
      step, found = history.by_ratio(run, history.prefix(dataset))
      finite = [(ratio, loss) for ratio, loss in found if loss is not None]
      counts.append((run, len(found) - len(finite), len(found)))
      if not finite:
        continue
      name = dataset or 'all'
      choices += [name] if name not in choices else []
      ratios, losses = zip(*finite, strict=True)
      trace = traces.line(run, i, ratios, losses, name, mode='lines+markers')
      trace.meta.pop('tokens')
      label = traces.run_name(run)
      trace.hovertemplate = (
        f'%{{y:.3f}} nats, step {step:,.0f}<extra>{label}</extra>'
      )
      figure.add_trace(trace)
  figure.update_xaxes(title='mask ratio', range=[0, 1], dtick=0.2)
  figure.update_yaxes(title='nats/masked token')
  return Panel(
    'by_ratio',
    'Held-out loss by mask ratio',
    'Loss of masked tokens by the share of tokens that was masked, at the '
    'newest evaluation.' + _causal_note(runs),
    figure,
    choices if len(choices) > 1 else [],
    over_time=False,
    not_drawn=not_drawn(counts),
  )


def training(runs):
  """Returns a panel of the training loss over time, by bucket of mask ratios.

  A single run shows all buckets. With several runs a menu selects the bucket.
  """
  figure, shown, choices = make_figure(), [], []
  buckets = {
    i: history.by_ratio(run, 'train')[1]
    for i, run in enumerate(runs)
    if not run.causal
  }
  single = sum(map(bool, buckets.values())) == 1
  for i, found in buckets.items():
    for bucket, (ratio, _) in enumerate(found):
      steps, loss = history.series(runs[i], _key(ratio))
      if not len(steps):
        continue
      steps, loss = smoothing.thin(steps, loss, np.mean)
      loss = smoothing.smooth(loss, smoothing.half_window(steps))
      name = f'{ratio:g}'
      choices += [name] if name not in choices else []
      trace = traces.line(runs[i], i, steps, loss, None if single else name)
      if single:
        trace.line = dict(
          color=traces.SHADES[bucket % len(traces.SHADES)], width=2
        )
        trace.name, trace.showlegend = f'ratio {name}', True
      figure.add_trace(trace)
      shown.append(Series(steps, loss))
  return with_ranges(
    Panel(
      'training_by_ratio',
      'Training loss by mask ratio',
      'Loss of masked tokens by the share of tokens that was masked; smoothed.'
      + _causal_note(runs),
      figure,
      [] if single else sorted(choices),
      not_drawn=of_metrics(
        [runs[i] for i in buckets],
        lambda run: [_key(x) for x, _ in history.by_ratio(run, 'train')[1]],
      ),
    ),
    shown,
    title='nats/masked token',
  )


def _key(ratio):
  return f'train{history.RATIO}{ratio}'


def _causal_note(runs):
  causal = any(run.causal for run in runs)
  return ' Autoregressive runs have no mask ratio.' if causal else ''
