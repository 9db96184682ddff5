r"""Compares training recipes on equal tokens, by their exact held-out bound.

python benchmarks/recipes.py --out recipes.jsonl --runs runs/recipes
python benchmarks/recipes.py --out recipes.jsonl --runs runs/recipes \
  --recipes uniform bell --seeds 0 1 2 --data rows/english
python benchmarks/recipes_page.py recipes.jsonl

Trains each recipe of RECIPES with each seed, and appends a line to --out as
each training ends. Lines that exist are skipped, so the same command resumes.
`--set KEY=VALUE` changes the config of every training. english_corpus.py makes
the English corpus, and recipes_page.py the tables.
"""

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys
import time

import json_lines  # the file beside this one

ROOT = pathlib.Path(__file__).parents[1]
# LLaDA's recipe, whatever the defaults of a config are.
BASE = {
  'objective.time_density': 'uniform',
  'objective.bell_width': 0.12,
  'objective.bell_mean': 0.5,
  'objective.bell_uniform_share': 0.0,
  'objective.time_interval': (0.0, 1.0),
  'objective.weight': 'bound',
  'objective.uniform_after': 1.0,
  'optimizer.name': 'adamw',
  'model.zero_outputs': False,
  'model.qk_norm': False,
}
BELL = BASE | {'objective.time_density': 'bell'}
PLAIN = {'objective.weight': 'power', 'objective.weight_power': 0.0}
MUON = {'optimizer.name': 'muon'}
ZERO = {'model.zero_outputs': True}
# The first recipe is the baseline.
RECIPES = {
  'uniform': BASE,
  'bell': BELL,
  'muon': BASE | MUON,
  'bell_muon': BELL | MUON,
  'bell_muon_zero': BELL | MUON | ZERO,
  'bell_muon_zero_then_uniform': BELL
  | MUON
  | ZERO
  | {'objective.uniform_after': 0.75},
  'bell_0.2': BELL | {'objective.bell_width': 0.2},
  'bell_0.08': BELL | {'objective.bell_width': 0.08},
  'bell_mean_0.4': BELL | {'objective.bell_mean': 0.4},
  'bell_mean_0.6': BELL | {'objective.bell_mean': 0.6},
  'bell_then_uniform': BELL | {'objective.uniform_after': 0.75},
  'bell_importance': BELL
  | {
    'objective.bell_width': 0.2,
    'objective.bell_uniform_share': 0.1,
    'objective.weight': 'importance',
  },
  'bell_plain': BELL | PLAIN,
  'plain': BASE | PLAIN,
  'clipped': BASE | {'objective.time_interval': (0.3, 0.7)},
  'zero': BASE | ZERO,
  'qk_norm': BASE | {'model.qk_norm': True},
}
LOSS = 'eval/loss_nats_per_token'


def run(args):
  """Trains the recipes that --out lacks, and appends a line for each."""
  changes = dict(pair.partition('=')[::2] for pair in args.set)
  for key, value in changes.items():
    if not value or key in BASE:
      sys.exit(f'--set {key}: give KEY=VALUE, with a key that no recipe sets')
  for seed in args.seeds:
    for recipe in args.recipes:
      of = {
        'config': pathlib.Path(args.config).stem,
        'set': args.set,
        'corpus': pathlib.Path(args.data).name if args.data else 'embedded',
        'recipe': recipe,
        'settings': RECIPES[recipe],
        'seed': seed,
      }
      of = json.loads(json.dumps(of))  # as it will be read
      # Read again each time: another process may fill the same file.
      if json_lines.has(args.out, of):
        continue
      digest = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:8]
      name = f'{of["config"]}-{of["corpus"]}-{recipe}-{seed}-{digest}'
      values = changes | {'seed': seed} | RECIPES[recipe]
      if args.data:
        values |= {'data.path': args.data, 'data.tokenizer': args.data}
      line = of | train(args.config, args.runs / name, values)
      with open(args.out, 'a') as f:
        f.write(json.dumps(line) + '\n')
      print(f'{name}: {line["evaluations"][-1]}')


def train(config, workdir, values):
  """Trains, and returns the evaluations of the run and their cost."""
  began = time.monotonic()
  done = subprocess.run(
    [
      *(sys.executable, ROOT / 'launch/pretrain.py'),
      *('--config', config, '--workdir', workdir),
      *(f'--config.{key}={value}' for key, value in values.items()),
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  if done.returncode:
    sys.exit(f'{workdir}: {done.stderr[-2000:]}')
  return {'seconds': round(time.monotonic() - began, 1), **result(workdir)}


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
  tokens = config.train.batch * c.length
  flops = flops_per_token(c.objective, c.model, c.length)
  return {
    'tokens_per_step': tokens,
    'flops_per_token': flops + optimizer_flops(config) / tokens,
    'unigram_entropy': data.manifest.splits['heldout'].unigram_entropy_nats,
    'evaluations': [[r['step'], r[LOSS]] for r in rows if LOSS in r],
    'heldout_batches': losses,
  }


def optimizer_flops(config):
  """Returns the FLOPs of Muon's matrix products in a step; 0 for AdamW."""
  from maskdiff.model import transformer
  from maskdiff.training import muon, step

  if config.optimizer.name != 'muon':
    return 0
  model = step.step_config(config).model
  return muon.iteration_flops(
    transformer.shapes(model), transformer.axes(model)
  )


def read(path):
  """Returns the lines of a results file; [] if it does not exist."""
  path = pathlib.Path(path)
  return json_lines.read(path) if path.exists() else []


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--out', required=True, help='file of JSON lines')
  parser.add_argument('--runs', type=pathlib.Path, required=True)
  parser.add_argument('--config', default=str(ROOT / 'configs/tiny.py'))
  parser.add_argument('--data', help='prepared rows; default: embedded corpus')
  parser.add_argument(
    '--recipes', nargs='+', default=[*RECIPES], choices=RECIPES, metavar='NAME'
  )
  parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
  parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE')
  run(parser.parse_args())
