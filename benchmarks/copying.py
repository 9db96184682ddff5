r"""Writes documents of a copying task: a line of random words, four times.

python benchmarks/copying.py --out copying.jsonl
python launch/prepare.py --source copying.jsonl --out data/copying \
  --tokenizer tokenizer/stdlib_4k.model --row_length 128 \
  --heldout_fraction 0.02

A line has 31 words, and a word is one token, so a copy with its line break has
32 tokens and a document is a row of 128 tokens. `questions` draws lines for an
evaluation.

All lines have one length because the task must be learned in minutes: a token
is then that of 32 positions before. Lines of 8 to 40 words, with one copy each,
were not learned by 10 million parameters in 3,000 rows.
"""

import argparse
import json
import pathlib
import random
import re

from maskdiff.data import tokenizer as tokenizer_lib

ROOT = pathlib.Path(__file__).parents[1]
TOKENIZER = ROOT / 'tokenizer' / 'stdlib_4k.model'
WORDS = 256
LENGTH = 31  # words of a line
COPIES = 4  # of a line in a document


def words(tokenizer):
  """Returns the WORDS most frequent words of a tokenizer, each with a space.

  A word has at least four letters and is one token. Ids of SentencePiece ascend
  from frequent to rare pieces.
  """
  found = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
  return [x for x in found if re.fullmatch(' [a-z]{4,}', x)][:WORDS]


def line(rng, vocabulary):
  """Returns a line of different random words, without a line break."""
  return ''.join(rng.sample(vocabulary, LENGTH))


def documents(seed, number):
  """Draws the texts of documents for training from a seed."""
  rng = random.Random(f'documents {seed}')
  vocabulary = words(tokenizer_lib.load(TOKENIZER))
  return ['\n'.join([line(rng, vocabulary)] * COPIES) for _ in range(number)]


def questions(seed, number):
  """Draws lines to copy, which are in no document for training.

  Args:
    seed: int.
    number: number of lines.

  Returns:
    list of dicts with the texts `prompt`, a line as at the beginning of a
    document, and `answer`, the line twice.
  """
  rng = random.Random(f'questions {seed}')
  vocabulary = words(tokenizer_lib.load(TOKENIZER))
  lines = [line(rng, vocabulary) + '\n' for _ in range(number)]
  return [{'prompt': text, 'answer': text * 2} for text in lines]


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--out', type=pathlib.Path, required=True)
  parser.add_argument('--num', type=int, default=20_000, help='documents')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  with open(args.out, 'w') as f:
    for text in documents(args.seed, args.num):
      f.write(json.dumps({'text': text}) + '\n')


if __name__ == '__main__':
  main()
