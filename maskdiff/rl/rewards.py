"""Rewards: functions of a question and the text of an answer.

A reward returns a number, or a dict of named numbers. In a dict, the reward is
`total`, or else the sum. The other names are reported in the metrics. Rewards
of this file have `correct`, 1 for a right answer and 0 for another.

A question is a dict with the texts `prompt` and `answer`, and the other fields
of its task. Rewards run in the processes of reward_pool.py, which do not import
JAX.
"""

import re
import sys
import traceback
import types
from typing import NamedTuple

from maskdiff.errors import UserError, one_line, suggestion
from maskdiff.evals import puzzles
from maskdiff.files import reading
from maskdiff.files.paths import local_path
from maskdiff.rl import arithmetic, extraction, maths, published_rewards

MAX_FILE_BYTES = 1 << 20
NUMBERS_ONLY = 0.1  # for a countdown with the right numbers


class Source(NamedTuple):
  """Where a reward comes from: a name of REWARDS, or a program of the user."""

  name: str  # of the function
  path: str = ''
  program: str = ''  # contents of the file, read once


def exact(question, text):
  """Returns 1 for the text of the right answer; outer white space is free."""
  return {'correct': float(text.strip() == question['answer'].strip())}


def addition(question, text):
  """Returns 1 for the digits of the sum."""
  return {'correct': float(puzzles.correct('addition', question, text))}


def countdown(question, text):
  """Returns 1 for a right expression; 0.1 if only its numbers are right."""
  correct = puzzles.makes_target(question, text)
  given = question['prompt'].partition('->')[0].split(',')
  numbers = sorted(re.findall(r'\d+', text, re.ASCII)) == given
  return _countdown(correct, numbers)


def countdown_tags(question, text):
  """Returns the reward of an expression in answer tags, as `countdown`.

  Brackets are allowed. The operators are + - * /, without signs of numbers.
  """
  expression = extraction.tags(text) or ''
  used = [int(n) for n in re.findall(r'\d{1,9}', expression, re.ASCII)]
  numbers = sorted(used) == sorted(question['numbers'])
  correct = numbers and arithmetic.value(expression) == question['target']
  return _countdown(correct, numbers)


def _countdown(correct, numbers):
  total = 1.0 if correct else NUMBERS_ONLY * numbers
  return {
    'total': total,
    'correct': float(correct),
    'numbers': float(numbers),
  }


def sudoku(question, text):
  """Returns the share of empty cells that are right, 0 if not 16 digits 1-4."""
  given, solution = question['prompt'][:16], question['answer']
  share = 0.0
  if re.fullmatch('[1-4]{16}', text):
    empty = [i for i in range(16) if given[i] == '0']
    share = sum(text[i] == solution[i] for i in empty) / max(1, len(empty))
  return {
    'total': share,
    'correct': float(puzzles.solves_sudoku(question, text)),
    'cells': share,
  }


def sudoku_tags(question, text):
  """Returns the reward of a grid in answer tags; white space is left out."""
  grid = ''.join((extraction.tags(text) or '').split())
  given, solution = question['puzzle'], question['solution']
  return sudoku({'prompt': given, 'answer': solution}, grid)


def math_answer(question, text):
  """Returns 1 for an answer that is equivalent to the right one.

  The rules of extraction.py find the answer in the text.
  """
  found = extraction.extract(text) or ''
  return {'correct': float(maths.equivalent(found, _right(question)))}


def _right(question):
  """Returns the right answer, which may be worked.

  Its mark is #### in GSM8K, a box in MATH, and tags in our own tasks.
  """
  answer = question['answer']
  marked = extraction.extract(answer, ('tags', 'hashes', 'boxed'))
  return answer.strip() if marked is None else marked


def gsm8k(question, text, multiline=True):
  """Returns d1's reward for GSM8K, without its fault in reasoning of two lines.

  With `multiline=False`, it has the fault.
  """
  parts = published_rewards.gsm8k(_right(question), text, multiline)
  correct = float(parts['correctness'] > 0)
  return {'total': sum(parts.values()), 'correct': correct, **parts}


def gsm8k_published(question, text):
  """Returns d1's reward for GSM8K as published."""
  return gsm8k(question, text, multiline=False)


def countdown_published(question, text):
  """Returns the reward of d1 and ESPO for countdown; see countdown_tags."""
  numbers, target = question['numbers'], question['target']
  total = published_rewards.countdown(numbers, target, text)
  return {'total': total, 'correct': float(total == 1)}


def sudoku_published(question, text):
  """Returns the reward of d1 and ESPO for sudoku; see sudoku_tags."""
  given, solution = question['puzzle'], question['solution']
  total = published_rewards.sudoku(given, solution, text)
  return {'total': total, 'correct': float(total == 1)}


REWARDS = {
  'exact': exact,
  'addition': addition,
  'countdown': countdown,
  'countdown_tags': countdown_tags,
  'countdown_published': countdown_published,
  'sudoku': sudoku,
  'sudoku_tags': sudoku_tags,
  'sudoku_published': sudoku_published,
  'math': math_answer,
  'gsm8k': gsm8k,
  'gsm8k_published': gsm8k_published,
}


def find(name):
  """Returns the Source of a reward; a program is read, but not run.

  Args:
    name: name of REWARDS, or FILE.py:FUNCTION.

  Raises:
    UserError: the name is not known, or the file cannot be read.
  """
  path, colon, function = name.rpartition(':')
  if not colon or not path.endswith('.py'):
    if name not in REWARDS:
      raise UserError(
        f'reward {name!r}: choose one of {", ".join(REWARDS)}, or write '
        f'FILE.py:FUNCTION{suggestion(name, REWARDS)}'
      )
    return Source(name)
  try:
    program = reading.read_text(local_path(path), MAX_FILE_BYTES)
  except UserError as error:
    raise UserError(f'reward {name!r}: {error}') from error
  return Source(function, path, program)


def load(source):
  """Returns the function of a Source; a program of the user is run.

  Raises:
    UserError: the program fails, or has no such function.
  """
  if not source.path:
    return REWARDS[source.name]
  module = types.ModuleType('reward')
  module.__file__ = source.path
  # Classes of the program, such as dataclasses, look for their module.
  sys.modules['reward'] = module
  try:
    exec(compile(source.program, source.path, 'exec'), module.__dict__)
  except BaseException as error:  # a program can raise anything
    raise UserError(
      f'cannot run the rewards of {source.path!r}: {described(error, source)}'
    ) from error
  function = getattr(module, source.name, None)
  if not callable(function):
    names = [n for n, v in vars(module).items() if isinstance(v, _FUNCTION)]
    raise UserError(
      f'{source.path!r} has no function {source.name!r}'
      + (f': it has {", ".join(names[:10])}' if names else '')
    )
  return function


_FUNCTION = types.FunctionType


def described(error, source):
  """Returns one line on an error, with the line of the user's program."""
  frames = traceback.extract_tb(error.__traceback__)
  lines = [frame.lineno for frame in frames if frame.filename == source.path]
  if isinstance(error, SyntaxError) and error.filename == source.path:
    lines = [error.lineno]
  where = f'line {lines[-1]}, ' if source.path and lines else ''
  return f'{where}{type(error).__name__}: {one_line(error)}'
