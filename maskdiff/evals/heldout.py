"""Questions made from the held-out text of a run's own data.

`choices` asks which text goes on where another ends, `cloze` for a word that
was taken out. Both are lines for tasks.py, drawn from a seed.
"""

import random
import re

import numpy as np

from maskdiff.data import records
from maskdiff.errors import UserError
from maskdiff.training import inputs

NUM_CHOICES = 4
MOST_ROWS = 4096  # of a dataset, about
TRIES = 100  # places for each line that is to be made
BROKEN = '\ufffd'  # where a character was cut
WORD = re.compile(r' ?[^\W\d_]{3,}')


def documents(config, tokenizer):
  """The held-out documents of a run's data, as token lists.

  Those that a row cuts are pieces. Of `eval.path`, if the run was given one. Of
  much text, rows evenly spread over it.

  Raises:
    UserError: there is no held-out text; or see run.open_data.
  """
  found = []
  for dataset in inputs.open_data(config, tokenizer, config.eval.path or None):
    source = records.RowSource(dataset.directory, dataset.manifest, 'heldout')
    step = max(1, len(source) // MOST_ROWS)
    for i in range(0, len(source), step):
      row = np.asarray(source[i], np.int32)
      ends = np.flatnonzero(row == tokenizer.eos_id) + 1
      pieces = np.split(row, ends)
      found += [p[p != tokenizer.eos_id].tolist() for p in pieces]
  found = [piece for piece in found if piece]
  if not found:
    raise UserError(
      f'{config.eval.path or config.data.path} has no held-out text to make '
      'questions from: prepare some, or give --data'
    )
  return found


def choices(found, tokenizer, context, seed, n):
  """Multiple choice: how a text goes on, among continuations from elsewhere.

  Args:
    found: list of token lists, from `documents`.
    tokenizer: data.tokenizer.Tokenizer.
    context: tokens of the longest row.
    seed: int.
    n: questions.

  Returns:
    list of dicts with `prompt`, `choices` of equally many tokens, and the
    number of the right one as `answer`.

  Raises:
    UserError: the documents are too short or too few.
  """
  answer = min(16, context // 4)
  size = min(64, context // 2) + answer
  rng = random.Random(f'choices {seed}')
  lines = []
  source = _windows(found, size, rng, n)
  for asked, *others in zip(*[source] * NUM_CHOICES, strict=False):
    prompt = tokenizer.decode(asked[:-answer])
    texts = [tokenizer.decode(w[-answer:]) for w in (asked, *others)]
    if len({t.strip() for t in texts} - {''}) < NUM_CHOICES:
      continue
    if BROKEN in prompt + ''.join(texts):
      continue
    order = rng.sample(range(NUM_CHOICES), NUM_CHOICES)
    lines.append(
      {
        'prompt': prompt,
        'choices': [texts[i] for i in order],
        'answer': order.index(0),
      }
    )
    if len(lines) == n:
      return lines
  raise _too_few(lines, n)


def cloze(found, tokenizer, context, seed, n):
  """Texts with a word left out.

  Only words whose tokens are not joined with those beside them are asked for:
  the tokens of the parts are those of the whole.

  Args and errors as for `choices`.

  Returns:
    list of dicts with `prompt`, `answer` and `suffix`; the answer is a word of
    three letters at least, with the space before it.
  """
  rng = random.Random(f'cloze {seed}')
  lines = []
  for window in _windows(found, min(64, context * 3 // 4), rng, n):
    text = tokenizer.decode(window)
    whole = tokenizer.encode(text)
    words = list(WORD.finditer(text))
    rng.shuffle(words)
    for word in words:
      parts = text[: word.start()], word[0], text[word.end() :]
      if (
        all(parts)
        and BROKEN not in text
        and sum(map(tokenizer.encode, parts), []) == whole
      ):
        names = 'prompt', 'answer', 'suffix'
        lines.append(dict(zip(names, parts, strict=True)))
        break
    if len(lines) == n:
      return lines
  raise _too_few(lines, n)


def _too_few(lines, n):
  return UserError(
    f'the held-out text gives {len(lines)} of {n} lines: there are too few '
    'words or too little that differs; give --data'
  )


def _windows(found, size, rng, n):
  """Pieces of `size` tokens, TRIES for each of n; each place is as likely."""
  starts = np.cumsum([max(0, len(ids) - size + 1) for ids in found])
  if starts[-1] < 100:
    raise UserError(
      f'the held-out text has {starts[-1]} places to take {size} tokens in a '
      'row from: prepare more of it, or give --data'
    )

  def of(place):
    i = int(np.searchsorted(starts, place, side='right'))
    start = place - int(starts[i - 1] if i else 0)
    return found[i][start : start + size]

  return (of(rng.randrange(int(starts[-1]))) for _ in range(TRIES * n))
