"""HTML report about runs, complete or still training, in a single file.

`curves.py` makes the figures. The page contains Plotly's JavaScript, and
`report.html` is the template that draws figures, tables and samples.
"""

import importlib.resources
import json
import math
import time

import numpy as np
from plotly.offline import get_plotlyjs

from maskdiff.monitoring import curves, history, skipped, smoothing, traces
from maskdiff.monitoring.json_lines import finite
from maskdiff.monitoring.run_files import num_parameters


def page(runs, now=None):
  """Returns the report about some runs as HTML.

  Args:
    runs: list of history.Run.
    now: time shown on the page, s since 1970; None for the current time.

  Returns:
    HTML that loads nothing from the network.
  """
  now = time.time() if now is None else now
  data = {
    'written': time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(now)),
    'runs': [_facts(run, i) for i, run in enumerate(runs)],
    'panels': [_panel_json(panel) for panel in curves.panels(runs)],
    'differences': history.differences(runs),
    'samples': _samples(runs),
    'plans': [_plan_row(i, run) for i, run in enumerate(runs) if run.plan],
    **_defaults(runs),
  }
  # ASCII is safe under any encoding. Without '<' no text can close the script
  # element that holds the JSON.
  encoded = json.dumps(
    _strict(data), ensure_ascii=True, separators=(',', ':'), allow_nan=False
  )
  encoded = encoded.replace('<', '\\u003c')
  template = importlib.resources.files('maskdiff.monitoring').joinpath(
    'report.html'
  )
  head, middle, tail = _split(template.read_text('utf-8'))
  return head + get_plotlyjs() + middle + encoded + tail


def _strict(value):
  """Returns a JSON value with None for numbers that strict JSON does not have.

  One NaN would keep the browser from reading the whole page.
  """
  if isinstance(value, dict):
    return {key: _strict(x) for key, x in value.items()}
  if isinstance(value, (list, tuple)):
    return [_strict(x) for x in value]
  return (
    None if isinstance(value, float) and not math.isfinite(value) else value
  )


def _split(template):
  """Returns the parts of the template before, between and after its marks."""
  head, rest = template.split('@PLOTLY@')
  return head, *rest.split('@REPORT@')


def _defaults(runs):
  """Returns the initial axes of the page.

  The x axis shows tokens if the runs take different numbers of tokens per
  step. Losses are in bits per byte if the runs have different tokenizers.
  """
  at = [float(history.tokens_at(run, [1000])[0]) for run in runs]
  factors = [history.bits_per_nat(run) for run in runs]
  known = [f for f in factors if f]
  has_bits = len(known) == len(runs)
  same = not known or max(known) < 1.001 * min(known)
  return {
    'tokens': max(at) > 1.001 * min(at),
    'bits': not same and has_bits,
    'has_bits': has_bits,
  }


def _panel_json(panel):
  plain = panel.figure.to_plotly_json()
  return {
    **panel._asdict(),
    'choices': list(panel.choices),
    'figure': {
      'data': plain['data'],
      'layout': {k: v for k, v in plain['layout'].items() if k != 'template'},
    },
  }


def _facts(run, i):
  """Returns the card of run number i: name, colour, (label, value) pairs."""
  c, last = run.config, run.last_step
  steps = c.get('train.steps')
  pairs = [
    ('step', f'{last:,} of {steps:,} ({last / steps:.0%})')
    if steps
    else ('step', f'{last:,}'),
    ('tokens', _si(history.tokens_at(run, [last])[0])),
  ]
  if parameters := num_parameters(run.header):
    pairs.append(('parameters', _si(parameters)))
  pairs += _losses(run)
  for name, key, form in (
    ('tokens/s', 'train/tokens_per_s', lambda x: f'{x:,.0f}'),
    ('MFU', 'train/mfu', lambda x: f'{x:.1%}'),
  ):
    value = _median(run, key)
    if value is not None:
      pairs.append((name, form(value)))
  if run.goodput and run.goodput['goodput'] is not None:
    pairs.append(('goodput', f'{run.goodput["goodput"]:.1%}'))
    pairs.append(('restarts', f'{run.goodput["restarts"]}'))
  _, num_skipped = history.series(run, 'train/skipped_updates')
  if len(num_skipped):
    pairs.append(('skipped updates', f'{int(num_skipped.sum()):,}'))
  return {
    'name': run.name,
    'workdir': run.workdir,
    'colour': traces.colour(i),
    'dash': traces.dash(i),
    'objective': c.get('objective.name', '').replace('_', ' '),
    'facts': pairs,
    'header': run.header,
    'skipped': [
      skipped.describe(update)
      for update in filter(skipped.is_update, run.skipped[-20:])
    ],
    'warnings': list(run.warnings),
  }


