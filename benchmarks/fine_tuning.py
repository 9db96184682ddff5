r"""Fine-tunes the tiny run on two puzzles, and makes a table of exact match.

python benchmarks/fine_tuning.py --init_from runs/tiny --runs runs/puzzles \
  --out fine_tuning.jsonl

Each puzzle is a question of the user, and its solution the answer. Preparation
splits by question, so no held-out question is trained on. A training appends a
line to --out as it ends; lines that exist are skipped, so the same command
resumes. --tasks, --objectives and --seeds choose among the trainings.

python benchmarks/fine_tuning.py --page

rewrites the table of docs/fine_tuning.md from benchmarks/results/.
"""

import argparse
import pathlib
import statistics

import json_lines  # files beside this one
import page_parts
from launching import launch

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'fine_tuning.jsonl'
PAGE = ROOT / 'docs' / 'fine_tuning.md'
NUM = 100_000  # puzzles
# Name in the table, flags of launch/puzzles.py, tokens per row and per block.
# A conversation with a sudoku has 44 tokens; 16 of them are the answer.
TASKS = {
  'addition': ('3-digit addition', ('--digits', '3'), 128, 4),
  'sudoku': ('4x4 sudoku', (), 132, 11),
}
OBJECTIVES = {
  'masked_diffusion': 'masked diffusion',
  'block_diffusion': 'block diffusion, blocks of {}',
}
STEPS = 600
QUESTIONS = 300
EXACT_MATCH, BOUND = 'eval/exact_match', 'eval/loss_nats_per_token'


def prepare(task, runs):
  """Returns the directory of the rows of a puzzle, made if it is missing."""
  rows, lines = runs / task, runs / f'{task}.jsonl'
  _, flags, length, _ = TASKS[task]
  if not rows.exists():
    launch('puzzles.py', '--task', task, *flags, '--num', NUM, '--out', lines)
    launch(
      'prepare.py',
      *('--source', lines, '--chat', 'plain', '--out', rows),
      *('--tokenizer', ROOT / 'tokenizer' / 'stdlib_4k.model'),
      *('--row_length', length, '--align', 4, '--workers', 1),
      *('--heldout_fraction', 0.01),
    )
  return rows


def train(args, task, objective, seed):
  """Trains, and returns the results of the run."""
  from maskdiff.monitoring import history

  workdir = args.runs / f'{task}-{objective}-{seed}'
  values = {
    'init_from': args.init_from,
    'data.path': prepare(task, args.runs),
    'seed': seed,
    'train.steps': STEPS,
    'optimizer.decay_steps': STEPS // 3,
    'eval.every_steps': STEPS // 2,
    'eval.batch': 64,
    'eval.batches': 3,
    'eval.answers': QUESTIONS,
    'objective.name': objective,
    'objective.block_length': TASKS[task][-1],
    # Of no effect here, but these must fit the blocks.
    'sample.gen_length': 44,
    'sample.steps': 44,
  }
  launch(
    'finetune.py',
    *('--config', ROOT / 'configs' / 'sft_tiny.py', '--workdir', workdir),
    *(f'--config.{key}={value}' for key, value in values.items()),
  )
  rows = [r for r in history.read_run(str(workdir)).rows if EXACT_MATCH in r]
  return {
    'questions': QUESTIONS,
    'exact_match': [[r['step'], r[EXACT_MATCH]] for r in rows],
    'nats_per_answer_token': rows[-1][BOUND],
  }


def run(args):
  """Trains what --out lacks, and appends a line for each training."""
  args.runs.mkdir(parents=True, exist_ok=True)
  for seed in args.seeds:
    for task in args.tasks:
      for objective in args.objectives:
        of = {'task': task, 'objective': objective, 'seed': seed}
        # Read again each time: another process may fill the same file.
        if not json_lines.has(args.out, of):
          line = of | train(args, task, objective, seed)
          json_lines.report([line], args.out)


def table(lines):
  """Returns the Markdown table of the results."""
  rows = [['puzzle', 'objective', 'exact match, by seed', 'mean']]
  for task, (name, _, _, block_length) in TASKS.items():
    for objective, described in OBJECTIVES.items():
      shares = [
        line['exact_match'][-1][1]
        for line in sorted(lines, key=lambda x: x['seed'])
        if (line['task'], line['objective']) == (task, objective)
      ]
      cells = ', '.join(f'{share:.1%}' for share in shares)
      mean = statistics.mean(shares)
      described = described.format(block_length)
      rows.append([name, described, cells, f'{mean:.1%}'])
  return page_parts.table(rows)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--init_from', default='runs/tiny')
  parser.add_argument('--runs', type=pathlib.Path)
  parser.add_argument('--out', type=pathlib.Path)
  parser.add_argument('--tasks', nargs='+', choices=TASKS, default=[*TASKS])
  parser.add_argument(
    '--objectives', nargs='+', choices=OBJECTIVES, default=[*OBJECTIVES]
  )
  parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
  parser.add_argument('--page', action='store_true')
  args = parser.parse_args()
  if args.page:
    lines = json_lines.read(RESULTS)
    text, part = PAGE.read_text(), lambda name: table(lines)
    PAGE.write_text(page_parts.fill(text, 'fine_tuning', part))
  elif args.runs and args.out:
    run(args)
  else:
    parser.error('give --runs and --out, or --page')


if __name__ == '__main__':
  main()
