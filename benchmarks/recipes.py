r"""Compares training recipes on equal tokens, by their exact held-out bound.

python benchmarks/recipes.py run --out recipes.jsonl --runs runs/recipes
python benchmarks/recipes.py run --out recipes.jsonl --runs runs/recipes \
  --recipes uniform bell_0.12 --seeds 0 1 2 --data rows/english
python benchmarks/recipes.py table recipes.jsonl

`run` trains each recipe of RECIPES with each seed, and appends a line to --out
as each training ends. Lines that exist are skipped, so the same command
resumes. `--set KEY=VALUE` changes the config of every training of a file, so
another --set needs another --out and other --runs.

`table` prints, for each config and corpus: the final bound; its difference from
the first recipe, with a paired standard error (the same held-out rows under the
same masks); the share of the tokens after which a recipe reached the final
bound of the first one; and FLOPs and time relative to it.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
BELL = {'objective.time_density': 'bell'}
PLAIN = {'objective.weight': 'power', 'objective.weight_power': 0.0}
# The first recipe is the baseline.
RECIPES = {
  'uniform': {},
  'bell_0.2': BELL | {'objective.bell_width': 0.2},
  'bell_0.12': BELL | {'objective.bell_width': 0.12},
  'bell_0.08': BELL | {'objective.bell_width': 0.08},
  'bell_0.12_mean_0.4': BELL | {'objective.bell_mean': 0.4},
  'bell_0.12_mean_0.6': BELL | {'objective.bell_mean': 0.6},
  'bell_0.12_then_uniform': BELL | {'objective.uniform_after': 0.75},
  'bell_0.2_importance': BELL
  | {
    'objective.bell_width': 0.2,
    'objective.bell_uniform_share': 0.1,
    'objective.weight': 'importance',
  },
  'bell_0.12_plain': BELL | PLAIN,
  'plain': PLAIN,
  'clipped': {'objective.time_interval': '(0.3, 0.7)'},
}
LOSS = 'eval/loss_nats_per_token'


def run(args):
  """Trains the recipes that --out lacks, and appends a line for each."""
  lines = read(args.out)
  if any(line['set'] != args.set for line in lines):
    sys.exit(
      f'{args.out} has trainings with another --set: choose another file'
    )
  done = [
    (line['config'], line['corpus'], line['recipe'], line['seed'])
    for line in lines
  ]
  corpus = pathlib.Path(args.data).name if args.data else 'embedded'
  for seed in args.seeds:
    for recipe in args.recipes:
      name = pathlib.Path(args.config).stem
      if (name, corpus, recipe, seed) in done:
        continue
      workdir = args.runs / f'{name}-{corpus}-{recipe}-{seed}'
      values = RECIPES[recipe] | {'seed': seed}
      values |= dict(pair.split('=', 1) for pair in args.set)
      if args.data:
        values['data.path'] = args.data
      began = time.monotonic()
      subprocess.run(
        [
          *(sys.executable, ROOT / 'launch/pretrain.py'),
          *('--config', args.config, '--workdir', workdir),
          *(f'--config.{key}={value}' for key, value in values.items()),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
      )
      line = {
        'config': name,
        'corpus': corpus,
        'recipe': recipe,
        'seed': seed,
        'set': args.set,
        'seconds': round(time.monotonic() - began, 1),
        **result(workdir),
      }
      with open(args.out, 'a') as f:
        f.write(json.dumps(line) + '\n')
      print(f'{corpus} {recipe} seed {seed}: {line["evaluations"][-1]}')


def result(workdir):
  """Returns the evaluations of a run, and its loss on each held-out batch."""
  import jax

  from maskdiff.interop import load
  from maskdiff.monitoring import history
  from maskdiff.objectives.table import flops_per_token
  from maskdiff.training import evaluation, inputs, step

  config, tokenizer, params, mesh = load.load(str(workdir))
  c = step.step_config(config)
  (data,) = inputs.open_data(config, tokenizer)
  batches = list(inputs.heldout_batches(config, data, mesh))
  keys = jax.random.split(jax.random.key(0), len(batches))
  fixed = evaluation.eval_config(c)
  with jax.set_mesh(mesh):
    losses = [
      float(evaluation.jit_eval_step(fixed, params, rows, key).loss)
      for rows, key in zip(batches, keys, strict=True)
    ]
  rows = history.read_run(str(workdir)).rows
  return {
    'tokens_per_step': config.train.batch * c.length,
    'flops_per_token': flops_per_token(c.objective.name, c.model, c.length),
    'evaluations': [[r['step'], r[LOSS]] for r in rows if LOSS in r],
    'heldout_batches': losses,
  }


def read(path):
  """Returns the lines of a results file; [] if it does not exist."""
  path = pathlib.Path(path)
  return (
    [json.loads(line) for line in path.read_text().splitlines()]
    if path.exists()
    else []
  )


def tokens_to_reach(evaluations, target):
  """Returns the step at which a bound was reached, or None.

  The bound is interpolated linearly between two evaluations.
  """
  for (s0, l0), (s1, l1) in zip(evaluations, evaluations[1:], strict=False):
    if l1 <= target <= l0:
      return s0 + (s1 - s0) * (l0 - target) / (l0 - l1)
  return None


def table(lines):
  """Returns rows of text, the first for the heads of the columns."""
  rows = [('recipe', 'seeds', 'bound', 'difference', 'tokens', 'FLOPs', 'time')]
  base = {x['seed']: x for x in lines if x['recipe'] == next(iter(RECIPES))}
  for recipe in RECIPES:
    of = {x['seed']: x for x in lines if x['recipe'] == recipe}
    seeds = sorted(of.keys() & base.keys())
    if not seeds:
      continue
    final = np.mean([of[s]['evaluations'][-1][1] for s in seeds])
    paired = np.concatenate(
      [
        np.subtract(of[s]['heldout_batches'], base[s]['heldout_batches'])
        for s in seeds
      ]
    )
    error = paired.std(ddof=1) / len(paired) ** 0.5
    shares, cost = [], []
    for s in seeds:
      last, target = base[s]['evaluations'][-1]
      reached = tokens_to_reach(of[s]['evaluations'], target)
      shares.append(np.inf if reached is None else reached / last)
      cost.append(
        (
          of[s]['flops_per_token'] / base[s]['flops_per_token'],
          of[s]['seconds'] / base[s]['seconds'],
        )
      )
    flops, seconds = np.mean(cost, axis=0)
    share = np.mean(shares)
    rows.append(
      (
        recipe,
        str(len(seeds)),
        f'{final:.3f}',
        f'{paired.mean():+.3f} ± {error:.3f}',
        f'{share:.2f}' if np.isfinite(share) else 'not reached',
        f'{flops:.2f}',
        f'{seconds:.2f}',
      )
    )
  return rows


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parts = parser.add_subparsers(dest='part', required=True)
  trains = parts.add_parser('run')
  trains.add_argument('--out', required=True, help='file of JSON lines')
  trains.add_argument('--runs', type=pathlib.Path, required=True)
  trains.add_argument('--config', default=str(ROOT / 'configs/tiny.py'))
  trains.add_argument('--data', help='prepared rows; default: embedded corpus')
  trains.add_argument('--recipes', nargs='+', default=[*RECIPES])
  trains.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
  trains.add_argument('--set', action='append', default=[], metavar='KEY=VALUE')
  parts.add_parser('table').add_argument('results')
  args = parser.parse_args()
  if args.part == 'run':
    run(args)
    return
  from maskdiff.monitoring import terminal

  lines = read(args.results)
  for key in sorted({(x['config'], x['corpus']) for x in lines}):
    print(f'{key[0]}, {key[1]} corpus')
    of = [x for x in lines if (x['config'], x['corpus']) == key]
    print(terminal.table(table(of)), end='\n\n')


if __name__ == '__main__':
  main()
