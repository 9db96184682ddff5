"""Tasks: questions from a seed, and the reward of their answers.

A question is a dict with the texts `prompt` and `answer`. The reward of the
task calls this answer correct, and perhaps others. No question for training is
like one for evaluation:

  addition              other summands, in any order
  countdown, sudoku     other numbers; another grid
  word_problems         other templates, or other numbers
  all others            another hash of the prompt

Prompts of names with _tags are written in words, for models that follow
instructions. Their answers are in <answer> tags.
"""

import functools
import random
from collections.abc import Callable
from typing import NamedTuple

from maskdiff.errors import UserError, inline, suggestion
from maskdiff.evals import (
  instructions,
  puzzles,
  reasoning_tasks,
  word_problems,
)
from maskdiff.files import reading
from maskdiff.files.paths import local_path

GYM = 'reasoning_gym:'
FORM = (
  'Write your reasoning between <reasoning> and </reasoning>, and then only '
  'the {} between <answer> and </answer>.'
)


class Task(NamedTuple):
  """Questions and their reward.

  name: str, as given to `get`.
  draw: function (seed, n, heldout) -> list of n questions. The seed is an int,
    or a text without spaces such as '3-17' for seed 3 and round 17. Questions
    are for evaluation if `heldout`, else for training. They can repeat.
  reward: name of the reward, see rewards.find.
  """

  name: str
  draw: Callable
  reward: str


def get(name):
  """Returns a task.

  Args:
    name: name of TASKS; 'reasoning_gym:NAME,NAME'; or a file of JSON lines with
      `prompt` and `answer`, as FILE.jsonl.

  Raises:
    UserError: the name is not known, or the file is not valid. Calls of `draw`
      raise it for tasks of reasoning-gym, and for files without enough lines.
  """
  if name in TASKS:
    return Task(name, *TASKS[name])
  if name.startswith(GYM):
    names = name.removeprefix(GYM).split(',')
    return Task(name, functools.partial(_of_gym, names), 'math')
  if name.endswith('.jsonl'):
    return Task(name, functools.partial(_of_file, _read(name)), 'math')
  raise UserError(
    f'task {name!r}: choose one of {", ".join(TASKS)}, or write FILE.jsonl or '
    f'{GYM}NAME{suggestion(name, TASKS)}'
  )


def _puzzles(name, seed, n, heldout, **options):
  return puzzles.make(name, seed, n, heldout, split='content', **options)


def _countdown_tags(seed, n, heldout, numbers):
  found = _puzzles('countdown', seed, n, heldout, numbers=numbers)
  return [_in_words_countdown(puzzle) for puzzle in found]


def _in_words_countdown(puzzle):
  given, _, target = puzzle['prompt'].rstrip(':').partition('->')
  numbers = [int(number) for number in given.split(',')]
  listed = ', '.join(map(str, numbers))
  return {
    'prompt': (
      f'Make the number {int(target)} from the numbers {listed}. Use each of '
      'them once, with + - * / and brackets. ' + FORM.format('expression')
    ),
    'answer': _tagged(puzzle['answer']),
    'numbers': numbers,
    'target': int(target),
  }


def _sudoku_tags(seed, n, heldout):
  return [
    {
      'prompt': (
        'Solve this sudoku with the digits 1 to 4. Each row, column and 2x2 '
        'square has each digit once. The cells are given row by row, 0 for an '
        f'empty cell: {puzzle["prompt"][:16]}\n'
        + FORM.format('16 digits of the solution')
      ),
      'answer': _tagged(puzzle['answer']),
      'puzzle': puzzle['prompt'][:16],
      'solution': puzzle['answer'],
    }
    for puzzle in _puzzles('sudoku', seed, n, heldout)
  ]


def _word_problems_tags(seed, n, heldout):
  found = []
  for question in word_problems.questions(seed, n, heldout):
    work, _, number = question['answer'].partition(word_problems.MARK)
    answer = _tagged(number.strip())
    found.append(
      {
        **question,
        'prompt': question['prompt'] + FORM.format('number'),
        'answer': f'<reasoning>\n{work}</reasoning>\n{answer}',
      }
    )
  return found


def _tagged(answer):
  return f'<answer>\n{answer}\n</answer>\n'


def _of_gym(names, seed, n, heldout):
  # The package takes an int.
  seed = random.Random(f'gym {seed}').randrange(2**31)
  return reasoning_tasks.questions(names, seed, n, heldout)


def _read(path):
  """Returns the questions of a file."""
  found = []
  for where, line in reading.lines(local_path(path)):
    value = reading.parse_json(line, where)
    texts = isinstance(value, dict) and [
      value.get('prompt', value.get('question')),
      value.get('answer'),
    ]
    if not texts or not all(isinstance(text, str) and text for text in texts):
      raise UserError(f'{where}: a question has the texts prompt and answer')
    found.append({**value, 'prompt': texts[0]})
  if not found:
    raise UserError(f'{path!r} has no questions')
  return found


def _of_file(lines, seed, n, heldout):
  """Draws questions of a file in the order of a seed; they repeat at its end.

  Raises:
    UserError: no question of the file is for training, or for evaluation.
  """
  of_part = [
    line for line in lines if puzzles.is_held_out(line['prompt']) == heldout
  ]
  if not of_part:
    purpose = 'evaluation' if heldout else 'training'
    raise UserError(
      f'none of the {len(lines)} questions, such as '
      f'{inline(lines[0]["prompt"], 40)!r}, is for {purpose}: add questions'
    )
  rng = random.Random(f'file {seed}')
  found = []
  while len(found) < n:
    found += rng.sample(of_part, len(of_part))
  return found[:n]


_part = functools.partial
# Name -> (draw, name of the reward).
TASKS = {
  'addition': (_part(_puzzles, 'addition'), 'addition'),
  'addition_3': (_part(_puzzles, 'addition', digits=3), 'addition'),
  'countdown': (_part(_puzzles, 'countdown'), 'countdown'),
  'countdown_4': (_part(_puzzles, 'countdown', numbers=4), 'countdown'),
  'countdown_tags': (_part(_countdown_tags, numbers=3), 'countdown_tags'),
  'countdown_4_tags': (_part(_countdown_tags, numbers=4), 'countdown_tags'),
  'sudoku': (_part(_puzzles, 'sudoku'), 'sudoku'),
  'sudoku_tags': (_sudoku_tags, 'sudoku_tags'),
  'word_problems': (word_problems.questions, 'math'),
  'word_problems_numbers': (
    _part(word_problems.questions, split='numbers'),
    'math',
  ),
  'word_problems_tags': (_word_problems_tags, 'math'),
  'instructions': (instructions.questions, 'exact'),
}
