r"""Compares decoders that commit several tokens per forward pass.

python benchmarks/speculation.py --runs runs --out speculation.jsonl

--runs holds work directories with the names of METHODS in
configs/speculation.py: an autoregressive model, and networks that were trained
from it. Each answers held-out prompts of the corpus and of the copying task at
temperature 0, with its decoders in decoders.py. All have a KV cache: an exact
one, except for masked diffusion.

Writes lines of JSON. The lines of `answers` have tokens per forward pass,
positions per token, and a comparison with greedy decoding of the autoregressive
model. The lines of `speed` have tokens/s, and their ratio to that decoder, for
batches of 1 and 8 rows: all decoders take turns in one run. Compilation is not
timed. The lines of `losses` have the held-out loss of windows, by position.
Existing lines are not measured again. benchmarks/speculation_page.py makes the
tables and the plot of docs/speculation.md.
"""

import argparse
import functools
import itertools
import pathlib

import jax
import json_lines  # files beside this one
import numpy as np
from decoders import BASE, GREEDY, METHODS, ONE, is_timed
from decoding import answers, decoder
from questions import TASKS
from timing import alternate

from maskdiff.interop import load
from maskdiff.library import forward
from maskdiff.monitoring import history

BATCHES = {8: 1, 1: 2}  # rows -> batches whose decoding is timed
ROWS = max(BATCHES)  # rows of the batches whose answers are compared
PARTS = 'answers', 'losses', 'speed'


def equal(answers, others):
  """Returns the shares of tokens and of answers equal to other answers.

  Args:
    answers: list of token lists.
    others: list of token lists of the same lengths.
  """
  same = [np.equal(a, b) for a, b in zip(answers, others, strict=True)]
  return np.concatenate(same).mean(), np.mean([x.all() for x in same])


def judge(model, questions, answers):
  """Judges answers by an autoregressive model.

  Args:
    model: Model.
    questions: list of Questions.
    answers: list of token lists.

  Returns:
    - share of tokens that are the most probable one after prompt and answer so
      far, as all tokens of greedy decoding are.
    - nll per token, in nats.
  """
  is_first, nll = [], []
  for i in range(0, len(questions), ROWS):
    some = questions[i : i + ROWS], answers[i : i + ROWS]
    rows = [[*q.prompt, *tokens] for q, tokens in zip(*some, strict=True)]
    logits = np.asarray(forward.logits(model, rows))
    log_z = np.asarray(jax.nn.logsumexp(logits, axis=-1))
    for j, (question, tokens) in enumerate(zip(*some, strict=True)):
      at = len(question.prompt) + np.arange(len(tokens))
      chosen = logits[j, at, tokens]
      is_first.append(chosen == logits[j, at].max(axis=-1))
      nll.append(log_z[j, at] - chosen)
  return np.concatenate(is_first).mean(), np.concatenate(nll).mean()


def quality(found, questions, base, greedy, one_per_step):
  """Returns the part of a line that the answers determine.

  Args:
    found: Answers of the decoder.
    questions: list of Questions.
    base: Model, autoregressive.
    greedy: answers of its greedy decoding, a list of token lists.
    one_per_step: answers of the same network, one token per step.
  """
  number = sum(map(len, found.tokens))
  equal_tokens, equal_answers = equal(found.tokens, greedy)
  most_probable, nll = judge(base, questions, found.tokens)
  values = {
    'tokens_per_pass': number / found.forwards,
    'positions_per_token': found.positions / number,
    'equal_tokens': equal_tokens,
    'equal_answers': equal_answers,
    'equal_one_per_step': equal(found.tokens, one_per_step)[1],
    'exact_match': equal(found.tokens, [q.answer for q in questions])[1],
    'most_probable': most_probable,
    'nll': nll,
  }
  return {name: round(float(x), 4) for name, x in values.items()}


def measure_answers(base, model, decoders, questions):
  """Returns {name: values of a line} of the decoders of one network.

  Args:
    base: Model, autoregressive.
    model: Model.
    decoders: dict from a name to sampler settings.
    questions: list of Questions.
  """
  with jax.set_mesh(model.mesh):
    greedy = answers(decoder(base, GREEDY[ONE]), questions, ROWS).tokens
    found = {
      name: answers(decoder(model, values), questions, ROWS)
      for name, values in decoders.items()
    }
  # Without one, the network is that of the base, with a drafter.
  one_per_step = found[ONE].tokens if ONE in found else greedy
  return {
    name: quality(x, questions, base, greedy, one_per_step)
    for name, x in found.items()
  }


