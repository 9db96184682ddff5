"""Puzzles: right and wrong answers; training and evaluation sets."""

import fractions
import itertools
import re

import pytest

from maskdiff.errors import UserError
from maskdiff.evals import puzzles

DRAWN = ('addition', 'sudoku', 'countdown')
N = 40


@pytest.mark.parametrize('name', puzzles.PUZZLES)
def test_puzzles_depend_on_the_seed_only(name):
  first = puzzles.make(name, 3, N)
  assert len(first) == N
  assert puzzles.make(name, 3, N) == first
  assert puzzles.make(name, 4, N) != first


@pytest.mark.parametrize('name', puzzles.PUZZLES)
def test_answer_is_right_and_changed_answers_are_wrong(name):
  for puzzle in puzzles.make(name, 0, N):
    answer = puzzle['answer']
    assert puzzles.correct(name, puzzle, answer)
    for wrong in ('', answer[:-1], answer + answer[-1], answer[::-1] + '0'):
      assert not puzzles.correct(name, puzzle, wrong)


@pytest.mark.parametrize('name', DRAWN)
def test_training_and_evaluation_puzzles_are_disjoint(name):
  heldout = {p['prompt'] for p in puzzles.make(name, 0, N)}
  training = puzzles.training_lines(name, 0, 8 * N)
  assert not heldout & {p['prompt'] for p in training}
  assert all(p['text'] == p['prompt'] + p['answer'] for p in training)


@pytest.mark.parametrize('name', DRAWN)
def test_all_answers_have_equal_length(name):
  """The length of the canvas does not reveal the answer."""
  lines = puzzles.make(name, 0, N)
  for part in ('prompt', 'answer'):
    assert len({len(line[part]) for line in lines}) == 1


@pytest.mark.parametrize('digits', [1, 2, 5])
def test_sums_are_right(digits):
  for puzzle in puzzles.make('addition', 0, N, digits=digits):
    assert len(puzzle['prompt']) == 2 * digits + 2
    assert len(puzzle['answer']) == digits + 1
    a, b = map(int, re.fullmatch(r'(\d+)\+(\d+)=', puzzle['prompt']).groups())
    assert int(puzzle['answer']) == a + b


def solve(cells):
  """Returns all solutions of a 4x4 sudoku by backtracking, without grids()."""
  if '0' not in cells:
    return [cells]
  at = cells.index('0')
  row, column = divmod(at, 4)
  seen = {
    cells[4 * r + c]
    for r, c in itertools.product(range(4), repeat=2)
    if r == row or c == column or (r // 2, c // 2) == (row // 2, column // 2)
  }
  return [
    found
    for digit in '1234'
    if digit not in seen
    for found in solve(cells[:at] + digit + cells[at + 1 :])
  ]


def test_sudoku_has_one_solution():
  for puzzle in puzzles.make('sudoku', 0, N):
    given = puzzle['prompt'][:16]
    assert 6 <= given.count('0') <= 10
    assert solve(given) == [puzzle['answer']]
    assert puzzles.solutions(given) == [puzzle['answer']]


def test_there_are_288_grids():
  assert sorted(puzzles.grids()) == sorted(solve('0' * 16))
  assert len(puzzles.grids()) == 288


def test_valid_grid_with_another_given_digit_is_wrong():
  puzzle = puzzles.make('sudoku', 0, 1)[0]
  swapped = puzzle['answer'].translate(str.maketrans('1234', '2143'))
  assert puzzles.solves_sudoku({'prompt': '0' * 16 + '='}, swapped)
  assert not puzzles.solves_sudoku(puzzle, swapped)


def test_countdown_has_a_solution():
  """Enumerates orders and operators; each number is used once."""
  for puzzle in puzzles.make('countdown', 0, N):
    numbers, target = puzzle['prompt'][:-1].split('->')
    values = [
      calculated(
        ''.join(itertools.chain(*zip(order, (*used, ''), strict=True)))
      )
      for order in itertools.permutations(numbers.split(','))
      for used in itertools.product('+-*/', repeat=2)
    ]
    assert int(target) in values
    assert calculated(puzzle['answer']) == int(target)


def calculated(expression):
  """Returns the value of an expression as Python computes it with fractions."""
  return eval(  # noqa: S307
    re.sub(r'\d+', lambda m: f'F({int(m[0])})', expression),
    {'F': fractions.Fraction},
  )


@pytest.mark.parametrize(
  'text, value',
  [
    ('07+12*03', 43),
    ('12-07-03', 2),
    ('12/08*02', 3),
    ('01/03', fractions.Fraction(1, 3)),
    ('02/00', None),
    ('02+', None),
    ('-02', None),
    ('02**03', None),
    ('2+(3)', None),
    ('', None),
    ('٢+٣', None),
  ],
)
def test_value_of_an_expression(text, value):
  assert puzzles.value(text) == value


@pytest.mark.parametrize(
  'text, right',
  [
    ('12-07+10', False),  # 10 is not in the puzzle
    ('12+07-04', True),
    ('07-04+12', True),
    ('12+07+04', False),
    ('12+07-04-04', False),
    ('12+7-4', False),  # numbers have two digits
    ('12+03', False),
  ],
)
def test_countdown_is_checked_by_numbers_and_value(text, right):
  puzzle = {'prompt': '04,07,12->15:'}
  assert puzzles.makes_target(puzzle, text) == right


@pytest.mark.parametrize('name', ['sudoku', 'countdown'])
def test_malformed_puzzle_has_no_right_answer(name):
  assert not puzzles.correct(name, {'prompt': 'What?'}, '1' * 16)


def test_evaluation_asks_for_facts_in_three_ways():
  sentences = {
    sentence
    for line in puzzles.training_lines('reversal', 0, 1000)
    for sentence in line['text'].splitlines()
  }
  ways = {}
  for q in puzzles.make('reversal', 0, len(puzzles.questions())):
    sentence = q['prompt'] + q['answer'] + q.get('suffix', '')
    assert (sentence in sentences) == (q['way'] != 'reversed')
    ways[q['way']] = ways.get(q['way'], 0) + 1
  assert ways == dict.fromkeys(('told', 'reversed', 'infill'), 40)
  # The training text has sentences of both orders.
  assert {s.startswith('the ') for s in sentences} == {True, False}


def test_unknown_puzzle_is_named():
  with pytest.raises(UserError, match="'chess': choose one of addition"):
    puzzles.make('chess', 0, 1)
