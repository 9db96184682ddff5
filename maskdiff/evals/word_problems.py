r"""Word problems with worked answers, drawn from a seed.

  Ada buys 4 lamps for 7 coins each and pays with 50 coins. How many coins does
  Ada get back?

  The lamps cost 4 * 7 = 28 coins.
  Ada gets back 50 - 28 = 22 coins.
  #### 22

The form of the answers is that of GSM8K: the last line has the number. All
numbers are positive integers. Either a part of the templates is for evaluation
only, or a hash of the numbers of a problem decides, see `SPLITS`.
"""

import operator
import random
import re
from typing import NamedTuple

from maskdiff.evals.puzzles import FIRST_NAMES, is_held_out

SPLITS = ('template', 'numbers')
MARK = '####'  # before the number, in the last line of an answer
ITEMS = 'pens lamps books cups chairs apples maps bells boxes hats'.split()
OPERATORS = {
  '+': operator.add,
  '-': operator.sub,
  '*': operator.mul,
  '/': operator.floordiv,
}


class Template(NamedTuple):
  """A kind of problem."""

  text: str  # with {name}, {other}, {items} and the numbers
  numbers: dict  # name -> (smallest, largest)
  steps: tuple  # sentences with one operation in brackets, [a * b]; a step
  # names its result `r1`, `r2`, ..., and the last result is the answer
  heldout: bool = False  # with the split by template


TEMPLATES = {
  'change': Template(
    '{name} buys {a} {items} for {b} coins each and pays with {c} coins. How '
    'many coins does {name} get back?',
    {'a': (2, 9), 'b': (2, 12), 'c': (10, 120)},
    (
      'The {items} cost [a * b] coins.',
      '{name} gets back [c - r1] coins.',
    ),
  ),
  'shelves': Template(
    'A shop has {a} shelves with {b} {items} each. It sells {c} of them and '
    'gets {d} new ones. How many {items} does it have then?',
    {'a': (2, 9), 'b': (3, 15), 'c': (2, 60), 'd': (2, 40)},
    (
      'The shop has [a * b] {items} at first.',
      'After the sale it has [r1 - c] {items}.',
      'With the new ones it has [r2 + d] {items}.',
    ),
  ),
  'sharing': Template(
    '{name} has {a} {items} and {other} has {b}. They share all of them '
    'equally among {c} friends. How many {items} does each friend get?',
    {'a': (2, 50), 'b': (2, 50), 'c': (2, 9)},
    (
      'Together they have [a + b] {items}.',
      'Each friend gets [r1 / c] {items}.',
    ),
  ),
  'reading': Template(
    '{name} reads {a} pages on each of {b} days and then {c} pages on each of '
    '{d} days. How many pages does {name} read?',
    {'a': (3, 20), 'b': (2, 7), 'c': (3, 20), 'd': (2, 7)},
    (
      'On the first days {name} reads [a * b] pages.',
      'On the other days {name} reads [c * d] pages.',
      'In all {name} reads [r1 + r2] pages.',
    ),
  ),
  'saving': Template(
    '{name} saves {a} coins a week and spends {b} of them. After how many '
    'weeks does {name} have {c} coins?',
    {'a': (4, 30), 'b': (1, 20), 'c': (10, 200)},
    (
      'Each week adds [a - b] coins.',
      'It takes [c / r1] weeks.',
    ),
  ),
  'twice': Template(
    '{name} has {a} times as many {items} as {other}, who has {b}. How many '
    '{items} do they have together?',
    {'a': (2, 6), 'b': (3, 25)},
    (
      '{name} has [a * b] {items}.',
      'Together they have [r1 + b] {items}.',
    ),
  ),
  'boxes': Template(
    'A box holds {a} {items}. {name} fills {b} boxes, and {c} {items} are '
    'left. {other} takes {d} {items} away. How many {items} are there then?',
    {'a': (4, 12), 'b': (2, 9), 'c': (1, 11), 'd': (2, 50)},
    (
      'The boxes hold [a * b] {items}.',
      'With the rest there are [r1 + c] {items}.',
      'Then there are [r2 - d] {items}.',
    ),
  ),
  'trip': Template(
    'A trip is {a} miles long. {name} walks {b} miles an hour for {c} hours. '
    'How many miles are left?',
    {'a': (10, 80), 'b': (2, 6), 'c': (2, 9)},
    (
      '{name} walks [b * c] miles.',
      'There are [a - r1] miles left.',
    ),
  ),
  'halves': Template(
    '{name} gives half of {a} {items} to {other} and then buys {b} more. How '
    'many {items} does {name} have?',
    {'a': (4, 80), 'b': (2, 40)},
    (
      '{name} keeps [a / 2] {items}.',
      'Then {name} has [r1 + b] {items}.',
    ),
  ),
  'wages': Template(
    '{name} earns {a} coins an hour and works {b} hours a day for {c} days. '
    'How many coins does {name} earn?',
    {'a': (3, 15), 'b': (2, 8), 'c': (2, 6)},
    (
      '{name} earns [a * b] coins a day.',
      'In all {name} earns [r1 * c] coins.',
    ),
    heldout=True,
  ),
  'prices': Template(
    '{name} buys {a} {items} for {b} coins each and {other} buys {c} for {d} '
    'coins each. How many coins more does {name} pay?',
    {'a': (2, 12), 'b': (2, 12), 'c': (2, 9), 'd': (2, 9)},
    (
      '{name} pays [a * b] coins.',
      '{other} pays [c * d] coins.',
      '{name} pays [r1 - r2] coins more.',
    ),
    heldout=True,
  ),
  'rows': Template(
    'There are {a} {items}, and {b} of them are broken. {name} puts the others '
    'into rows of {c}. How many rows are there?',
    {'a': (10, 90), 'b': (1, 30), 'c': (2, 9)},
    (
      'There are [a - b] {items} that are not broken.',
      'There are [r1 / c] rows.',
    ),
    heldout=True,
  ),
}


