"""Questions of the package reasoning-gym, which makes them from a seed.

The package (https://github.com/open-thought/reasoning-gym) is optional. Its
questions get the split of our own: a hash of the question assigns it to
training or to evaluation.
"""

import difflib
import functools
import itertools

from maskdiff.errors import UserError, one_line
from maskdiff.evals.puzzles import HELD_OUT_ONE_IN, is_held_out


def questions(names, seed, n, heldout):
  """Makes questions of some tasks in turn.

  Args:
    names: names of tasks of the package, such as 'basic_arithmetic'.
    seed: int.
    n: number of questions.
    heldout: True makes questions for evaluation, False those for training.

  Returns:
    list of n dicts with the texts `task`, `prompt` and `answer`.

  Raises:
    UserError: the package is missing, it has no task of a name, a name is
      repeated, or a task fails or has too few different questions.
  """
  try:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS
  except ImportError as error:
    raise UserError(
      f'reasoning-gym is not installed ({error}): pip install reasoning-gym'
    ) from error
  for name in names:
    if name not in DATASETS:
      near = ', '.join(difflib.get_close_matches(name, DATASETS)) or 'another'
      raise UserError(f'reasoning-gym has no task {name!r}: try {near}')
    if names.count(name) > 1:  # its questions would be repeated too
      raise UserError(f'the task {name!r} is named twice: name it once')
  # Enough for either part of the split, also if some questions occur twice.
  size = 2 * HELD_OUT_ONE_IN * n + 100
  create = functools.partial(reasoning_gym.create_dataset, seed=seed, size=size)
  of_names = [_of_task(create, name, heldout) for name in names]
  found = [
    next(lines, None)
    for lines in itertools.islice(itertools.cycle(of_names), n)
  ]
  if None in found:
    name = names[found.index(None) % len(names)]
    raise UserError(
      f'{name!r} has too few questions: lower --num={n}, or leave it out'
    )
  return found


def _of_task(create, name, heldout):
  """Yields the different questions of a task that have a text as answer.

  Args:
    create: function from the name of a task to its questions.
    name: name of the task.
    heldout: see `questions`.
  """
  seen = set()
  for entry in _entries(create, name):
    prompt, answer = entry['question'], entry['answer']
    known = prompt in seen or not isinstance(answer, str)
    if not known and is_held_out(prompt) == heldout:
      seen.add(prompt)
      yield {'task': name, 'prompt': prompt, 'answer': answer}


def _entries(create, name):
  """Yields the entries of a task; what the package raises is a UserError."""
  try:
    yield from create(name)
  except Exception as error:  # of the code of the package
    raise UserError(
      f'the task {name!r} of reasoning-gym fails ({one_line(error)}): leave it '
      'out'
    ) from error
