"""A page about runs, finished or not: one file that needs no other.

`curves.py` makes the figures, Plotly's JavaScript stands in the page, and
`report.html` puts both together with what is told in words.
"""

import importlib.resources
import json
import time

import numpy as np
from plotly.offline import get_plotlyjs

from maskdiff.monitoring import curves, history, skipped


def page(runs, now=None):
  """The runs as a page.

  Args:
    runs: list of history.Run.
    now: time it is written at, s since 1970; None for the clock's.

  Returns:
    HTML that fetches nothing from elsewhere.
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
  # In ASCII no letter of a text can be misread; and without < none of it can
  # end the script that it stands in.
  encoded = json.dumps(data, ensure_ascii=True, separators=(',', ':'))
  encoded = encoded.replace('<', '\\u003c')
  template = importlib.resources.files('maskdiff.monitoring').joinpath(
    'report.html'
  )
  head, middle, tail = _split(template.read_text('utf-8'))
  return head + get_plotlyjs() + middle + encoded + tail


def _split(template):
  head, rest = template.split('@PLOTLY@')
  return head, *rest.split('@REPORT@')


def _defaults(runs):
  """What the page opens with: tokens where steps differ, and bits per byte
  where tokens do."""
  at = [float(history.tokens_at(run, [1000])[0]) for run in runs]
  factors = [history.bits_per_nat(run) for run in runs]
  known = [f for f in factors if f]
  same = not known or max(known) < 1.001 * min(known)
  return {
    'tokens': max(at) > 1.001 * min(at),
    'bits': not same and len(known) == len(runs),
    'has_bits': len(known) == len(runs),
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
  """What is told of a run at the top: name, colour, and pairs of texts."""
  c, last = run.config, run.last_step
  steps = c.get('train.steps')
  pairs = [
    ('step', f'{last:,} of {steps:,} ({last / steps:.0%})')
    if steps
    else ('step', f'{last:,}'),
    ('tokens', _si(history.tokens_at(run, [last])[0])),
  ]
  if parameters := _parameters(run.header):
    pairs.append(('parameters', _si(parameters)))
  bits = history.bits_per_nat(run)
  _, heldout = history.series(run, 'eval/loss_nats_per_token')
  _, error = history.series(run, 'eval/stderr_nats_per_token')
  if len(heldout):
    text = f'{heldout[-1]:.3f}'
    text += f' ± {error[-1]:.3f}' if len(error) else ''
    pairs.append(('held-out, nats/token', text))
    if bits:
      text = f'{heldout[-1] * bits:.3f}'
      text += f' ± {error[-1] * bits:.3f}' if len(error) else ''
      pairs.append(('held-out, bits/byte', text))
  _, loss = history.series(run, 'train/loss_nats_per_token')
  if len(loss):
    smoothed = history.smooth(loss, curves.half_window(loss))[-1]
    pairs.append(('training, nats/token', f'{smoothed:.3f}'))
  for name, key, form in (
    ('tokens/s', 'train/tokens_per_s', lambda x: f'{x:,.0f}'),
    ('MFU', 'train/mfu', lambda x: f'{x:.1%}'),
  ):
    value = _usual(run, key)
    if value is not None:
      pairs.append((name, form(value)))
  if run.goodput and run.goodput['goodput'] is not None:
    pairs.append(('goodput', f'{run.goodput["goodput"]:.1%}'))
    pairs.append(('restarts', f'{run.goodput["restarts"]}'))
  _, missed = history.series(run, 'train/skipped_updates')
  if len(missed):
    pairs.append(('skipped updates', f'{int(missed.sum()):,}'))
  return {
    'name': run.name,
    'workdir': run.workdir,
    'colour': curves.colour(i),
    'dash': curves.dash(i),
    'objective': c.get('objective.name', '').replace('_', ' '),
    'facts': pairs,
    'header': run.header,
    'skipped': [skipped.describe(update) for update in run.skipped[-20:]],
  }


def _parameters(header):
  """The number in the line `total` of a header; None without one."""
  for line in header.splitlines():
    words = line.split()
    if len(words) == 2 and words[0] == 'total':
      return int(words[1].replace(',', ''))
  return None


def _usual(run, key):
  """The median after the first steps, which wait for caches to fill."""
  steps, values = history.series(run, key)
  if not len(values):
    return None
  later = steps >= curves.EARLY * steps[-1]
  return float(np.median(values[later]))


def _plan_row(i, run):
  """What was planned beside what was measured: triples of texts."""
  plan, c, rows = run.plan, run.config, []
  for name, field, key, form in (
    ('step, s', 'step_s', 'train/step_s', '.4g'),
    ('tokens/s', 'tokens_per_s', 'train/tokens_per_s', ',.0f'),
    ('MFU', 'mfu', 'train/mfu', '.1%'),
  ):
    planned, measured = plan.get(field), _usual(run, key)
    say = lambda value, form=form: '' if value is None else format(value, form)
    both = planned and measured is not None
    ratio = f'{measured / planned:.2f}' if both else ''
    rows.append((name, say(planned), say(measured), ratio))
  warnings = [
    f'the plan is for {field} {plan[field]:,}, the run has {c[key]:,}'
    for field, key in (('batch', 'train.batch'), ('length', 'data.length'))
    if key in c and plan.get(field) != c[key]
  ]
  if plan['step_s'] is None:
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
  """The prompts, and for each the texts of every run: [[step, text], ...]."""
  found = [history.samples(run) for run in runs]
  numbers = sorted({n for texts in found for n in texts})
  prompts = [run.config.get('sample.prompts', []) for run in runs]
  return [
    {
      'number': number,
      'prompts': [p[number] if number < len(p) else '' for p in prompts],
      'texts': [texts.get(number, []) for texts in found],
    }
    for number in numbers
  ]


def _si(number):
  """A number in three digits, such as 2.56M."""
  for size, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if number >= size:
      return f'{number / size:.3g}{letter}'
  return f'{number:g}'
