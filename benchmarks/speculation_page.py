"""Makes the tables and the plot of docs/speculation.md from raw lines.

python benchmarks/speculation_page.py

Reads benchmarks/results/speculation.jsonl, from speculation.py; draws
docs/speculation.png and rewrites the tables of the page. Needs matplotlib,
which is in requirements-test.txt.
"""

import itertools
import pathlib

import json_lines  # files beside this one
import page_parts
from decoders import BASE, METHODS, ONE, SPECULATIVE, TIMED

ROOT = pathlib.Path(__file__).parents[1]
RAW = ROOT / 'benchmarks' / 'results' / 'speculation.jsonl'
PAGE = ROOT / 'docs' / 'speculation.md'
WINDOWS = [name for name in METHODS if name.startswith('sdlm')]
# The columns of the two tasks that show the quality of answers.
QUALITY = {'corpus': 'most_probable', 'copying': 'exact_match'}
CONFIDENT = ('longest_prefix', 'threshold')  # rules of the table of networks


def by_decoder(lines):
  """Returns dict: (method, decoder) -> task -> values, ordered as METHODS.

  The values are those of the line of answers, and ratio_ROWS of those of speed.
  Decoders without answers to each task are left out.
  """
  found = {}
  for x in sorted(lines, key=lambda x: x['part']):
    if x['part'] == 'losses':
      continue
    of = found.setdefault((x['method'], x['decoder']), {})
    if x['part'] == 'answers':
      of[x['task']] = dict(x)
    else:
      of[x['task']][f'ratio_{x["rows"]}'] = x['ratio']
  order, whole = list(METHODS), QUALITY.keys()
  pairs = [(key, of) for key, of in found.items() if of.keys() == whole]
  return dict(sorted(pairs, key=lambda pair: order.index(pair[0][0])))


def shares(x, *columns):
  """Returns columns of a line as texts: percent, or numbers."""
  percent = ('equal', 'exact', 'most')
  return [
    ''
    if name not in x
    else f'{x[name]:.0%}'
    if name.startswith(percent)
    else f'{x[name]:.2f}'
    for name in columns
  ]


def networks_table(found):
  """Returns the table of all networks, each with one decoder or two."""
  heads = ['network', 'decoder']
  for task, quality in QUALITY.items():
    heads += [f'{task}: tokens per pass', quality.replace('_', ' ')]
    heads += ['tokens/s, 1 row', 'tokens/s, 8 rows']
  heads += ['same answers as one token per step']
  shown = [ONE, SPECULATIVE, *(f'{rule} {TIMED}' for rule in CONFIDENT)]
  rows = [heads]
  for (method, decoder), of in found.items():
    first = decoder == ONE and method not in (BASE, 'continued')
    if decoder not in shown or first:
      continue
    row = [METHODS[method].name, decoder.replace('_', ' ')]
    for task, quality in QUALITY.items():
      row += shares(of[task], 'tokens_per_pass', quality, 'ratio_1', 'ratio_8')
    same = [of[task]['equal_one_per_step'] for task in QUALITY]
    rows.append([*row, f'{sum(same) / len(same):.0%}'])
  return page_parts.table(rows)


def thresholds(found, method, rule):
  """Returns [(threshold, {task: line})] of a rule, thresholds ascending."""
  of = []
  for (name, decoder), lines in found.items():
    words, _, number = decoder.rpartition(' ')
    if name == method and words == rule:
      of.append((float(number), lines))
  return sorted(of, key=lambda pair: pair[0])


def thresholds_table(found, rules, methods=WINDOWS):
  """Returns the table of tokens per pass and quality over thresholds.

  Args:
    found: from `read`.
    rules: names of decoders without their thresholds, compared side by side.
    methods: names of networks.
  """
  heads = ['network', 'threshold']
  for rule in rules:
    of = f', {rule.replace("_", " ")}' * (len(rules) > 1)
    for task, quality in QUALITY.items():
      heads += [f'{task}{of}: tokens per pass', quality.replace('_', ' ')]
  rows = [heads]
  for method in methods:
    by_rule = [dict(thresholds(found, method, rule)) for rule in rules]
    for x in by_rule[0]:
      if not all(x in of for of in by_rule):
        continue
      row = [METHODS[method].name, f'{x:g}']
      for of in by_rule:
        for task, quality in QUALITY.items():
          row += shares(of[x][task], 'tokens_per_pass', quality)
      rows.append(row)
  return page_parts.table(rows)


