r"""Makes the tables and the picture of docs/recipes.md from raw lines.

python benchmarks/recipes_page.py
python benchmarks/recipes_page.py recipes.jsonl

Without a file: draws docs/recipes.png, and rewrites the tables of
docs/recipes.md, from benchmarks/results/recipes.jsonl. With a results file of
recipes.py: prints its tables.

The columns: the mean final bound of the seeds in nats per token; its difference
from the first recipe, with the standard error of the pairs of trainings, which
have the same held-out rows and masks; and the share of the tokens and of the
FLOPs of the first recipe after which its final bound was reached. Needs
matplotlib, which is in requirements-test.txt.
"""

import sys

import numpy as np
import page_parts  # files beside this one
from recipes import RECIPES, ROOT, read

RAW = ROOT / 'benchmarks/results/recipes.jsonl'
PAGE = ROOT / 'docs/recipes.md'


def share_to_reach(evaluations, target):
  """Returns the share of the training after which a bound was reached.

  The bound is interpolated linearly between two evaluations. Infinity if it was
  not reached.
  """
  for (s0, l0), (s1, l1) in zip(evaluations, evaluations[1:], strict=False):
    if l1 <= target <= l0:
      reached = s0 + (s1 - s0) * (l0 - target) / (l0 - l1)
      return reached / evaluations[-1][0]
  return np.inf


def groups(lines):
  """Returns dict: (config, set, corpus) -> recipe -> seed -> line."""
  found = {}
  for x in lines:
    group = found.setdefault((x['config'], *x['set'], x['corpus']), {})
    group.setdefault(x['recipe'], {})[x['seed']] = x
  return found


def table(group):
  """Returns rows of text, the first for the heads of the columns."""
  rows = [('recipe', 'seeds', 'bound', 'difference', 'tokens', 'FLOPs')]
  base = group.get(next(iter(RECIPES)), {})
  for recipe in RECIPES:
    of = group.get(recipe, {})
    seeds = sorted(of.keys() & base.keys())
    if not seeds:
      continue
    row = [recipe, str(len(seeds))]
    row.append(f'{np.mean([of[s]["evaluations"][-1][1] for s in seeds]):.3f}')
    if of is base:
      rows.append((*row, '', '1.00', '1.00'))
      continue
    pairs = [(of[s], base[s]) for s in seeds]
    row.append(
      with_error(
        np.array(
          [np.subtract(*(x['heldout_batches'] for x in p)) for p in pairs]
        )
      )
    )
    shares = np.array(
      [
        share_to_reach(mine['evaluations'], first['evaluations'][-1][1])
        for mine, first in pairs
      ]
    )
    flops = [np.divide(*(x['flops_per_token'] for x in p)) for p in pairs]
    row += [
      f'{x.mean():.2f}' if np.isfinite(x).all() else 'not reached'
      for x in (shares, shares * flops)
    ]
    rows.append(tuple(row))
  return rows


def with_error(difference):
  """Returns a mean with its standard error.

  Args:
    difference: [seeds, held-out batches]. All seeds have the same batches, so
      the variances over the seeds and over the batches add up.
  """
  variance = sum(
    means.var(ddof=1) / len(means)
    for means in (difference.mean(axis=0), difference.mean(axis=1))
    if len(means) > 1
  )
  return f'{difference.mean():+.3f} ± {variance**0.5:.3f}'


def title(group):
  """Returns the heading of a group: (config, changes ..., corpus)."""
  config, *changes, corpus = group
  return ', '.join([f'configs/{config}.py', *changes, f'{corpus} corpus'])


def filled(text, found):
  """Replaces the tables of a page between comments of this script."""
  tables = '\n\n'.join(
    f'{title(group)}:\n\n{page_parts.table(table(of))}'
    for group, of in found.items()
  )
  return page_parts.fill(text, 'recipes_page', {'tables': tables}.__getitem__)


def plot(found, out):
  """Draws the bound over the tokens: a panel per group, a line per recipe."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  columns = min(2, len(found))
  rows = -(-len(found) // columns)
  figure, panels = plt.subplots(
    rows,
    columns,
    figsize=(4.2 * columns, 4 * rows),
    layout='constrained',
    squeeze=False,
  )
  for axes in panels.flat[len(found) :]:
    axes.axis('off')
  colors = dict(zip(RECIPES, plt.get_cmap('tab20').colors, strict=False))
  for axes, (group, of) in zip(panels.flat, found.items(), strict=False):
    for recipe in of:
      lines = list(of[recipe].values())
      evaluations = np.mean([x['evaluations'][1:] for x in lines], axis=0)
      steps, bound = evaluations.T
      tokens = steps * lines[0]['tokens_per_step'] / 1e6
      axes.plot(tokens, bound, label=recipe, color=colors[recipe], marker='.')
    axes.axhline(
      lines[0]['unigram_entropy'],
      color='#777777',
      linestyle='--',
      linewidth=1,
      label='entropy of single tokens',
    )
    axes.set_title('\n'.join(title(group).split(', ')), fontsize=9)
    axes.set_xlabel('training tokens (millions)')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
  for axes in panels[:, 0]:
    axes.set_ylabel('held-out bound, nats per token')
  figure.savefig(out, dpi=120)


def main(path=None):
  found = groups(read(path or RAW))
  if path:
    from maskdiff.monitoring import terminal

    for group, of in found.items():
      print(title(group), terminal.table(table(of)), sep='\n', end='\n\n')
    return
  PAGE.write_text(filled(PAGE.read_text(), found))
  plot(found, PAGE.with_suffix('.png'))


if __name__ == '__main__':
  main(*sys.argv[1:])
