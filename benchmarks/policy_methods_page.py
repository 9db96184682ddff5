"""Makes the tables and the plot of docs/policy_methods.md from raw lines.

python benchmarks/policy_methods_page.py

The lines are those of policy_methods.py, in
benchmarks/results/policy_methods.jsonl. Needs matplotlib, which is in
requirements-test.txt.
"""

import pathlib
import statistics

import json_lines
import page_parts
from policy_methods import (
  ANSWERS,
  METHODS,
  TASKS,
  best_rate,
  budgets,
  forwards_per_round,
  select,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
RAW = ROOT / 'benchmarks/results/policy_methods.jsonl'
PAGE = ROOT / 'docs/policy_methods.md'


def at(curve, rounds):
  """Returns the share of right answers after some rounds, interpolated."""
  for (r0, y0), (r1, y1) in zip(curve, curve[1:], strict=False):
    if r0 <= rounds <= r1:
      return y0 + (y1 - y0) * (rounds - r0) / (r1 - r0)
  raise ValueError(f'{rounds} rounds are not in {curve}')


def trainings(lines, task, method):
  return select(lines, kind='training', task=task, method=method)


def points(values):
  """Returns mean and standard error of shares, as percentage points."""
  error = statistics.stdev(values) / len(values) ** 0.5
  return f'{100 * statistics.mean(values):+.1f} ± {100 * error:.1f}'


def results(lines, task):
  """Returns the table of right answers at equal budgets, best first."""
  heads = ['method', 'equal forwards', 'gain', 'equal seconds', 'gain']
  found = []
  for method in METHODS:
    curves = [x['correct'] for x in trainings(lines, task, method)]
    cells, means, by_seed = [f'`{method}`'], [], []
    ends = budgets(lines, task, method)
    for end in ends:
      shares = [at(curve, end) for curve in curves]
      gains = [y - curve[0][1] for y, curve in zip(shares, curves, strict=True)]
      means.append(statistics.mean(shares))
      cells += [f'{means[-1]:.1%}', points(gains)]
      by_seed.append(', '.join(f'{y:.1%}' for y in shares))
    rounds = ', '.join(f'{end:.0f}' for end in ends)
    found.append((-sum(means), [*cells, *by_seed, rounds]))
  heads += ['by seed: forwards', 'by seed: seconds', 'rounds']
  return page_parts.table([heads, *(cells for _, cells in sorted(found))])


def long(lines, task):
  """Returns the table of the longer trainings."""
  found = select(lines, kind='long', task=task)
  rows = [
    [
      'seed',
      'start',
      *(f'after {rounds} rounds' for rounds, _ in found[0]['correct'][1:]),
    ]
  ]
  for line in found:
    shares = [f'{share:.1%}' for _, share in line['correct']]
    rows.append([str(line['seed']), *shares])
  by_evaluation = zip(*(line['correct'] for line in found), strict=True)
  means = [statistics.mean(y for _, y in points) for points in by_evaluation]
  rows.append(['mean', *(f'{mean:.1%}' for mean in means)])
  return page_parts.table(rows)


def costs(lines, task):
  """Returns the table of the costs of a round, and of learning rates."""
  rows = [
    [
      'method',
      'copies',
      'forwards per answer and round',
      'seconds per round',
      'share of rollouts',
      'learning rate',
      'constant groups',
      'nats per token',
    ]
  ]
  t = TASKS[task]
  for method, traits in METHODS.items():
    (timed,) = select(lines, kind='seconds', task=task, method=method)
    of = trainings(lines, task, method)
    total = timed['rollout_s'] + timed['step_s']
    rows.append(
      [
        f'`{method}`',
        str(traits.copies(t)),
        str(forwards_per_round(t, traits) // ANSWERS),
        f'{total:.2f}',
        f'{timed["rollout_s"] / total:.0%}',
        f'{best_rate(lines, task, method):g}',
        f'{statistics.mean(x["constant_groups"] for x in of):.0%}',
        f'{statistics.mean(x["sampled_nats_per_token"] for x in of):.2f}',
      ]
    )
  return page_parts.table(rows)


def filled(text, lines):
  """Replaces the tables of a page between comments of this script."""

  def part(name):
    kind, _, task = name.partition('_')
    return {'results': results, 'costs': costs, 'long': long}[kind](lines, task)

  return page_parts.fill(text, 'policy_methods_page', part)


def plot(lines, out):
  """Draws right answers by forward passes and by seconds."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout='constrained')
  colors = plt.get_cmap('tab10').colors
  for row, (task, t) in zip(panels, TASKS.items(), strict=True):
    for method, color in zip(METHODS, colors, strict=False):
      of = trainings(lines, task, method)
      rounds = [r for r, _ in of[0]['correct']]
      shares = [
        statistics.mean(x['correct'][i][1] for x in of)
        for i in range(len(rounds))
      ]
      ends = budgets(lines, task, method)
      for axes, end, budget in zip(
        row, ends, (t.forwards, t.seconds), strict=True
      ):
        xs = [budget * r / end for r in rounds]
        axes.plot(xs, shares, color=color, label=method)
    row[0].set_ylabel(f'{task}: right answers')
    for axes, budget, label in zip(
      row,
      (t.forwards, t.seconds),
      ('forward passes of a row', 'seconds of one core'),
      strict=True,
    ):
      axes.set_xlim(0, budget)
      axes.set_xlabel(label)
      axes.spines[['top', 'right']].set_visible(False)
  panels[0][0].legend(frameon=False, fontsize=7, ncols=2)
  figure.savefig(out, dpi=120)


def main():
  lines = json_lines.read(RAW)
  PAGE.write_text(filled(PAGE.read_text(), lines))
  plot(lines, PAGE.with_suffix('.png'))


if __name__ == '__main__':
  main()
