"""A small instruction set that needs no download, drawn from a seed.

  What is 417 + 385?                     802
  Sort the numbers 7 3 9.                3 7 9
  Reverse the word kotalu.               ulatok
  Reverse the letters k o t a l u.       u l a t o k
  Which Python module reads CSV files?   csv

Words are random syllables or modules of the Python standard library, which is
the embedded corpus. A hash of the question assigns it to training or to
evaluation, so no conversation for training has a question for evaluation,
whatever the seeds.
"""

import random

from maskdiff.errors import UserError
from maskdiff.evals.puzzles import is_held_out

SYSTEM = 'Answer with a word or a number.'
SYSTEM_SHARE = 0.2  # of conversations
MAX_EXCHANGES = 3
CONSONANTS, VOWELS = 'bdfgklmnprstvz', 'aeiou'
# What a module of the standard library does, by its name.
MODULES = {
  'argparse': 'parses command lines',
  'ast': 'parses Python code',
  'base64': 'encodes bytes as letters',
  'bisect': 'finds places in sorted lists',
  'calendar': 'prints calendars',
  'copy': 'copies objects',
  'csv': 'reads CSV files',
  'datetime': 'computes with dates',
  'decimal': 'computes with decimal numbers',
  'difflib': 'compares lines of text',
  'fractions': 'computes with fractions',
  'glob': 'finds files by patterns',
  'gzip': 'reads compressed files',
  'hashlib': 'computes hashes',
  'heapq': 'keeps heaps',
  'json': 'reads JSON',
  'logging': 'writes logs',
  'pickle': 'stores objects as bytes',
  'random': 'draws random numbers',
  'shutil': 'copies files',
  'socket': 'opens network connections',
  'statistics': 'computes averages',
  'string': 'lists the letters',
  'subprocess': 'starts other programs',
  'tempfile': 'makes temporary files',
  'threading': 'starts threads',
  'unittest': 'runs tests',
  'zipfile': 'reads zip files',
}


def questions(seed, n, heldout, tasks=None):
  """Draws questions with their answers from a seed.

  Args:
    seed: int.
    n: number of questions; repetitions are possible.
    heldout: True draws questions for evaluation, False those for training.
    tasks: names of TASKS; None: all.

  Returns:
    list of n dicts with the texts `task`, `prompt` and `answer`.

  Raises:
    UserError: a task is not in TASKS.
  """
  tasks = _known(tasks)
  rng = random.Random(f'questions {seed}')
  return [_question(rng, heldout, tasks) for _ in range(n)]


def conversations(seed, n, tasks=None):
  """Draws conversations for training from a seed.

  A conversation has one to MAX_EXCHANGES questions with their answers. A share
  SYSTEM_SHARE of them begins with a system turn.

  Args:
    seed: int.
    n: number of conversations.
    tasks: see `questions`.

  Returns:
    list of n dicts with `messages`, for `launch/prepare.py --chat`.

  Raises:
    UserError: as `questions`.
  """
  tasks = _known(tasks)
  rng = random.Random(f'conversations {seed}')
  return [{'messages': _messages(rng, tasks)} for _ in range(n)]


def preferences(seed, n, tasks=None):
  """Draws questions with a right and a wrong answer from a seed.

  The wrong answer is right for another question of the same task.

  Args:
    seed: int.
    n: number of pairs.
    tasks: see `questions`.

  Returns:
    list of n dicts with the texts `prompt`, `chosen` and `rejected`, for
    `launch/prepare.py --layout=pairs`.

  Raises:
    UserError: as `questions`.
  """
  tasks = _known(tasks)
  rng = random.Random(f'preferences {seed}')
  return [_pair(rng, tasks) for _ in range(n)]


def _known(tasks):
  tasks = list(TASKS) if tasks is None else list(tasks)
  unknown = [name for name in tasks if name not in TASKS]
  if unknown or not tasks:
    raise UserError(f'tasks {unknown}: choose among {", ".join(TASKS)}')
  return tasks


def _messages(rng, tasks):
  turns = []
  if rng.random() < SYSTEM_SHARE:
    turns.append({'role': 'system', 'content': SYSTEM})
  for _ in range(rng.randint(1, MAX_EXCHANGES)):
    question = _question(rng, False, tasks)
    turns.append({'role': 'user', 'content': question['prompt']})
    turns.append({'role': 'assistant', 'content': question['answer']})
  return turns


def _pair(rng, tasks):
  question = _question(rng, False, tasks)
  rejected = chosen = question['answer']
  while rejected == chosen:
    rejected = TASKS[question['task']](rng)[1]
  prompt = question['prompt']
  return {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}


def _question(rng, heldout, tasks):
  while True:
    task = rng.choice(tasks)
    wordings, answer = TASKS[task](rng)
    prompt = rng.choice(wordings)
    if is_held_out(prompt) == heldout:
      return {'task': task, 'prompt': prompt, 'answer': answer}


# A task draws (wordings of a question, its answer).


def _addition(rng):
  a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
  return (
    f'What is {a} + {b}?',
    f'Add {a} and {b}.',
    f'{a}+{b}=?',
  ), str(a + b)


def _subtraction(rng):
  b, a = sorted((rng.randrange(1000), rng.randrange(1000)))
  return (f'What is {a} - {b}?', f'Subtract {b} from {a}.'), str(a - b)


def _larger(rng):
  a, b = rng.sample(range(1000), 2)
  return (
    f'Which is larger, {a} or {b}?',
    f'Name the larger number: {a} or {b}.',
  ), str(max(a, b))


def _sorting(rng):
  numbers = [rng.randrange(10) for _ in range(rng.randint(3, 6))]
  shown, answer = (' '.join(map(str, x)) for x in (numbers, sorted(numbers)))
  return (f'Sort the numbers {shown}.', f'Sort: {shown}'), answer


def _reversal(rng):
  word = _word(rng)
  return (
    f'Reverse the word {word}.',
    f'Write {word} backwards.',
  ), word[::-1]


def _letters(rng):
  letters = ' '.join(_word(rng))
  return (
    f'Reverse the letters {letters}.',
    f'Write backwards: {letters}',
  ), letters[::-1]


def _spelling(rng):
  word = _word(rng)
  return (f'Spell {word}.', f'How is {word} spelled?'), ' '.join(word)


def _capitals(rng):
  word = _word(rng)
  return (f'Write {word} in capitals.', f'Capitalize {word}.'), word.upper()


def _length(rng):
  word = _word(rng)
  return (
    f'How many letters does {word} have?',
    f'Count the letters of {word}.',
  ), str(len(word))


def _last_letter(rng):
  word = _word(rng)
  return (
    f'What is the last letter of {word}?',
    f'Name the last letter of {word}.',
  ), word[-1]


def _module(rng):
  name = rng.choice(list(MODULES))
  does = MODULES[name]
  return (
    f'Which Python module {does}?',
    f'Name the Python module that {does}.',
    f'Python module that {does}:',
  ), name


def _word(rng):
  if rng.random() < 0.2:
    return rng.choice([name for name in MODULES if name.isalpha()])
  syllable = lambda: rng.choice(CONSONANTS) + rng.choice(VOWELS)
  return ''.join(syllable() for _ in range(rng.randint(2, 3)))


TASKS = {
  'addition': _addition,
  'subtraction': _subtraction,
  'larger': _larger,
  'sorting': _sorting,
  'reversal': _reversal,
  'letters': _letters,
  'spelling': _spelling,
  'capitals': _capitals,
  'length': _length,
  'last_letter': _last_letter,
  'module': _module,
}
