r"""Trains small models on rewards with each method; answers held-out puzzles.

python benchmarks/policy_methods.py --runs runs/methods --out methods.jsonl

Countdown and sudoku begin with one model each, whose supervised training ended
early. For each method, the seconds of a round are measured, then the learning
rate is chosen by short trainings of seed 0, and then --seeds are trained. All
trainings of a task have the same budget of forward passes and the same budget
of seconds: they continue until both are spent. Each training appends a line to
--out as it ends; lines that exist are skipped, so the same command resumes.
Two processes, one for each of --tasks, fill one file in about two hours on two
cores.

policy_methods_page.py makes the tables and the plot of docs/policy_methods.md.
"""

import argparse
import math
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import json_lines  # files beside this one
from launching import launch

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS, GROUP, INNER = 4, 8, 2
ANSWERS = PROMPTS * GROUP
QUESTIONS = 200  # held out
EVALUATIONS = 6  # after the start
TIMED = 12  # rounds
RATES = 3e-4, 1e-4  # of Adam
LONG = 'wd1'  # also trained three times as long, at the lower rate


class Task(NamedTuple):
  """A task and its model.

  vocab_size, row_length: of configs/puzzles.py.
  start_steps, decay_steps: of the supervised training.
  prompt: tokens of a prompt.
  slots: of an answer; the last is for eos.
  remasking: of the sampler, which fills one slot per step at temperature 1.
  forwards: budget per training, forward passes of a row.
  seconds: budget per training.
  """

  vocab_size: int
  row_length: int
  start_steps: int
  decay_steps: int
  prompt: int
  slots: int
  remasking: str
  forwards: int
  seconds: float


TASKS = {
  'countdown': Task(
    293, 144, 4000, 1333, 15, 9, 'low_confidence', 110_000, 75.0
  ),
  'sudoku': Task(282, 136, 1000, 0, 18, 17, 'random', 110_000, 75.0),
}


class Method(NamedTuple):
  """A method of maskdiff/rl/table.py.

  settings: function of a Task; settings that differ from the published ones.
  copies: function of a Task; masked copies of an answer.
  reference: whether the loss has a divergence from the reference.
  """

  settings: Callable
  copies: Callable
  reference: bool = False


def constant(value):
  return lambda task: value


def merged(task):
  return math.ceil(task.slots / 8)  # TraceRL's shrink


METHODS = {
  'espo': Method(constant({}), constant(4), True),
  'd1': Method(constant({}), constant(1), True),
  'wd1': Method(constant({}), constant(1)),
  'spg': Method(lambda task: {'block_length': task.slots}, constant(2)),
  'coupled_grpo': Method(constant({}), constant(3), True),
  'tracerl': Method(lambda task: {'copies': merged(task)}, merged),
  'justgrpo': Method(
    lambda task: {'copies': task.slots}, lambda task: task.slots
  ),
}


def forwards_per_round(task, method):
  """Returns the forward passes of a round; a backward pass counts as two.

  The policy that sampled and the reference score the masks of all inner steps,
  without a reference those of all but the first.
  """
  fixed = 2 * INNER if method.reference else INNER - 1
  passes = fixed + 3 * INNER
  return ANSWERS * (task.slots + passes * method.copies(task))


def start(name, runs):
  """Returns the work directory of the model of a task, trained if missing."""
  task, workdir = TASKS[name], runs / f'start-{name}'
  lines, model = runs / f'{name}.jsonl', runs / f'{name}.model'
  rows = runs / f'{name}-rows'
  if not (workdir / 'done').exists():
    launch('tasks.py', '--task', name, '--num', 60_000, '--out', lines)
    subprocess.run(
      [sys.executable, ROOT / 'tokenizer' / 'train.py', '--input', lines]
      + ['--vocab_size', str(task.vocab_size), '--out', model],
      check=True,
    )
    launch(
      'prepare.py',
      *('--source', lines, '--tokenizer', model, '--out', rows),
      *('--row_length', task.row_length, '--workers', 1),
    )
    launch(
      'pretrain.py',
      *('--config', f'{ROOT / "configs" / "puzzles.py"}:{name}'),
      *('--workdir', workdir),
      f'--config.data.path={rows}',
      f'--config.data.tokenizer={model}',
      f'--config.train.steps={task.start_steps}',
      f'--config.optimizer.decay_steps={task.decay_steps}',
    )
    (workdir / 'done').touch()
  return workdir