def questions(seed, n, heldout, split='template'):
  """Draws word problems from a seed.

  Args:
    seed: int, or a text.
    n: number of problems; repetitions are possible.
    heldout: True draws problems for evaluation, False those for training.
    split: 'template': some templates are for evaluation, the others for
      training. 'numbers': all templates are for both, and a hash of the
      template and its numbers decides.

  Returns:
    list of n dicts with the texts `template`, `prompt` and `answer`. Prompts
    end with a newline.
  """
  rng = random.Random(f'word problems {seed}')
  names = [
    name
    for name, template in TEMPLATES.items()
    if split == 'numbers' or template.heldout == heldout
  ]
  part = heldout if split == 'numbers' else None
  return [_problem(rng, rng.choice(names), part) for _ in range(n)]


def _problem(rng, name, part):
  """Draws a problem of a template.

  Args:
    rng: random.Random.
    name: key of TEMPLATES.
    part: whether the hash of the numbers selects evaluation; None: any numbers.
  """
  template, answer = TEMPLATES[name], None
  while answer is None:
    numbers = {
      key: rng.randint(*bounds) for key, bounds in template.numbers.items()
    }
    if part in (None, is_held_out(f'{name} {numbers}')):
      answer = _work(template, numbers)
  people = rng.sample(FIRST_NAMES, 2)
  words = {'name': people[0], 'other': people[1], 'items': rng.choice(ITEMS)}
  return {
    'template': name,
    'prompt': template.text.format(**words, **numbers) + '\n',
    'answer': answer.format(**words),
  }


def _work(template, numbers):
  """Returns the worked answer with names open, or None.

  It is None if a result is not a positive integer.
  """
  values = {**numbers, '2': 2}
  lines = []
  for i, step in enumerate(template.steps):
    before, operation, after = re.split(r'[\[\]]', step)
    a, sign, b = operation.split()
    x, y = values[a], values[b]
    result = OPERATORS[sign](x, y)
    if result < 1 or (sign == '/' and x % y):
      return None
    values[f'r{i + 1}'] = result
    lines.append(f'{before}{x} {sign} {y} = {result}{after}')
  return '\n'.join([*lines, f'{MARK} {result}'])
