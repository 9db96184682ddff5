r"""Writes documents of a copying task: a line of random words, and it again.

python benchmarks/copying.py --out copying.jsonl
python launch/prepare.py --source copying.jsonl --out data/copying \
  --tokenizer tokenizer/stdlib_4k.model --row_length 128 \
  --heldout_fraction 0.02

A line has 8 to 40 words, and a word is one token. A document is a row of 128
tokens: several lines, each with its copy, and the eos. So no line is cut from
its copy. `questions` draws lines for an evaluation.
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
SHORTEST, LONGEST = 8, 40  # words of a line
ROW = 128  # tokens of a document: a line break, the lines with copies, the eos


def words(tokenizer):
  """Returns the WORDS most frequent words of a tokenizer, each with a space.

  A word has at least four letters and is one token. Ids of SentencePiece ascend
  from frequent to rare pieces.
  """
  found = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
  return [x for x in found if re.fullmatch(' [a-z]{4,}', x)][:WORDS]


def line(rng, vocabulary, number):
  """Returns a line of different random words, without a line break."""
  return ''.join(rng.sample(vocabulary, number))


def document(rng, vocabulary):
  """Returns the text of a document, of ROW - 1 tokens."""
  free = (ROW - 2) // 2  # tokens of the lines without their copies
  lengths = []
  while free:
    number = rng.randint(SHORTEST, min(LONGEST, free - 1))
    if number + 1 < free <= number + 1 + SHORTEST:
      continue  # too little would be left for another line
    lengths.append(number)
    free -= number + 1
  lines = [line(rng, vocabulary, number) for number in lengths]
  return '\n' + ''.join(f'{text}\n{text}\n' for text in lines)


def documents(seed, number):
  """Draws the texts of documents for training from a seed."""
  rng = random.Random(f'documents {seed}')
  vocabulary = words(tokenizer_lib.load(TOKENIZER))
  return [document(rng, vocabulary) for _ in range(number)]


def questions(seed, number):
  """Draws lines to copy, which are in no document for training.

  Args:
    seed: int.
    number: number of lines; their lengths are equally spaced.

  Returns:
    list of dicts with the texts `prompt`, which is the beginning of a document,
    and `answer`.
  """
  rng = random.Random(f'questions {seed}')
  vocabulary = words(tokenizer_lib.load(TOKENIZER))
  found = []
  for i in range(number):
    length = SHORTEST + round(i * (LONGEST - SHORTEST) / max(1, number - 1))
    text = line(rng, vocabulary, length) + '\n'
    found.append({'prompt': '\n' + text, 'answer': text})
  return found


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
