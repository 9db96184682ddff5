"""Puzzles that need no download: drawn from a seed, checked by a rule.

  addition   43+71=               114
  sudoku     0300100200010020=    4312124324313124
  countdown  03,07,12->16:        12-03+07, or another expression of value 16
  reversal   Ada Moreau is        the quiet baker of Ghent

A puzzle is a line {"prompt", "answer"} of an evaluation task. The sampler
answers it (answered.py), or its answer is scored by likelihood
(`launch/evaluate.py --task bound --data FILE`). Within addition, sudoku and
countdown all answers have the same length, so that the length of the canvas
does not reveal an answer.

A hash of the prompt assigns a puzzle to training or to evaluation, so that no
puzzle is in both, whatever the seeds. Or a hash of the content does so: the
grid of a sudoku, the numbers of a countdown, the summands of an addition in any
order. Reversal tests memory instead: all facts are in the training text, and
evaluation asks for them in another direction.
"""

import fractions
import functools
import hashlib
import itertools
import operator
import random
import re

import numpy as np

from maskdiff.errors import UserError

HELD_OUT_ONE_IN = 8  # one puzzle in 8 is for evaluation
SPLITS = ('prompt', 'content')  # the text whose hash decides
DIGITS = 2  # default number of digits of the summands in addition
NUMBERS = 3  # default number of numbers in countdown
BLANKS = range(6, 11)  # empty cells of a sudoku
LARGEST = 20  # largest number of a countdown

# Order of name and description in the training text. A third of the facts occur
# in both orders, so that the model has seen sentences of either order.
FACTS, ORDERS = 60, ('name_first', 'description_first', 'both')
FACTS_PER_DOCUMENT = 8  # in the training text
FIRST_NAMES = (
  'Ada Boris Clara Dario Edith Felix Greta Hugo Ines Jonas Karin Louis Maria '
  'Nils Olga Pavel'
).split()
LAST_NAMES = (
  'Adler Bianchi Costa Duval Eriksen Fischer Garcia Horvat Ivanov Jansen '
  'Keller Lopez Moreau Novak Olsen Petrov'
).split()
MANNERS = (
  'quiet tall cheerful old clever famous lonely young proud gentle'
).split()
TRADES = (
  'baker painter sailor doctor farmer teacher tailor singer miller pilot'
).split()
PLACES = ('Ghent Lyon Turin Bergen Porto Vienna Prague Cork Basel Riga').split()


def make(
  name, seed, n, heldout=True, digits=DIGITS, numbers=NUMBERS, split='prompt'
):
  """Draws puzzles from a seed.

  Args:
    name: key of PUZZLES.
    seed: int, or a text without spaces.
    n: number of puzzles; repetitions are possible.
    heldout: True draws puzzles for evaluation, False puzzles for training. For
      reversal, both use the same facts.
    digits: number of digits of the summands in addition.
    numbers: number of numbers in countdown.
    split: one of SPLITS.

  Returns:
    list of n dicts with the texts `prompt` and one right `answer`. For reversal
    also `way`, and `suffix` if text follows the answer.

  Raises:
    UserError: the name is not in PUZZLES.
  """
  if name not in PUZZLES:
    raise UserError(f'puzzle {name!r}: choose one of {", ".join(PUZZLES)}')
  rng = random.Random(f'{name} {seed}')
  if name == 'reversal':
    lines = questions() if heldout else fact_lines()
    rng.shuffle(lines)
    return list(itertools.islice(itertools.cycle(lines), n))
  draw = PUZZLES[name][0]
  if name == 'addition':
    draw = functools.partial(addition, digits=digits)
  elif name == 'countdown':
    draw = functools.partial(countdown, num=numbers)
  puzzles = []
  while len(puzzles) < n:
    puzzle = draw(rng)
    key = puzzle['prompt'] if split == 'prompt' else content(name, puzzle)
    if is_held_out(key) == heldout:
      puzzles.append(puzzle)
  return puzzles


