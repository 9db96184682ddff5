"""Answers of a fine-tuned model at several lengths, given and predicted.

python benchmarks/lengths.py sft=runs/sft named=runs/named --out lengths.jsonl

Asks questions of the instruction set that are not in its conversations for
training (launch/instructions.py --heldout). Every answer gets the same number
of slots (--gen_lengths), as in table 10 of LLaDA (arXiv 2502.09992); a network
that was fine-tuned on rows with lengths (launch/prepare.py --length_buckets)
also predicts the number. Given one of its own lengths, such a network gets the
token of the length too, as in training.

Each answer stops at eos, with one token per denoising step unless --sample sets
another rule. Writes a line of JSON per network and length, and prints a table:

  exact_match          share of answers that are right, and its standard error
  answer_tokens        mean number of tokens of an answer
  length_error         mean difference between the numbers of tokens of the
                       answer and of the right answer, without eos
  forwards_per_answer  forward passes, with that of the prediction
"""

import argparse
import functools
import pathlib
import sys

import json_lines  # the file beside this one
import numpy as np

from maskdiff.config.settings import parse_pairs, with_settings
from maskdiff.errors import UserError
from maskdiff.evals import answered, instructions
from maskdiff.interop import load
from maskdiff.sampling import layouts
from maskdiff.sampling.serve import RowRequest
from maskdiff.sampling.settings import sampler_config
from maskdiff.serving.chat_prompts import open_chat

PREDICTED = 'predicted'


def requests(model, prompts, length, values, batch):
  """Returns the SamplerConfig, the requests, and passes that were needed.

  Args:
    model: Model.
    prompts: list of token lists.
    length: number of slots; or PREDICTED.
    values: dict of sampler settings.
    batch: number of rows computed together.
  """
  known = dict(model.config.data.length_tokens)
  context = model.config.data.length
  slots = min(max(known), context) if length == PREDICTED else length
  values = {'stop_at_eos': True} | values | {'gen_length': slots}
  config = with_settings(model.config, values)
  values = {key: config.sample[key] for key in values}  # numbers, not texts
  c, settings = sampler_config(config)
  if length == PREDICTED:
    found, predicted = answered.with_lengths(model, c, values, prompts, batch)
    return c, found, sum(x.forwards for x in predicted)
  name = [known[length]] if length in known else []
  rows = [layouts.prompt_row([*prompt, *name], length) for prompt in prompts]
  return c, [RowRequest(i, row, i, settings) for i, row in enumerate(rows)], 0


def measure(model, chat, questions, length, values, batch):
  """Returns the line of one length.

  Args:
    model: Model.
    chat: serving.asked.Chat of the model.
    questions: list of dicts with the texts `prompt` and `answer`.
    length: as for `requests`, and the next two arguments.
    values: see `requests`.
    batch: see `requests`.
  """
  ask = lambda x: chat.encode([{'role': 'user', 'content': x['prompt']}])
  prompts = [ask(x) for x in questions]
  c, rows, forwards = requests(model, prompts, length, values, batch)
  found = answered.complete(model, c, rows, batch)
  right, sizes, errors = [], [], []
  for tokens, question in zip(found.tokens, questions, strict=True):
    end = next((i for i, t in enumerate(tokens) if t in chat.end_ids), None)
    tokens = tokens[:end]
    expected = model.tokenizer.encode(question['answer'])
    right.append(model.tokenizer.decode(tokens) == question['answer'])
    sizes.append(len(tokens))
    errors.append(abs(len(tokens) - len(expected)))
  share, num = float(np.mean(right)), len(right)
  return {
    'length': length,
    'answers': num,
    'exact_match': share,
    'stderr_exact_match': (share * (1 - share) / num) ** 0.5,
    'answer_tokens': float(np.mean(sizes)),
    'length_error': float(np.mean(errors)),
    'forwards_per_answer': (found.forwards + forwards) / num,
  }


def table(lines):
  """Returns lines as a Markdown table."""
  out = [
    '| network | slots | exact match | tokens of an answer '
    '| error of the length | forward passes per answer |',
    '|---|---|---|---|---|---|',
  ]
  for x in lines:
    out.append(
      f'| {x["network"]} | {x["length"]} '
      f'| {x["exact_match"]:.1%} ± {x["stderr_exact_match"]:.1%} '
      f'| {x["answer_tokens"]:.1f} | {x["length_error"]:.2f} '
      f'| {x["forwards_per_answer"]:.1f} |'
    )
  return '\n'.join(out)


def of_network(name, workdir, args):
  """Yields the lines of a network."""
  model = load.Model(*load.load(workdir))
  chat = open_chat(args.chat_template, None, workdir, model.tokenizer)
  if chat is None:
    raise UserError(f'{workdir} has no chat template: set --chat_template')
  questions = instructions.questions(args.seed, args.num, True, args.tasks)
  measured = functools.partial(
    measure, model, chat, questions, values=args.sample, batch=args.batch
  )
  predicts = [PREDICTED] if model.config.data.length_tokens else []
  for length in [*args.gen_lengths, *predicts]:
    try:
      yield {'network': name} | measured(length)
    except UserError as error:  # such as a row longer than those of training
      print(f'{name}, {length} slots: {error}', file=sys.stderr)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('runs', nargs='+', metavar='NAME=WORKDIR')
  parser.add_argument(
    '--gen_lengths', type=int, nargs='+', default=[64, 128, 256, 512]
  )
  parser.add_argument('--chat_template', help="default: the model's")
  parser.add_argument('--tasks', nargs='+', help='of instructions.py; all')
  parser.add_argument('--num', type=int, default=200, help='questions')
  parser.add_argument('--seed', type=int, default=0, help='of the questions')
  parser.add_argument('--batch', type=int, default=16, help='rows at once')
  parser.add_argument(
    '--sample', nargs='+', default=[], metavar='KEY=VALUE', help='of sampler'
  )
  parser.add_argument('--out', type=pathlib.Path, help='file of JSON lines')
  args = parser.parse_args()
  args.sample = parse_pairs(args.sample)
  lines = []
  for name, workdir in (text.split('=', 1) for text in args.runs):
    for line in of_network(name, workdir, args):
      json_lines.report([line], args.out)
      lines.append(line)
  print(table(lines))


if __name__ == '__main__':
  main()
