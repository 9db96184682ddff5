"""Compares autoregressive, block and masked diffusion networks on one puzzle.

python benchmarks/equal_quality.py sudoku autoregressive=runs/ar \
  blocks_4=runs/blocks_4 masked=runs/masked --out equal_quality.jsonl

The networks differ in their objective only: the same data, tokens, size and
recipe. Each answers the same held-out puzzles with one token per denoising
step, and with several thresholds of the confidence, which commit more tokens
per step. An autoregressive network always takes the next token. The answers of
autoregressive and block networks have an exact KV cache, those of masked
diffusion have none.

Writes a line of JSON per setting with the accuracy, the forward passes per
token and tokens/s. Compilation is not timed. benchmarks/throughput_page.py
makes the table of docs/block_diffusion.md.
"""

import argparse
import functools
import pathlib
import time

import json_lines  # the file beside this one

from maskdiff.evals import answered, puzzles
from maskdiff.interop import load
from maskdiff.objectives.table import OBJECTIVES

THRESHOLDS = (0.5, 0.7, 0.9, 0.99)


def settings(network, slots):
  """Returns dict: name of a setting -> dict of sampler settings."""
  objective = OBJECTIVES[network.objective]
  if objective.left_to_right:
    return {'one per step': {'block_length': 1, 'cache': 'prefix'}}
  common = {
    'block_length': network.block_length if objective.by_blocks else slots,
    'cache': 'prefix' if objective.exact_cache else 'none',
  }
  return {'one per step': common} | {
    f'threshold {x}': common | {'remasking': 'threshold', 'threshold': x}
    for x in THRESHOLDS
  }


def measure(task, name, workdir, num):
  """Returns the lines of one network."""
  model = load.Model(*load.load(workdir))
  lines = puzzles.make(task, 0, num)
  slots = len(model.tokenizer.encode(lines[0]['answer'])) + 1
  found = []
  for setting, values in settings(model.network, slots).items():
    answer = lambda values=values: answered.answer_lines(
      model,
      {'temperature': 0.0, **values},
      lines,
      functools.partial(puzzles.correct, task),
      seed=0,
      batch=num,
    )
    answer()  # compiles
    began = time.perf_counter()
    _, total = answer()
    seconds = time.perf_counter() - began
    found.append(
      {
        'task': task,
        'network': name,
        'setting': setting,
        'accuracy': total['accuracy'],
        'stderr_accuracy': total['stderr_accuracy'],
        'forwards_per_token': round(total['forwards_per_token'], 4),
        'tokens_per_s': round(num * slots / seconds, 1),
      }
    )
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('task', choices=('addition', 'sudoku', 'countdown'))
  parser.add_argument('runs', nargs='+', metavar='NAME=WORKDIR')
  parser.add_argument('--num', type=int, default=200, help='puzzles')
  parser.add_argument('--out', type=pathlib.Path, help='file of JSON lines')
  args = parser.parse_args()
  for name, workdir in (text.split('=', 1) for text in args.runs):
    json_lines.report(measure(args.task, name, workdir, args.num), args.out)


if __name__ == '__main__':
  main()
