r"""Plans the rounds of configs/rl_8b.py, and makes the tables of docs/rl_8b.md.

python benchmarks/plans_rl.py
python benchmarks/plans_rl.py --page

The first command compiles the programs of each config as launch/plan.py does,
and appends a line for each program to --out, by default
benchmarks/results/plans_rl.jsonl. One takes a minute of a CPU core, a train
step several. Lines that exist are skipped, so the same command resumes.
--configs, --topologies and --programs choose among them. The second command
rewrites the tables of the page from benchmarks/results/.
"""

import argparse
import os
import pathlib
import runpy

import json_lines  # files beside this one
import page_parts

from maskdiff.planner.environment import COMPILER_ENVIRONMENT

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
PROGRAMS = ('copy', 'sampling', 'fixed', 'training')
HELD = ('parameters', 'optimizer', 'reference', 'copy')


def lines(configs, topologies, programs, done):
  """Yields a line for each program, compiled one after the other.

  Args:
    configs: entries of configs/rl_8b.py.
    topologies: keys of TOPOLOGIES.
    programs: some of PROGRAMS.
    done: (dict of config, topology and program) -> whether to skip it.
  """
  os.environ.update(COMPILER_ENVIRONMENT)
  # These modules import JAX, which reads the environment.
  import jax

  from maskdiff.planner import plan_rl

  get_config = runpy.run_path(str(ROOT / 'configs' / 'rl_8b.py'))['get_config']
  for topology in topologies:
    for config in configs:
      of = {'config': config, 'topology': topology}
      left = [n for n in programs if not done(of | {'program': n})]
      if not left:
        continue
      r = plan_rl.open_plan(get_config(config), topology)
      facts, held = plan_rl.facts_of(r), plan_rl.held_gib(r)
      for name in left:
        p = plan_rl.program(r, facts, name)
        jax.clear_caches()
        keys = ('chips', 'mesh', 'length', 'batch', 'microbatches', 'remat')
        yield {
          **of,
          'program': name,
          **plan_rl.row(p),
          **{key: facts[key] for key in (*keys, 'copies', 'inner_steps')},
          **held,
          'hbm_capacity_gib': facts['hbm_capacity_gib'],
          'warnings': p['warnings'],
        }


def grouped(found):
  """Returns {(config, topology): {program: line}}, in the order of the page."""
  groups = {}
  for config in CONFIGS:
    for topology in TOPOLOGIES:
      of = {
        line['program']: line
        for line in found
        if (line['config'], line['topology']) == (config, topology)
      }
      if of:
        groups[config, topology] = of
  return groups


def memory(found):
  """Returns the table of memory."""
  heads = ['`configs/rl_8b.py:`', 'machine', 'parameters', 'optimizer']
  heads += ['reference', 'copy', *(f'peak, {name}' for name in PROGRAMS), 'of']
  rows = [heads]
  for (config, topology), of in grouped(found).items():
    some = next(iter(of.values()))
    peaks = [
      f'{of[n]["hbm_total_gib"]:.1f}' if n in of else '' for n in PROGRAMS
    ]
    rows.append(
      [
        ', '.join(name for names, _ in tasks(config) for name in names),
        TOPOLOGIES[topology],
        *(f'{some[f"hbm_{name}_gib"]:.1f}' for name in HELD),
        *peaks,
        f'{some["hbm_capacity_gib"]}',
      ]
    )
  return page_parts.table(rows)


def rounds(found):
  """Returns the table of the time of a round."""
  heads = ['`configs/rl_8b.py:`', 'machine', 'answers', 'forward pass']
  heads += ['sampling', 'fixed log-probabilities', 'train steps', 'round']
  rows = [[*heads, 'share of sampling']]
  for (config, topology), of in grouped(found).items():
    for names, steps in tasks(config):
      parts = times(of, steps)
      whole = None not in parts
      cell = lambda seconds: '' if seconds is None else f'{seconds:.0f}'
      forward = f'{of["sampling"]["step_s"]:.2f}' if 'sampling' in of else ''
      rows.append(
        [
          ', '.join(names),
          TOPOLOGIES[topology],
          f'{next(iter(of.values()))["batch"]}',
          forward,
          *map(cell, parts),
          cell(sum(parts) if whole else None),
          f'{parts[0] / sum(parts):.0%}' if whole else '',
        ]
      )
  return page_parts.table(rows)


def tasks(config):
  """Returns (entries of configs/rl_8b.py, denoising steps) of these shapes."""
  suffix = '_lora' if config.endswith('_lora') else ''
  return [
    ([name + suffix for name in names.split(', ')], steps)
    for names, steps in TASKS[config.removesuffix('_lora')].items()
  ]


def times(of, denoising_steps):
  """Returns seconds per round: sampling, fixed log-probabilities, training.

  Args:
    of: {program: line}; None for programs that are missing.
    denoising_steps: of a task with these shapes.
  """
  seconds = {n: line['step_s'] * line['runs'] for n, line in of.items()}
  sampling = None
  if {'copy', 'sampling'} <= seconds.keys():
    sampling = seconds['copy'] + denoising_steps * seconds['sampling']
  return sampling, seconds.get('fixed'), seconds.get('training')


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', default=RESULTS, help='file of lines')
  parser.add_argument('--page', action='store_true', help='rewrite the tables')
  for name, known in (
    ('configs', CONFIGS),
    ('topologies', list(TOPOLOGIES)),
    ('programs', list(PROGRAMS)),
  ):
    parser.add_argument(f'--{name}', nargs='+', choices=known, default=known)
  args = parser.parse_args()
  if args.page:
    found = json_lines.read(RESULTS)
    parts = {'memory': memory, 'rounds': rounds}
    part = lambda name: parts[name](found)
    PAGE.write_text(page_parts.fill(PAGE.read_text(), 'plans_rl', part))
    return
  done = lambda of: json_lines.has(args.out, of)
  for line in lines(args.configs, args.topologies, args.programs, done):
    json_lines.report([line], args.out)


if __name__ == '__main__':
  main()