def measure_speed(base, decoders, questions, rows, rounds):
  """Returns {key: values of a line} of decoders that take turns.

  Args:
    base: Decoder, to which the speeds are relative.
    decoders: dict from a key to a Decoder.
    questions: list of Questions.
    rows: questions per batch.
    rounds: number of turns.
  """
  number = rows * BATCHES[rows]
  timed = questions[:: max(1, len(questions) // number)][:number]
  functions = {
    key: functools.partial(of.decode, timed, rows)
    for key, of in {None: base, **decoders}.items()
  }
  seconds = alternate(functions, rounds)
  tokens = sum(len(q.answer) for q in timed)
  return {
    key: {
      'tokens_per_s': round(tokens / seconds[key], 1),
      'ratio': round(seconds[None] / seconds[key], 3),
    }
    for key in decoders
  }


def write_answers(models, tasks, out):
  """Measures and writes the lines of answers that a file lacks."""
  for method, model in models.items():
    for task, questions in tasks.items():
      of = {'method': method, 'task': task}
      decoders = METHODS[method].decoders
      missing = [
        name
        for name in decoders
        if not json_lines.has(out, of | {'decoder': name, 'part': 'answers'})
      ]
      if not missing:
        continue
      decoders = {k: v for k, v in decoders.items() if k in (ONE, *missing)}
      found = measure_answers(models[BASE], model, decoders, questions)
      lines = [
        of | {'decoder': name, 'part': 'answers'} | found[name]
        for name in missing
      ]
      json_lines.report(lines, out)


def write_losses(runs, models, out):
  """Writes the last held-out losses by position in the window, from metrics."""
  for method in models:
    of = {'method': method, 'part': 'losses'}
    if json_lines.has(out, of):
      continue
    last = {}
    for row in history.read_run(str(runs / method)).rows:
      last |= {k: x for k, x in row.items() if history.WINDOW_POSITION in k}
    by_task = {'corpus': {}, 'copying': {}}
    for key, nll in last.items():
      data, _, position = key.partition(history.WINDOW_POSITION)
      if data.startswith('eval/'):
        task = 'corpus' if data == 'eval/embedded' else 'copying'
        by_task[task][position] = round(nll, 4)
    lines = [
      of | {'task': task, 'nll': nll} for task, nll in by_task.items() if nll
    ]
    json_lines.report(lines, out)


def write_speed(models, tasks, rounds, out):
  """Measures and writes the lines of speed that a file lacks.

  All decoders that lack a line take turns with the base.
  """
  for (task, questions), rows in itertools.product(tasks.items(), BATCHES):
    decoders = {}
    for method, model in models.items():
      for name, values in METHODS[method].decoders.items():
        of = {'method': method, 'task': task, 'decoder': name}
        of |= {'part': 'speed', 'rows': rows}
        if is_timed(name) and not json_lines.has(out, of):
          decoders[tuple(of.items())] = decoder(model, values)
    with jax.set_mesh(models[BASE].mesh):
      base = decoder(models[BASE], GREEDY[ONE])
      found = measure_speed(base, decoders, questions, rows, rounds)
    json_lines.report([dict(of) | x for of, x in found.items()], out)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--runs', type=pathlib.Path, required=True)
  parser.add_argument(
    '--out', type=pathlib.Path, required=True, help='file of JSON lines'
  )
  parser.add_argument(
    '--methods', nargs='+', default=[*METHODS], choices=METHODS
  )
  parser.add_argument('--parts', nargs='+', default=PARTS, choices=PARTS)
  parser.add_argument('--prompts', type=int, default=16)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  models = {}
  for method in dict.fromkeys([BASE, *args.methods]):
    if (args.runs / method).exists():
      models[method] = load.Model(*load.load(str(args.runs / method)))
    else:
      print(f'{args.runs} has no work directory {method}')
  tasks = {
    name: make(models[BASE], args.prompts) for name, make in TASKS.items()
  }
  if 'answers' in args.parts:
    write_answers(models, tasks, args.out)
  if 'losses' in args.parts:
    write_losses(args.runs, models, args.out)
  if 'speed' in args.parts:
    write_speed(models, tasks, args.rounds, args.out)


if __name__ == '__main__':
  main()
