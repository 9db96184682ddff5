"""Makes the tables and the picture of docs/policy_gradients.md from raw lines.

python benchmarks/policy_gradients_page.py

The lines are those of policy_gradients.py and policy_training.py, in
benchmarks/results/policy_gradients.jsonl. Needs matplotlib, which is in
requirements-test.txt.
"""

import pathlib

import json_lines
import page_parts
from page_parts import table

ROOT = pathlib.Path(__file__).resolve().parents[1]
RAW = ROOT / 'benchmarks/results/policy_gradients.jsonl'
PAGE = ROOT / 'docs/policy_gradients.md'
GRADIENT_HEADS = ['cosine', 'length', 'noise', 'forwards']


def of_part(lines, part):
  return [line for line in lines if line['part'] == part]


def name(line):
  """Returns method and changed settings of a line."""
  changes = {k: v for k, v in line['changes'].items() if k != 'kl_to'}
  text = ', '.join(f'{key}={value}' for key, value in changes.items())
  text = f'`{line["method"]}`' + (f', {text}' if text else '')
  if not line['shared']:
    text += ', separate masks'
  elsewhere = line['method'] == 'justgrpo' and line.get('in_order') is False
  return text + (', answers in random order' if elsewhere else '')


def gradient_cells(line):
  """Returns cosine with its error, scale, noise and forward passes as text."""
  if line['cosine'] is None:
    return ['mean is 0', f'{line["scale"]:.2f}', '–', str(line['forwards'])]
  return [
    f'{line["cosine"]:.2f} ± {line["cosine_error"]:.2f}',
    f'{line["scale"]:.2f}',
    f'{line["noise"]:.2f}',
    str(line['forwards']),
  ]


def gradients(lines, head='method'):
  """Returns a table with a line per measured gradient."""
  rows = [[head, *GRADIENT_HEADS]]
  return table(rows + [[name(x), *gradient_cells(x)] for x in lines])


def methods(lines):
  """Returns the table of methods: on-policy for two rewards, and off-policy."""
  found = of_part(lines, 'methods')
  heads = ['method', 'forwards']
  kinds = ('ring', 0.0), ('count', 0.0), ('ring', 0.1)
  for kind in ('ring', 'count', 'moved'):
    heads += [f'{kind}: cosine', 'noise']
  rows = [heads]
  for key in dict.fromkeys(map(name, found)):
    cells = [key]
    own = [x for x in found if name(x) == key]
    cells.append(str(own[0]['forwards']))
    for kind in kinds:
      of = [x for x in own if (x['reward'], x['moved']) == kind]
      cells += [gradient_cells(of[0])[i] for i in (0, 2)] if of else ['', '']
    rows.append(cells)
  return table(rows)


def masks(lines):
  rows = [['masks', 'policy', *GRADIENT_HEADS]]
  for x in of_part(lines, 'masks'):
    moved = f'moved by {x["moved"]} nats' if x['moved'] else 'that sampled'
    rows.append([name(x), moved, *gradient_cells(x)])
  return table(rows)


def clip(lines):
  rows = [['clip', *GRADIENT_HEADS, 'clipped']]
  for x in of_part(lines, 'clip'):
    rows.append([name(x), *gradient_cells(x), f'{x["clip_fraction"]:.2f}'])
  return table(rows)


def start(lines):
  rows = [
    ['policy', 'reward', 'expected', 'gap', 'cosine: bound', 'all masked']
  ]
  for x in of_part(lines, 'start'):
    rows.append(
      [
        x['policy'],
        x['reward'],
        f'{x["expected_reward"]:.3f}',
        f'{x["gap"]:.4f}',
        f'{x["bound_cosine"]:.4f}',
        f'{x["all_masked_cosine"]:.3f}',
      ]
    )
  return table(rows)


def training(lines):
  rows = [
    [
      'method',
      'start',
      'rounds',
      'rate',
      'reward',
      'left to right',
      'gap',
      'entropy',
      'KL to start',
    ]
  ]
  for x in of_part(lines, 'training'):
    error = f' ± {x["reward_error"]:.3f}' if x['reward_error'] else ''
    rows.append(
      [
        name(x),
        x['policy'],
        str(x['rounds']),
        str(x['rate']),
        f'{x["expected_reward"][-1]:.3f}{error}',
        f'{x["left_to_right"][-1]:.3f}',
        f'{x["gap"][-1]:.3f}',
        f'{x["entropy"][-1]:.2f}',
        f'{x["kl"][-1]:.2f}',
      ]
    )
  return table(rows)


PARTS = {
  'methods': methods,
  'masks': masks,
  'clip': clip,
  'divergence': lambda lines: gradients(
    of_part(lines, 'divergence'), 'divergence'
  ),
  'start': start,
  'training': training,
}


def filled(text, lines):
  """Replaces the tables of a page between comments of this script."""
  part = lambda name: PARTS[name](lines)
  return page_parts.fill(text, 'policy_gradients_page', part)


def plot(lines, out):
  """Draws reward and gap along training."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  found = [x for x in of_part(lines, 'training') if x['policy'] == 'trained']
  plain = [x for x in found if not x['changes'] and x['shared']]
  figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout='constrained')
  colors = plt.get_cmap('tab20').colors
  for axes, key in zip(panels, ('expected_reward', 'gap'), strict=True):
    for x, color in zip(plain, colors, strict=False):
      exact = x['method'].startswith('exact')
      values = x[key]
      axes.plot(
        [(i + 1) / len(values) for i in range(len(values))],
        values,
        color=color,
        linestyle='--' if exact else '-',
        label=x['method'],
      )
    axes.set_xlabel('share of the training')
    axes.spines[['top', 'right']].set_visible(False)
  panels[1].set_yscale('log')
  panels[0].set_ylabel('expected reward')
  panels[1].set_ylabel('log-likelihood minus bound, nats')
  figure.legend(
    *panels[0].get_legend_handles_labels(),
    loc='outside lower center',
    frameon=False,
    fontsize=7,
    ncols=5,
  )
  figure.savefig(out, dpi=120)


def main():
  lines = json_lines.read(RAW)
  PAGE.write_text(filled(PAGE.read_text(), lines))
  plot(lines, PAGE.with_suffix('.png'))


if __name__ == '__main__':
  main()