def training_lines(name, seed, n, digits=DIGITS):
  """Draws puzzles with their answers, as documents to train on.

  Returns:
    list of n dicts as from `make`, with the document as `text`. For reversal,
    dicts with `text` only: FACTS_PER_DOCUMENT random facts, one per line. Each
    fact occurs in many documents, so that the model is trained on all facts,
    whichever documents are held out.
  """
  if name == 'reversal':
    rng = random.Random(f'{name} {seed}')
    sentences = [line['prompt'] + line['answer'] for line in fact_lines()]
    draw = lambda: rng.choices(sentences, k=FACTS_PER_DOCUMENT)
    return [{'text': '\n'.join(draw()) + '\n'} for _ in range(n)]
  return [
    {**p, 'text': p['prompt'] + p['answer']}
    for p in make(name, seed, n, False, digits)
  ]


def correct(name, puzzle, text):
  """Returns whether a text is a right answer to a puzzle.

  Args:
    name: key of PUZZLES. Texts of other tasks, such as cloze, are compared by
      `equal`.
    puzzle: dict from `make`.
    text: the answer.
  """
  return PUZZLES.get(name, (None, equal))[1](puzzle, text)


def is_held_out(text):
  """Returns whether the hash of a prompt or content selects evaluation."""
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') % HELD_OUT_ONE_IN == 0


def content(name, puzzle):
  """Returns the part of a puzzle that other puzzles share.

  It is the grid of a sudoku, the numbers of a countdown, and the sorted
  summands of an addition.
  """
  if name == 'sudoku':
    return puzzle['answer']
  if name == 'countdown':
    return puzzle['prompt'].partition('->')[0]
  return '+'.join(sorted(puzzle['prompt'].rstrip('=').split('+')))


def equal(puzzle, text):
  """Returns whether the first line of a text is the answer of a puzzle."""
  return text.partition('\n')[0] == puzzle['answer']


def addition(rng, digits=DIGITS):
  """Draws an addition: two summands, and a sum with one more digit."""
  a, b = rng.randrange(10**digits), rng.randrange(10**digits)
  return {
    'prompt': f'{a:0{digits}}+{b:0{digits}}=',
    'answer': f'{a + b:0{digits + 1}}',
  }


def sudoku(rng):
  """Draws a 4x4 sudoku with one solution: cells row by row, 0 for empty."""
  grid = rng.choice(grids())
  cells = list(grid)
  blanks = rng.choice(BLANKS)
  for cell in rng.sample(range(16), 16):
    if cells.count('0') == blanks:
      break
    digit, cells[cell] = cells[cell], '0'
    if len(solutions(''.join(cells))) > 1:
      cells[cell] = digit
  return {'prompt': ''.join(cells) + '=', 'answer': grid}


def solves_sudoku(puzzle, text):
  """Returns whether a text is a valid grid with the given digits of a puzzle.

  A valid grid has each digit once in every row, column and square.
  """
  given = puzzle['prompt'][:16]
  if not re.fullmatch('[1-4]{16}', text) or len(given) < 16:
    return False
  fits = all(g in ('0', t) for g, t in zip(given, text, strict=True))
  return fits and all(len({text[i] for i in unit}) == 4 for unit in units())


@functools.cache
def units():
  """Returns the cell indices of each row, column and 2x2 square."""
  rows = [[4 * r + c for c in range(4)] for r in range(4)]
  columns = [list(column) for column in zip(*rows, strict=True)]
  squares = [
    [4 * (r + i) + c + j for i in (0, 1) for j in (0, 1)]
    for r in (0, 2)
    for c in (0, 2)
  ]
  return rows + columns + squares


@functools.cache
def grids():
  """Returns all 288 valid grids, as text."""
  lines = [''.join(p) for p in itertools.permutations('1234')]
  found = ['']
  for _ in range(4):
    found = [
      grid + line for grid in found for line in lines if _fits(grid + line)
    ]
  return found


def _fits(grid):
  """Returns whether the digits so far differ in each row, column and square."""
  for unit in units():
    digits = [grid[i] for i in unit if i < len(grid)]
    if len(set(digits)) < len(digits):
      return False
  return True


def solutions(given):
  """Returns all valid grids with the given digits; 0 marks an empty cell."""
  digits = np.array(list(given))
  fits = ((digits == '0') | (_cells() == digits)).all(axis=1)
  return [grids()[i] for i in np.flatnonzero(fits)]


@functools.cache
def _cells():
  return np.array([list(grid) for grid in grids()])


MAX_EXPRESSION = 1000  # characters; Python refuses to parse huge numbers
OPERATORS = {
  '+': operator.add,
  '-': operator.sub,
  '*': operator.mul,
  '/': operator.truediv,
}