def _losses(run):
  """Returns (label, value) pairs of the newest held-out and training loss."""
  pairs = []
  newest = history.newest(run, 'eval/loss_nats_per_token')
  for weights, label in (('', 'held-out'), (history.EMA, 'held-out, average')):
    row = history.newest(run, f'eval/{weights}loss_nats_per_token')
    # An average that was turned off has only older rows.
    if not row or row is not newest:
      continue
    loss = finite(row[f'eval/{weights}loss_nats_per_token'])
    stderr = finite(row.get(f'eval/{weights}stderr_nats_per_token'))
    for unit, factor in (
      ('nats/token', 1.0),
      ('bits/byte', history.bits_per_nat(run)),
    ):
      if factor and loss is not None:
        text = f'{loss * factor:.3f}'
        text += f' ± {stderr * factor:.3f}' if stderr is not None else ''
        pairs.append((f'{label}, {unit}', text))
    if loss is None:
      pairs.append((f'{label}, nats/token', 'not finite'))
  for key, label in (
    (history.BOUND, 'training'),
    (history.OTHER_LOSS, 'training objective'),
  ):
    row = history.newest(run, key)
    if row:
      _, losses = history.series(run, key)
      text = 'not finite'
      if finite(row[key]) is not None:
        text = f'{losses[-smoothing.half_window(losses) - 1 :].mean():.3f}'
      pairs.append((f'{label}, nats/token', text))
  return pairs


def _median(run, key):
  """Returns the median of a metric after the slower first steps, or None."""
  steps, values = history.series(run, key)
  if not len(values):
    return None
  later = smoothing.after_first_steps(steps, steps[-1])
  return float(np.median(values[later]))


def _plan_row(i, run):
  """Returns plan and measurement of run number i, as texts for the page."""
  plan, c, rows = run.plan, run.config, []
  for name, field, key, form in (
    ('step, s', 'step_s', 'train/step_s', '.4g'),
    ('tokens/s', 'tokens_per_s', 'train/tokens_per_s', ',.0f'),
    ('MFU', 'mfu', 'train/mfu', '.1%'),
  ):
    planned, measured = plan.get(field), _median(run, key)
    show = lambda value, form=form: '' if value is None else format(value, form)
    both = planned and measured is not None
    ratio = f'{measured / planned:.2f}' if both else ''
    rows.append((name, show(planned), show(measured), ratio))
  warnings = [
    f'the plan is for {field} {plan[field]:,}, the run has {c[key]:,}'
    for field, key in (('batch', 'train.batch'), ('length', 'data.length'))
    if key in c and plan.get(field) != c[key]
  ]
  if plan.get('step_s') is None:
    warnings.append(f'the plan has no time: it {plan["status"]}')
  slices = plan['num_slices']
  machines = f'{slices} x ' * (slices > 1) + f'{plan["topology"]}'
  return {
    'run': i,
    'about': f'{machines}, {plan["chips"]} chips',
    'rows': rows,
    'warnings': warnings,
  }


def _samples(runs):
  """Returns for each prompt number the prompts and samples of all runs."""
  found = [history.samples(run) for run in runs]
  numbers = sorted({n for texts in found for n in texts})
  prompts = [
    [x if isinstance(x, str) else '' for x in c.get('sample.prompts', [])]
    for c in (run.config for run in runs)
  ]
  return [
    {
      'number': number,
      'prompts': [p[number] if number < len(p) else '' for p in prompts],
      'texts': [texts.get(number, []) for texts in found],
    }
    for number in numbers
  ]


def _si(number):
  """Formats a number with three digits and an SI letter, such as 2.56M."""
  for size, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if number >= size:
      return f'{number / size:.3g}{letter}'
  return f'{number:g}'