def losses_table(lines):
  """Returns the table of the held-out loss by position in the window."""
  of = {
    (x['method'], x['task']): x['nll'] for x in lines if x['part'] == 'losses'
  }
  positions = [str(2**i) for i in range(6)]
  rows = [['network', 'text', *(f'position {n}' for n in positions)]]
  for method, task in itertools.product(WINDOWS, QUALITY):
    if nll := of.get((method, task)):
      cells = [f'{nll[n]:.2f}' if n in nll else '' for n in positions]
      rows.append([METHODS[method].name, task, *cells])
  return page_parts.table(rows)


def curves(found):
  """Returns {name of a curve: [{task: line}]} for the plot, over thresholds."""
  of = {}
  for method in METHODS:
    for rule in CONFIDENT:
      if line := [x for _, x in thresholds(found, method, rule)]:
        if rule == CONFIDENT[1] and method in WINDOWS:
          continue
        of[METHODS[method].name] = line
  return of


def plot(found, out):
  """Draws quality over tokens per pass, and speed over tokens per pass."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, (*panels, speed) = plt.subplots(
    1, 3, figsize=(11, 4.4), layout='constrained'
  )
  colors = dict(zip(METHODS, plt.get_cmap('tab20').colors, strict=False))
  by_name = {METHODS[method].name: colors[method] for method in METHODS}
  titles = {
    'corpus': 'tokens that greedy decoding would take',
    'copying': 'exact match',
  }
  for axes, (task, quality) in zip(panels, QUALITY.items(), strict=True):
    for name, lines in curves(found).items():
      pairs = [(x[task]['tokens_per_pass'], x[task][quality]) for x in lines]
      axes.plot(*zip(*pairs, strict=True), marker='.', color=by_name[name])
    for (method, decoder), of in found.items():
      if decoder == SPECULATIVE or (method, decoder) == (BASE, ONE):
        at = of[task]['tokens_per_pass'], of[task][quality]
        marker = 'x' if method == BASE else '*'
        axes.plot(*at, marker, color=colors[method], markersize=9)
    axes.set_title(task, fontsize=10)
    axes.set_ylabel(titles[task])
    axes.set_ylim(0, 1.05)
    axes.set_xlabel('tokens per forward pass')
  for (method, _), of in found.items():
    for task, marker in zip(QUALITY, 'o^', strict=True):
      if 'ratio_1' not in of[task]:
        continue
      at = of[task]['tokens_per_pass'], of[task]['ratio_1']
      speed.plot(*at, marker, color=colors[method], markersize=4)
  end = max(of[t]['tokens_per_pass'] for of in found.values() for t in QUALITY)
  speed.plot([1, end], [1, end], color='#777777', linestyle='--', linewidth=1)
  speed.set_xscale('log', base=2)
  speed.set_yscale('log', base=2)
  for axis in (speed.xaxis, speed.yaxis):
    axis.set_major_formatter('{x:g}')
  speed.set_title('1 row; triangles: copying', fontsize=10)
  speed.set_xlabel('tokens per forward pass')
  speed.set_ylabel('tokens/s, greedy decoding = 1')
  for axes in (*panels, speed):
    axes.spines[['top', 'right']].set_visible(False)
  for method in dict.fromkeys(method for method, _ in found):
    speed.plot([], [], 'o', color=colors[method], label=METHODS[method].name)
  figure.legend(loc='outside lower center', ncols=5, frameon=False, fontsize=8)
  figure.savefig(out, dpi=130)


def parts(lines):
  """Returns {name of a part of the page: text}."""
  found = by_decoder(lines)
  return {
    'networks': networks_table(found),
    'thresholds': thresholds_table(found, CONFIDENT),
    'entropy': thresholds_table(
      found, ('longest_prefix', 'entropy'), ['sdlm_8']
    ),
    'losses': losses_table(lines),
  }


def main():
  lines = json_lines.read(RAW)
  plot(by_decoder(lines), PAGE.with_suffix('.png'))
  text, of = PAGE.read_text(), parts(lines)
  PAGE.write_text(page_parts.fill(text, 'speculation_page', of.__getitem__))


if __name__ == '__main__':
  main()