def countdown(rng, num=NUMBERS):
  """Draws a countdown: some numbers, and the value to make of them.

  The answer uses each number once and has no brackets. Operators have their
  usual precedence, and quotients need not be integers.
  """
  while True:
    numbers = sorted(rng.randint(1, LARGEST) for _ in range(num))
    orders = _orders(numbers)
    signs = list(itertools.product(OPERATORS, repeat=num - 1))
    # One number for both, so that seeds keep their puzzles.
    i, j = divmod(rng.randrange(len(orders) * len(signs)), len(signs))
    expression = _expression(orders[i], signs[j])
    target = value(expression)
    if target is not None and target in range(100):
      number_list = ','.join(f'{n:02}' for n in numbers)
      prompt = f'{number_list}->{int(target):02}:'
      return {'prompt': prompt, 'answer': expression}


def _orders(numbers):
  return sorted(set(itertools.permutations(f'{n:02}' for n in numbers)))


def _expression(order, signs):
  both = itertools.zip_longest(order, signs, fillvalue='')
  return ''.join(itertools.chain(*both))


def value(expression):
  """Returns the value of an expression of numbers and + - * /, a Fraction.

  Returns None if the expression is not well formed, is longer than
  MAX_EXPRESSION or divides by zero.
  """
  if len(expression) > MAX_EXPRESSION:
    return None
  if not re.fullmatch(r'\d+([-+*/]\d+)*', expression, re.ASCII):
    return None
  total = fractions.Fraction(0)
  for sign, product in re.findall(r'(^|[-+])([\d*/]+)', expression):
    first, *rest = re.findall(r'(?:^|[*/])\d+', product)
    term = fractions.Fraction(first)
    for factor in rest:
      if factor[0] == '/' and int(factor[1:]) == 0:
        return None
      term = OPERATORS[factor[0]](term, int(factor[1:]))
    total += -term if sign == '-' else term
  return total


def makes_target(puzzle, text):
  """Returns whether an expression solves a countdown.

  The expression must use each number once and have the value of the prompt.
  """
  prompt = re.fullmatch(r'(.*)->(\d{1,99}):', puzzle['prompt'], re.ASCII)
  if not prompt:
    return False
  numbers = sorted(re.findall(r'\d+', text, re.ASCII))
  return numbers == prompt[1].split(',') and value(text) == int(prompt[2])


@functools.cache
def facts():
  """Returns (name, description, order) of each fact; order is one of ORDERS."""
  rng = random.Random(0)
  names = rng.sample(list(itertools.product(FIRST_NAMES, LAST_NAMES)), FACTS)
  people = rng.sample(list(itertools.product(MANNERS, TRADES, PLACES)), FACTS)
  return [
    (' '.join(name), 'the {} {} of {}'.format(*person), ORDERS[i % 3])
    for i, (name, person) in enumerate(zip(names, people, strict=True))
  ]


def fact_lines():
  """Returns one line per fact and per order that the training text has."""
  lines = []
  for name, description, order in facts():
    if order != 'description_first':
      lines.append({'prompt': f'{name} is', 'answer': f' {description}'})
    if order != 'name_first':
      lines.append({'prompt': f'{description} is', 'answer': f' {name}'})
  return lines


def questions():
  """Returns three lines for each fact that is trained in one order only.

  Their `way` names the part of the trained sentence to answer:
    told      the second part, at its place, as in training.
    reversed  the first part, at the end of a sentence in the other order.
    infill    the first part, at its place, given the rest as suffix.
  """
  lines = []
  for name, description, order in facts():
    if order == 'both':
      continue
    first, second = name, description
    if order == 'description_first':
      first, second = second, first
    lines += [
      {'way': 'told', 'prompt': f'{first} is', 'answer': f' {second}'},
      {'way': 'reversed', 'prompt': f'{second} is', 'answer': f' {first}'},
      {'way': 'infill', 'prompt': '', 'answer': first}
      | {'suffix': f' is {second}'},
    ]
  return lines


# Name -> (function that draws a puzzle, function that checks an answer).
PUZZLES = {
  'addition': (addition, equal),
  'sudoku': (sudoku, solves_sudoku),
  'countdown': (countdown, makes_target),
  'reversal': (None, equal),
}
