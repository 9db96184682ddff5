"""Puzzles that need no download: made from a seed, judged by a rule.

  addition   43+71=               114
  sudoku     0300100200010020=    4312124324313124
  countdown  03,07,12->15:        12-07+10 ... any expression that is right
  reversal   Ada Moreau is        the quiet baker of Ghent

A puzzle is a line for tasks.py, {"prompt", "answer"}, so that the same files
are trained on, completed by the sampler (decode.py), and scored by likelihood
(`launch/evaluate.py --task bound --data FILE`). Answers of a puzzle but for
reversal are equally long, digit by digit, so that their length says nothing.

A hash of its prompt says whether a puzzle is for training or for evaluation:
whatever the seeds, no puzzle is both. Facts are to be known by heart: all are
told, and it is asked for them in other ways than they were told.
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

HELD_OUT_ONE_IN = 8  # puzzles, by hash
DIGITS = 2  # of the numbers to add, if it is not said
BLANKS = range(6, 11)  # cells of a sudoku to fill
LARGEST = 20  # number of a countdown

# Facts are told from name to description, from description to name, or both:
# those teach that there are two ways to ask.
FACTS, WAYS_TOLD = 60, ('name_first', 'description_first', 'both')
FACTS_TOGETHER = 8  # in a document to train on
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


def make(name, seed, n, heldout=True, digits=DIGITS):
  """Draws puzzles.

  Args:
    name: a key of PUZZLES.
    seed: int; the same gives the same puzzles.
    n: how many; some may come twice.
    heldout: whether they are for evaluation; else for training. The facts of
      reversal are the same for both: asked is what was told another way.
    digits: of the numbers of addition.

  Returns:
    list of n dicts with the text of `prompt` and of one right `answer`; of
    reversal also `way`, and `suffix` where text follows the answer.

  Raises:
    UserError: there is no such puzzle.
  """
  if name not in PUZZLES:
    raise UserError(f'puzzle {name!r}: choose one of {", ".join(PUZZLES)}')
  rng = random.Random(f'{name} {seed}')
  if name == 'reversal':
    asked = questions() if heldout else told()
    rng.shuffle(asked)
    return list(itertools.islice(itertools.cycle(asked), n))
  draw = PUZZLES[name][0]
  if name == 'addition':
    draw = functools.partial(addition, digits=digits)
  puzzles = []
  while len(puzzles) < n:
    puzzle = draw(rng)
    if is_held_out(puzzle['prompt']) == heldout:
      puzzles.append(puzzle)
  return puzzles


def training_lines(name, seed, n, digits=DIGITS):
  """Puzzles with their answers as documents to train on.

  Returns:
    list of n dicts as from `make`, with `text` besides. Of reversal the text
    alone, of FACTS_TOGETHER facts drawn at random, a line each: so every fact
    is trained on, whichever documents are held out.
  """
  if name == 'reversal':
    rng = random.Random(f'{name} {seed}')
    sentences = [line['prompt'] + line['answer'] for line in told()]
    draw = lambda: rng.choices(sentences, k=FACTS_TOGETHER)
    return [{'text': '\n'.join(draw()) + '\n'} for _ in range(n)]
  return [
    {**p, 'text': p['prompt'] + p['answer']}
    for p in make(name, seed, n, False, digits)
  ]


def correct(name, puzzle, text):
  """Whether a text is a right answer to a puzzle.

  Args:
    name: a key of PUZZLES, or cloze (heldout.py).
    puzzle: one of those that `make` gives.
    text: the answer.
  """
  return PUZZLES.get(name, (None, equal))[1](puzzle, text)


def is_held_out(prompt):
  """Whether a puzzle is for evaluation."""
  digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') % HELD_OUT_ONE_IN == 0


def equal(puzzle, text):
  """The check of puzzles that have one right answer, in a line of its own."""
  return text.partition('\n')[0] == puzzle['answer']


def addition(rng, digits=DIGITS):
  """Two numbers of so many digits, and their sum with a digit more."""
  a, b = rng.randrange(10**digits), rng.randrange(10**digits)
  return {
    'prompt': f'{a:0{digits}}+{b:0{digits}}=',
    'answer': f'{a + b:0{digits + 1}}',
  }


def sudoku(rng):
  """A 4x4 grid, row by row, 0 where a digit is missing; one solution fits."""
  grid = rng.choice(grids())
  cells = list(grid)
  blanks = rng.choice(BLANKS)
  for cell in rng.sample(range(16), 16):
    if cells.count('0') == blanks:
      break
    kept, cells[cell] = cells[cell], '0'
    if len(solutions(''.join(cells))) > 1:
      cells[cell] = kept
  return {'prompt': ''.join(cells) + '=', 'answer': grid}


def solves_sudoku(puzzle, text):
  """Whether a grid keeps the given digits and has no digit twice in a row, a
  column or a square."""
  given = puzzle['prompt'][:16]
  if not re.fullmatch('[1-4]{16}', text) or len(given) < 16:
    return False
  fits = all(g in ('0', t) for g, t in zip(given, text, strict=True))
  return fits and all(len({text[i] for i in unit}) == 4 for unit in units())


@functools.cache
def units():
  """The cells of each row, column and square."""
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
  """All 288 full grids, found row by row."""
  lines = [''.join(p) for p in itertools.permutations('1234')]
  found = ['']
  for _ in range(4):
    found = [
      grid + line for grid in found for line in lines if _fits(grid + line)
    ]
  return found


def _fits(grid):
  """Whether no unit of a grid of which the first rows are there has a digit
  twice."""
  for unit in units():
    digits = [grid[i] for i in unit if i < len(grid)]
    if len(set(digits)) < len(digits):
      return False
  return True


def solutions(given):
  """All full grids that agree with the given digits; 0 is none."""
  digits = np.array(list(given))
  fits = ((digits == '0') | (_cells() == digits)).all(axis=1)
  return [grids()[i] for i in np.flatnonzero(fits)]


@functools.cache
def _cells():
  return np.array([list(grid) for grid in grids()])


OPERATORS = {
  '+': operator.add,
  '-': operator.sub,
  '*': operator.mul,
  '/': operator.truediv,
}


def countdown(rng):
  """Three numbers, each to be used once, and what they are to make.

  The answer has no brackets: products and quotients come before sums and
  differences, and quotients need not be whole.
  """
  while True:
    numbers = sorted(rng.randint(1, LARGEST) for _ in range(3))
    expression = rng.choice(expressions(numbers))
    target = value(expression)
    if target is not None and target in range(100):
      listed = ','.join(f'{n:02}' for n in numbers)
      prompt = f'{listed}->{int(target):02}:'
      return {'prompt': prompt, 'answer': expression}


def expressions(numbers):
  """All expressions in which each of the numbers is used once."""
  return [
    ''.join(itertools.chain(*itertools.zip_longest(order, used, fillvalue='')))
    for order in sorted(set(itertools.permutations(f'{n:02}' for n in numbers)))
    for used in itertools.product(OPERATORS, repeat=len(numbers) - 1)
  ]


def value(expression):
  """The value of an expression of numbers and + - * /, a Fraction.

  None if it is not well formed, or divides by zero.
  """
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
  """Whether an expression uses each number once and has the value asked for."""
  prompt = re.fullmatch(r'(.*)->(\d+):', puzzle['prompt'], re.ASCII)
  if not prompt:
    return False
  used = re.findall(r'\d+', text, re.ASCII)
  right = sorted(used) == prompt[1].split(',')
  return right and value(text) == int(prompt[2])


@functools.cache
def facts():
  """The (name, description, way it is told) of all facts, always the same."""
  rng = random.Random(0)
  names = rng.sample(list(itertools.product(FIRST_NAMES, LAST_NAMES)), FACTS)
  things = rng.sample(list(itertools.product(MANNERS, TRADES, PLACES)), FACTS)
  return [
    (' '.join(name), 'the {} {} of {}'.format(*thing), WAYS_TOLD[i % 3])
    for i, (name, thing) in enumerate(zip(names, things, strict=True))
  ]


def told():
  """Every fact in the order, or both, that is trained."""
  lines = []
  for name, description, way in facts():
    if way != 'description_first':
      lines.append({'prompt': f'{name} is', 'answer': f' {description}'})
    if way != 'name_first':
      lines.append({'prompt': f'{description} is', 'answer': f' {name}'})
  return lines


def questions():
  """Facts that are told one way, asked three ways.

  `told`: what comes second, as in training. `reversed`: what came first, by a
  sentence in the other order. `infill`: what came first, at its own place
  before the rest.
  """
  lines = []
  for name, description, way in facts():
    if way == 'both':
      continue
    first, second = name, description
    if way == 'description_first':
      first, second = second, first
    lines += [
      {'way': 'told', 'prompt': f'{first} is', 'answer': f' {second}'},
      {'way': 'reversed', 'prompt': f'{second} is', 'answer': f' {first}'},
      {'way': 'infill', 'prompt': '', 'answer': first}
      | {'suffix': f' is {second}'},
    ]
  return lines


# How each is drawn, and how an answer is judged.
PUZZLES = {
  'addition': (addition, equal),
  'sudoku': (sudoku, solves_sudoku),
  'countdown': (countdown, makes_target),
  'reversal': (None, equal),
}
