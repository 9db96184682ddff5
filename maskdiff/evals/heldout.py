"""Questions made from the held-out text of a run's data.

`choices` asks for the continuation of a text, `cloze` for a missing word. Both
draw lines of an evaluation task from a seed.
"""

import random
import re

import numpy as np

from maskdiff.data import row_reader
from maskdiff.data import rows as rows_lib
from maskdiff.errors import UserError
from maskdiff.training import inputs

NUM_CHOICES = 4
MAX_ROWS = 4096  # read fewer than twice this number of rows per dataset
TRIES = 100  # draw at most this many windows per requested line
BROKEN = '\ufffd'  # the decoder's result for a character that a window cuts
WORD = re.compile(r' ?[^\W\d_]{3,}')


def documents(config, tokenizer):
  """Returns the held-out documents of a run's data, a list of token lists.

  The text comes from config.eval.path, or from config.data.path if the former
  is empty. A document that continues in another row gives several token lists.
  From a large dataset, evenly spaced rows are read, at least MAX_ROWS and fewer
  than twice as many.

  Raises:
    UserError: there is no held-out text, or see inputs.open_data.
  """
  found = []
  for dataset in inputs.open_data(config, tokenizer, config.eval.path or None):
    source = row_reader.RowSource(
      dataset.directory, dataset.manifest, 'heldout'
    )
    step = max(1, len(source) // MAX_ROWS)
    for i in range(0, len(source), step):
      row = rows_lib.map_columns(lambda x: x[0], source.read([i]))
      pieces = rows_lib.split_documents(row, tokenizer.eos_id)
      found += [p[p != tokenizer.eos_id].tolist() for p in pieces]
  found = [piece for piece in found if piece]
  if not found:
    raise UserError(
      f'{config.eval.path or config.data.path} has no held-out text to make '
      'questions from: prepare data with held-out rows, or give --data'
    )
  return found


def choices(texts, tokenizer, context, seed, n):
  """Makes multiple-choice questions: which continuation belongs to a text.

  The wrong continuations are from other places in the held-out text.

  Args:
    texts: list of token lists, from `documents`.
    tokenizer: data.tokenizer.Tokenizer.
    context: largest number of tokens of a row.
    seed: int.
    n: number of questions.

  Returns:
    list of n dicts: `prompt`; `choices`, decoded from equally many tokens; and
    `answer`, the index of the right choice.

  Raises:
    UserError: the texts are too short or too few.
  """
  answer_length = min(16, context // 4)
  size = min(64, context // 2) + answer_length
  rng = random.Random(f'choices {seed}')
  lines = []
  windows = _windows(texts, size, rng, n)
  for window, *others in zip(*[windows] * NUM_CHOICES, strict=False):
    prompt = tokenizer.decode(window[:-answer_length])
    endings = [tokenizer.decode(w[-answer_length:]) for w in (window, *others)]
    if len({t.strip() for t in endings} - {''}) < NUM_CHOICES:
      continue
    if BROKEN in prompt + ''.join(endings):
      continue
    order = rng.sample(range(NUM_CHOICES), NUM_CHOICES)
    lines.append(
      {
        'prompt': prompt,
        'choices': [endings[i] for i in order],
        'answer': order.index(0),
      }
    )
    if len(lines) == n:
      return lines
  raise _too_few(lines, n)


def cloze(texts, tokenizer, context, seed, n):
  """Makes cloze questions: texts with one missing word.

  A word is used only if no token spans its border: the tokens of the three
  parts, concatenated, are the tokens of the whole text.

  Arguments and errors as for `choices`.

  Returns:
    list of n dicts with `prompt`, `answer` and `suffix`. The answer is a word
    of at least three letters, with the space before it if there is one.
  """
  rng = random.Random(f'cloze {seed}')
  lines = []
  for window in _windows(texts, min(64, context * 3 // 4), rng, n):
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
    f'the held-out text is too short or too uniform: it gives {len(lines)} of '
    f'{n} lines; give --data'
  )


def _windows(texts, size, rng, n):
  """Yields TRIES * n windows of `size` tokens, uniformly over all positions."""
  # num_starts[i]: number of starts of windows within the texts 0 to i.
  num_starts = np.cumsum([max(0, len(ids) - size + 1) for ids in texts])
  total = int(num_starts[-1])
  if total < 100:
    raise UserError(
      f'the held-out text has {total} windows of {size} tokens, fewer than '
      '100: prepare more held-out text, or give --data'
    )

  def window(k):
    i = int(np.searchsorted(num_starts, k, side='right'))
    start = k - int(num_starts[i - 1] if i else 0)
    return texts[i][start : start + size]

  return (window(rng.randrange(total)) for _ in range(TRIES * n))
