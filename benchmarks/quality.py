r"""Plots puzzle accuracy over forward passes, by remasking rule.

python benchmarks/quality.py sudoku=runs/sudoku countdown=runs/countdown \
  --out docs/quality_vs_forwards.png

Each rule of remasking.py and each kind of confidence answers the same puzzles
with several numbers of steps, thresholds or factors. Prints the accuracy of
each setting. For each rule it also prints the fewest forward passes per token
with an accuracy within two points of low_confidence at one token per step.
Ancestral and first-hitting sampling use temperature 1, at which they are exact.
The other rules take the most probable token. --out needs matplotlib.
"""

import argparse
import functools

from maskdiff.evals import answered, puzzles
from maskdiff.interop import load

TOLERANCE = 0.02
PRINTED = ('steps', 'threshold', 'factor', 'temperature')
THRESHOLDS, FACTORS = (0.5, 0.7, 0.9, 0.99), (4.0, 2.0, 1.0, 0.25)


def settings(slots):
  """Returns the settings to compare: dict from a rule to a list of settings."""
  steps = sorted({slots, *(n for n in (1, 2, 4, 8) if n < slots)})
  of = lambda **values: [{**values, 'steps': n} for n in steps]
  greedy = {'temperature': 0.0}
  return {
    'low_confidence': of(**greedy),
    'low_confidence, entropy': of(**greedy, confidence='entropy'),
    'low_confidence, margin': of(**greedy, confidence='margin'),
    'low_confidence, cosine': of(**greedy, schedule='cosine'),
    'random': of(**greedy, remasking='random'),
    'threshold': [
      {**greedy, 'remasking': 'threshold', 'threshold': x} for x in THRESHOLDS
    ],
    'factor': [{**greedy, 'remasking': 'factor', 'factor': x} for x in FACTORS],
    'ancestral': of(temperature=1.0, remasking='ancestral'),
    'first_hitting': [{'temperature': 1.0, 'remasking': 'first_hitting'}],
  }


def measure(task, workdir, num):
  """Measures all settings of a task.

  Returns:
    Dict from a rule to a list of (forward passes per token, accuracy, standard
    error, setting).
  """
  model = load.Model(*load.load(workdir))
  lines = puzzles.make(task, 0, num)
  slots = len(model.tokenizer.encode(lines[0]['answer'])) + 1
  points = {}
  for rule, many in settings(slots).items():
    for values in many:
      _, total = answered.answer_lines(
        model,
        {'block_length': slots, **values},
        lines,
        functools.partial(puzzles.correct, task),
        seed=0,
        batch=num,
      )
      point = (
        total['forwards_per_token'],
        total['accuracy'],
        total['stderr_accuracy'],
        values,
      )
      points.setdefault(rule, []).append(point)
      printed = {k: v for k, v in values.items() if k in PRINTED}
      print(
        f'{task}, {rule} {printed}: {point[0]:.2f} forwards/token, '
        f'accuracy {point[1]:.3f} ± {point[2]:.3f}',
        flush=True,
      )
  return points


def at_equal_quality(task, points):
  """Prints the fewest forward passes of each rule at equal accuracy."""
  _, accuracy, _, _ = max(points['low_confidence'], key=lambda p: p[0])
  least = accuracy - TOLERANCE
  print(f'{task}: forwards/token for an accuracy of at least {least:.3f}')
  for rule, some in points.items():
    accurate = [p for p in some if p[1] >= least]
    best = f'{min(p[0] for p in accurate):.2f}' if accurate else 'not reached'
    print(f'  {rule:24} {best}')


def plot(found, out):
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, all_axes = plt.subplots(
    1,
    len(found),
    figsize=(5.2 * len(found), 4),
    layout='constrained',
    squeeze=False,
  )
  for axes, (task, points) in zip(all_axes[0], found.items(), strict=True):
    for i, (rule, some) in enumerate(points.items()):
      x, y, error, _ = zip(*sorted(some, key=lambda p: p[0]), strict=True)
      axes.errorbar(
        x,
        y,
        error,
        label=rule,
        marker='osD^vP*Xd'[i],
        markersize=5,
        linewidth=1,
        elinewidth=0.6,
      )
    axes.set_title(task)
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.set_xlabel('forward passes per token')
    axes.set_ylim(bottom=0)
    axes.spines[['top', 'right']].set_visible(False)
  all_axes[0, 0].set_ylabel('puzzles solved')
  lines, labels = all_axes[0, 0].get_legend_handles_labels()
  figure.legend(lines, labels, loc='outside right center', frameon=False)
  figure.savefig(out, dpi=130)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('runs', nargs='+', metavar='TASK=WORKDIR')
  parser.add_argument('--num', type=int, default=200, help='puzzles')
  parser.add_argument('--out', help='file for the plot')
  args = parser.parse_args()
  found = {}
  for task, workdir in (text.split('=', 1) for text in args.runs):
    found[task] = measure(task, workdir, args.num)
  for task, points in found.items():
    at_equal_quality(task, points)
  if args.out:
    plot(found, args.out)


if __name__ == '__main__':
  main()