def train(args, of, rounds, **changes):
  """Trains for a number of rounds, and returns the history.Run."""
  from maskdiff.monitoring import history

  name, method = of['task'], METHODS[of['method']]
  task, rate = TASKS[name], of.get('rate', RATES[0])
  workdir = args.runs / '-'.join(map(str, of.values()))
  values = {
    'init_from': start(name, args.runs),
    'seed': of.get('seed', 0),
    'policy.task': name,
    'policy.method': of['method'],
    'policy.settings': tuple(method.settings(task).items()),
    'policy.prompts': PROMPTS,
    'policy.group': GROUP,
    'policy.inner_steps': INNER,
    'data.length': task.prompt + task.slots,
    'train.steps': rounds * INNER,
    'train.log_every_steps': INNER,
    'optimizer.learning_rate': rate,
    'optimizer.final_learning_rate': rate,
    'eval.every_steps': math.ceil(rounds / EVALUATIONS) * INNER,
    'eval.answers': QUESTIONS,
    'checkpoint.every_steps': rounds * INNER,
    'sample.gen_length': task.slots,
    'sample.block_length': task.slots,
    'sample.steps': task.slots,
    'sample.remasking': task.remasking,
    'policy.eval_temperature': 1.0,
  }
  launch(
    'rl.py',
    *('--config', ROOT / 'configs' / 'rl_countdown.py', '--workdir', workdir),
    *(f'--config.{key}={value}' for key, value in (values | changes).items()),
  )
  run = history.read_run(str(workdir))
  assert f'{method.copies(task)} masked copies' in run.header
  return run


def seconds(args, of):
  """Returns the line with the seconds of a round: rollouts, and train steps."""
  from maskdiff.monitoring import ledger

  run = train(args, of, TIMED, **{'eval.answers': 0})
  lines = ledger.read_lines(f'{run.workdir}/ledger.jsonl').values
  rounds = [line['seconds'] for line in lines if 'step' in line][2:]
  median = lambda kind: statistics.median(x.get(kind, 0.0) for x in rounds)
  return of | {'rollout_s': median('rollout'), 'step_s': median('step')}


def result(args, of, rounds):
  """Returns the line of a training, with the share of right answers."""
  rows = train(args, of, rounds).rows
  trained = [r for r in rows if 'train/reward' in r][-10:]
  mean = lambda key: statistics.mean(r[key] for r in trained if key in r)
  counted = mean('train/sampling_forwards') + mean('train/training_forwards')
  task, method = TASKS[of['task']], METHODS[of['method']]
  backward = 2 * INNER * method.copies(task) * ANSWERS
  assert counted + backward == forwards_per_round(task, method)
  return of | {
    'rounds': rounds,
    'correct': [
      [r['step'] // INNER, r['eval/correct']]
      for r in rows
      if 'eval/correct' in r
    ],
    **{
      key: round(mean(f'train/{key}'), 5)
      for key in ('reward', 'constant_groups', 'sampled_nats_per_token')
    },
  }


def run(args):
  """Measures and trains what --out lacks; appends a line for each."""
  args.runs.mkdir(parents=True, exist_ok=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(args.runs / 'cache')
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

  def missing(**of):
    # Read again each time: another process may fill the same file.
    return not json_lines.has(args.out, of)

  for task in args.tasks:
    for method in args.methods:
      of = {'kind': 'seconds', 'task': task, 'method': method}
      if missing(**of):
        json_lines.report([seconds(args, of)], args.out)
    for rate in RATES:
      for method in args.methods:
        of = {'kind': 'rate', 'task': task, 'method': method, 'rate': rate}
        if missing(**of):
          rounds = num_rounds(json_lines.read(args.out), task, method)
          json_lines.report([result(args, of, rounds // 2)], args.out)
    for seed in args.seeds:
      for method in args.methods:
        of = {'kind': 'training', 'task': task, 'method': method, 'seed': seed}
        if missing(**of):
          lines = json_lines.read(args.out)
          of |= {'rate': best_rate(lines, task, method)}
          rounds = num_rounds(lines, task, method)
          json_lines.report([result(args, of, rounds)], args.out)
    for seed in args.seeds:
      of = {'kind': 'long', 'task': task, 'method': LONG, 'seed': seed}
      if LONG in args.methods and missing(**of):
        rounds = num_rounds(json_lines.read(args.out), task, LONG)
        of |= {'rate': RATES[-1]}
        json_lines.report([result(args, of, 3 * rounds)], args.out)


def select(lines, **of):
  """Returns the lines with some values."""
  return [line for line in lines if of.items() <= line.items()]


def budgets(lines, task, method):
  """Returns the rounds after which each budget is spent: (float, float)."""
  (timed,) = select(lines, kind='seconds', task=task, method=method)
  t = TASKS[task]
  by_forwards = t.forwards / forwards_per_round(t, METHODS[method])
  return by_forwards, t.seconds / (timed['rollout_s'] + timed['step_s'])


def num_rounds(lines, task, method):
  """Returns the rounds after which both budgets are spent."""
  return math.ceil(max(budgets(lines, task, method)))


def best_rate(lines, task, method):
  """Returns the learning rate with the most right answers of seed 0.

  A short training at each rate is evaluated at several rounds; the mean over
  the later half of them counts.
  """
  found = select(lines, kind='rate', task=task, method=method)
  later = lambda line: line['correct'][len(line['correct']) // 2 :]
  score = lambda line: statistics.mean(share for _, share in later(line))
  return max(found, key=score)['rate']


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--runs', type=pathlib.Path, required=True)
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--tasks', nargs='+', choices=TASKS, default=[*TASKS])
  parser.add_argument(
    '--methods', nargs='+', choices=METHODS, default=[*METHODS]
  )
  parser.add_argument('--seeds', nargs='+', type=int, default=[1, 2, 3])
  run(parser.parse_args())


if __name__ == '__main__':
  main()
