r"""Compares decoders that commit several tokens per forward pass.

python benchmarks/speculation.py --runs runs --out speculation.jsonl

--runs holds work directories with the names of METHODS in
configs/speculation.py: an autoregressive model, and networks that were trained
from it on equally many tokens. Each answers held-out prompts of the corpus and
of the copying task at temperature 0, with its decoders in decoders.py. All have
a KV cache: an exact one, except for masked diffusion.

Writes a line of JSON per decoder and task: tokens per forward pass, positions
per token, and a comparison of the answers with those of greedy decoding of the
autoregressive model. Tokens/s are a ratio to that decoder, which takes turns
with the others. Compilation is not timed. With --out, existing lines are not
measured again. benchmarks/speculation_page.py makes the tables and the plot of
docs/speculation.md.
"""

import argparse
import functools
import pathlib
from typing import NamedTuple

import jax
import json_lines  # files beside this one
import numpy as np
from decoders import BASE, GREEDY, METHODS, ONE, is_timed
from questions import SLOTS, TASKS
from timing import alternate

from maskdiff import config as config_lib
from maskdiff.interop import load
from maskdiff.library import forward
from maskdiff.sampling import layouts, sampler
from maskdiff.sampling.request import begin
from maskdiff.sampling.settings import sampler_config

CONTEXT = 128
BATCHES = {8: 1, 1: 2}  # rows -> batches whose decoding is timed
ROWS = max(BATCHES)  # rows of the batches whose answers are compared


def requests(questions, settings, rows):
  """Returns Requests of `rows` questions each, all of one shape."""
  found = []
  for i in range(0, len(questions), rows):
    some = questions[i : i + rows]
    canvas = [[*q.prompt, *[None] * len(q.answer)] for q in some]
    request = layouts.lay_out(canvas, settings=settings)
    found.append(layouts.widen(request, CONTEXT))
  return found


class Decoder(NamedTuple):
  """A network with the settings of its sampler."""

  network: object
  config: object  # SamplerConfig
  settings: object  # sampling.settings.Settings

  def decode(self, questions, rows):
    """Returns the last Carry of each batch of `rows` questions."""
    carries = []
    for request in requests(questions, self.settings, rows):
      carry, layout, shapes = begin(self.network, self.config, request)
      # The longest shape alone serves all rows, and compiles fastest.
      run = sampler.run(self.network, self.config, shapes[-1:], carry, layout)
      carries.append(run[0])
    return carries


def decoder(model, values):
  """Returns the Decoder of a Model for sampler settings."""
  values = {'temperature': 0.0, 'gen_length': SLOTS, **values}
  c, settings = sampler_config(config_lib.with_settings(model.config, values))
  return Decoder(model.network, c, settings)


class Answers(NamedTuple):
  """Answers to questions, and their cost."""

  tokens: list  # [number][n] int
  forwards: int  # sum over rows of forward passes
  positions: int  # sum over rows of positions that the passes computed


def answers(decoder, questions):
  """Returns the Answers of a decoder."""
  carries = decoder.decode(questions, ROWS)
  for carry in carries:
    sampler.check(carry)
  canvas, forwards, positions = (
    np.concatenate([jax.device_get(x) for x in xs])
    for xs in zip(
      *((c.canvas, c.forwards, c.positions) for c in carries), strict=True
    )
  )
  tokens = [
    row[len(q.prompt) :][: len(q.answer)].tolist()
    for row, q in zip(canvas, questions, strict=True)
  ]
  return Answers(tokens, int(forwards.sum()), int(positions.sum()))


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


def speeds(decoders, questions, rounds):
  """Returns tokens/s by decoder, relative to the first one, and its own.

  Args:
    decoders: dict from a name to a Decoder, which take turns.
    questions: list of Questions.
    rounds: number of turns.

  Returns:
    dict from a name to a dict with two values for each number of rows.
  """
  found = {name: {} for name in decoders}
  for rows, batches in BATCHES.items():
    timed = questions[:: len(questions) // (rows * batches)][: rows * batches]
    seconds = alternate(
      {
        name: functools.partial(of.decode, timed, rows)
        for name, of in decoders.items()
      },
      rounds,
    )
    base, *_ = seconds.values()
    number = sum(len(q.answer) for q in timed)
    for name, of in found.items():
      of[f'tokens_per_s_{rows}'] = round(number / seconds[name], 1)
      of[f'ratio_{rows}'] = round(base / seconds[name], 3)
  return found


def measure(base, model, decoders, questions, rounds):
  """Returns {name: part of a line} of the decoders of one network.

  Args:
    base: Model, autoregressive.
    model: Model.
    decoders: dict from a name to sampler settings.
    questions: list of Questions.
    rounds: number of timed turns.
  """
  with jax.set_mesh(model.mesh):
    first = decoder(base, GREEDY[ONE])
    greedy = answers(first, questions).tokens
    of = {name: decoder(model, values) for name, values in decoders.items()}
    found = {name: answers(x, questions) for name, x in of.items()}
    # Without one, the network is that of the base, with a drafter.
    one_per_step = found[ONE].tokens if ONE in found else greedy
    timed = {name: x for name, x in of.items() if is_timed(name)}
    speed = speeds({BASE: first} | timed, questions, rounds)
  return {
    name: quality(x, questions, base, greedy, one_per_step)
    | speed.get(name, {})
    for name, x in found.items()
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--runs', type=pathlib.Path, required=True)
  parser.add_argument('--out', type=pathlib.Path, help='file of JSON lines')
  parser.add_argument(
    '--methods', nargs='+', default=[*METHODS], choices=METHODS
  )
  parser.add_argument('--prompts', type=int, default=16)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  base = load.Model(*load.load(str(args.runs / BASE)))
  tasks = {name: make(base, args.prompts) for name, make in TASKS.items()}
  for method in args.methods:
    if not (args.runs / method).exists():
      print(f'{args.runs} has no work directory {method}')
      continue
    model = load.Model(*load.load(str(args.runs / method)))
    for task, questions in tasks.items():
      of = {'method': method, 'task': task}
      missing = {
        name: values
        for name, values in METHODS[method].decoders.items()
        if not (args.out and json_lines.has(args.out, of | {'decoder': name}))
      }
      if not missing:
        continue
      decoders = METHODS[method].decoders
      decoders = {k: v for k, v in decoders.items() if k in (ONE, *missing)}
      found = measure(base, model, decoders, questions, args.rounds)
      lines = [of | {'decoder': name} | found[name] for name in missing]
      json_lines.report(lines, args.out)


if __name__ == '__main__':
  main()
