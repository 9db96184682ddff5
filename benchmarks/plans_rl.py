r"""Plans the rounds of configs/rl_8b.py, and makes the tables of docs/rl_8b.md.

python benchmarks/plans_rl.py --out benchmarks/results/plans_rl.jsonl
python benchmarks/plans_rl.py --page

The first command compiles the programs of each config with launch/plan.py, some
minutes for each, and appends a line for each plan. Lines that exist are
skipped, so the same command resumes. --only chooses among the configs. The
second command rewrites the tables of the page from benchmarks/results/.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import json_lines  # files beside this one
import page_parts

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'plans_rl.jsonl'
PAGE = ROOT / 'docs' / 'rl_8b.md'
TOPOLOGIES = {'v5p:2x2x1': 'v5p-8', 'v6e:4x4': 'v6e-16'}
# Planned task -> tasks of the same shapes, with their denoising steps. All
# other differences between their programs are numbers.
TASKS = {
  'countdown': {'countdown, sudoku': 128, 'gsm8k': 256},
  'code': {'code': 256},
  'math': {'math': 256},
}
CONFIGS = [task + suffix for task in TASKS for suffix in ('_lora', '')]
# Keys of a plan that a line keeps.
KEPT = (
  *('status', 'chips', 'mesh', 'length', 'batch', 'microbatches', 'remat'),
  *('copies', 'inner_steps', 'denoising_steps', 'parameters', 'warnings'),
  *('hbm_parameters_gib', 'hbm_optimizer_gib', 'hbm_reference_gib'),
  *('hbm_copy_gib', 'hbm_total_gib', 'hbm_capacity_gib', 'programs', 'levers'),
)
PROGRAMS = ('copy', 'sampling', 'fixed', 'training')


def plan(config, topology):
  """Returns the plan of a config, a dict; see planner/fields.py."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'plan.json'
    done = subprocess.run(
      [
        *(sys.executable, 'launch/plan.py', '--topology', topology),
        *('--config', f'configs/rl_8b.py:{config}', '--json', path),
      ],
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
    )
    if not path.exists():
      sys.exit(f'{config} on {topology}: status {done.returncode}')
    return json.loads(path.read_text())


def line(config, topology, p):
  """Returns the line of a plan."""
  return {
    'config': config,
    'topology': topology,
    **{key: p[key] for key in KEPT},
  }


def times(p, denoising_steps):
  """Returns seconds per round: sampling, fixed log-probabilities, training.

  Args:
    p: line of a plan.
    denoising_steps: of a task with the same shapes.
  """
  of = {x['name']: x['step_s'] * x['runs'] for x in p['programs']}
  sampling = of['copy'] + denoising_steps * of['sampling']
  return sampling, of['fixed'], of['training']


def memory(lines):
  """Returns the table of memory."""
  head = ['`configs/rl_8b.py:`', 'machine', 'parameters', 'optimizer']
  head += ['reference', 'copy', *(f'peak of {name}' for name in PROGRAMS)]
  rows = [[*head, 'of']]
  for p in _ordered(lines):
    peaks = {x['name']: x for x in p['programs']}
    held = ('parameters', 'optimizer', 'reference', 'copy')
    rows.append(
      [
        _name(p),
        TOPOLOGIES[p['topology']],
        *(f'{p[f"hbm_{name}_gib"]:.1f}' for name in held),
        *(f'{peaks[name]["hbm_total_gib"]:.1f}' for name in PROGRAMS),
        f'{p["hbm_capacity_gib"]}',
      ]
    )
  return page_parts.table(rows)


def rounds(lines):
  """Returns the table of the time of a round."""
  head = ['`configs/rl_8b.py:`', 'machine', 'answers', 'denoising steps']
  head += ['forward pass, s', 'sampling, s', 'fixed log-probabilities, s']
  rows = [[*head, 'train steps, s', 'round, s', 'share of sampling']]
  for p in _ordered(lines):
    forward = next(x for x in p['programs'] if x['name'] == 'sampling')
    suffix = '_lora' if p['config'].endswith('_lora') else ''
    tasks = TASKS[p['config'].removesuffix('_lora')]
    for names, steps in tasks.items():
      parts = times(p, steps)
      rows.append(
        [
          ', '.join(name + suffix for name in names.split(', ')),
          TOPOLOGIES[p['topology']],
          f'{p["batch"]}',
          f'{steps}',
          f'{forward["step_s"]:.2f}',
          *(f'{seconds:.0f}' for seconds in parts),
          f'{sum(parts):.0f}',
          f'{parts[0] / sum(parts):.0%}',
        ]
      )
  return page_parts.table(rows)


def _name(p):
  suffix = '_lora' if p['config'].endswith('_lora') else ''
  tasks = TASKS[p['config'].removesuffix('_lora')]
  names = ', '.join(tasks).split(', ')
  return ', '.join(name + suffix for name in names)


def _ordered(lines):
  order = [(c, t) for c in CONFIGS for t in TOPOLOGIES]
  return sorted(lines, key=lambda p: order.index((p['config'], p['topology'])))


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', help='file of lines')
  parser.add_argument('--only', default='', help='one config')
  parser.add_argument('--page', action='store_true', help='rewrite the tables')
  args = parser.parse_args()
  if args.page:
    lines = json_lines.read(RESULTS)
    parts = {'memory': memory, 'rounds': rounds}
    part = lambda name: parts[name](lines)
    PAGE.write_text(page_parts.fill(PAGE.read_text(), 'plans_rl', part))
    return
  for config in CONFIGS:
    for topology in TOPOLOGIES:
      of = {'config': config, 'topology': topology}
      if args.only in ('', config) and not json_lines.has(args.out or '', of):
        found = line(config, topology, plan(config, topology))
        json_lines.report([found], args.out)


if __name__ == '__main__':
  main()
