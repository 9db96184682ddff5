"""Makes the tables and the plot of speed in docs/block_diffusion.md.

python benchmarks/throughput_page.py

Reads benchmarks/results/throughput.jsonl, from throughput.py, and
benchmarks/results/equal_quality.jsonl, from equal_quality.py; draws
docs/throughput.png and rewrites the tables of the page. Needs matplotlib, which
is in requirements-test.txt.
"""

import math
import pathlib

import json_lines  # files beside this one
import page_parts

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
PAGE = ROOT / 'docs' / 'block_diffusion.md'
BASE = ('autoregressive', 1)
# Sampler and tokens per step: the columns of the table, and the curves.
SHOWN = (
  ('blocks of 4', 1),
  ('blocks of 4', 4),
  ('blocks of 16', 8),
  ('blocks of 32', 8),
  ('masked diffusion', 1),
  ('masked diffusion', 8),
)
COLORS = ('#8fc7a4', '#3a8f5c', '#7a52a8', '#c0392b', '#9db8e6', '#1f5fbf')
PLOTTED_ANSWER = 256
TOLERANCE = 0.02  # of the accuracy, as in quality.py


def read(name):
  """Returns the lines of a file of results."""
  return json_lines.read(RESULTS / name)


def by_canvas(lines):
  """Returns dict: (batch, prompt, answer) -> (sampler, n) -> line."""
  found = {}
  for x in lines:
    canvas = x['batch'], x['prompt'], x['answer']
    found.setdefault(canvas, {})[x['sampler'], x['tokens_per_step']] = x
  return dict(sorted(found.items()))


def ratio(of, shown):
  """Returns tokens/s of a sampler by those of autoregression; NaN: unknown."""
  if shown not in of:
    return math.nan
  return of[shown]['tokens_per_s'] / of[BASE]['tokens_per_s']


def speed_table(canvases):
  """Returns the table of ratios, with empty cells where none was measured."""
  heads = ['batch', 'prompt', 'answer', 'autoregressive, tokens/s']
  heads += [f'{name}, {n} per step' for name, n in SHOWN]
  rows = [heads]
  for canvas, of in canvases.items():
    cells = [*map(str, canvas), f'{of[BASE]["tokens_per_s"]:,.0f}']
    ratios = [ratio(of, shown) for shown in SHOWN]
    cells += ['' if math.isnan(x) else f'{x:.2f}' for x in ratios]
    rows.append(cells)
  return page_parts.table(rows)


def quality_table(lines):
  """Returns the table of accuracy and speed on a puzzle.

  One row per network: one token per step, and the fastest setting whose
  accuracy is at most TOLERANCE below.
  """
  heads = 'network', 'setting', 'solved', 'forward passes per token', 'tokens/s'
  rows = [heads]
  networks = dict.fromkeys(x['network'] for x in lines)
  for name in networks:
    of = [x for x in lines if x['network'] == name]
    first, *others = of
    least = first['accuracy'] - TOLERANCE
    equal = [x for x in others if x['accuracy'] >= least]
    fastest = min(equal, key=lambda x: x['forwards_per_token'], default=None)
    for x in [first, *([fastest] if fastest else [])]:
      rows.append(
        [
          name.replace('_', ' '),
          x['setting'],
          f'{x["accuracy"]:.1%} ± {x["stderr_accuracy"]:.1%}',
          f'{x["forwards_per_token"]:.2f}',
          f'{x["tokens_per_s"]:,.0f}',
        ]
      )
  return page_parts.table(rows)


def plot(canvases, out):
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  batches = sorted({batch for batch, _, _ in canvases})
  figure, all_axes = plt.subplots(
    1, len(batches), figsize=(9, 3.6), layout='constrained', sharey=True
  )
  for axes, batch in zip(all_axes, batches, strict=True):
    prompts = sorted(
      p for b, p, a in canvases if b == batch and a == PLOTTED_ANSWER
    )
    of = [canvases[batch, p, PLOTTED_ANSWER] for p in prompts]
    for shown, color in zip(SHOWN, COLORS, strict=True):
      axes.plot(
        prompts,
        [ratio(x, shown) for x in of],
        color=color,
        marker='o',
        markersize=4,
        label=f'{shown[0]}, {shown[1]} per step',
      )
    axes.axhline(1, color='#555555', linestyle='--', linewidth=1)
    axes.set_xscale('log', base=2)
    axes.set_yscale('log', base=2)
    axes.xaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.set_xticks(prompts)
    axes.set_title(f'batch of {batch}', fontsize=10)
    axes.set_xlabel('tokens of the prompt')
    axes.spines[['top', 'right']].set_visible(False)
  all_axes[0].set_ylabel('tokens/s, autoregression = 1')
  lines, labels = all_axes[0].get_legend_handles_labels()
  figure.legend(
    lines, labels, loc='outside lower center', ncols=3, frameon=False
  )
  figure.savefig(out, dpi=130)


def main():
  canvases = by_canvas(read('throughput.jsonl'))
  parts = {
    'speed': speed_table(canvases),
    'quality': quality_table(read('equal_quality.jsonl')),
  }
  plot(canvases, ROOT / 'docs' / 'throughput.png')
  text = PAGE.read_text()
  PAGE.write_text(page_parts.fill(text, 'throughput_page', parts.__getitem__))


if __name__ == '__main__':
  main()
