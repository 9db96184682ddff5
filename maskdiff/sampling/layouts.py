"""Canvases with slots to fill: prompts with room for answers, texts with gaps.

Functions here return a Request: see request.Request.
"""

import re

import numpy as np

from maskdiff.errors import UserError
from maskdiff.sampling.request import Request

GAP = re.compile(r'\{\{(\d+)\}\}')


def continue_prompts(prompts, gen_length, seeds=None, context=None):
  """Lays out prompts of any lengths with room for an answer after each.

  Args:
    prompts: list of token lists.
    gen_length: slots after each prompt.
    seeds: see `lay_out`.
    context: if it is given, no more slots than are left of so many tokens; but
      one, so that a prompt that is too long is noticed.

  Returns:
    Request; short rows are padded on the right.

  Raises:
    UserError: there are no prompts.
  """
  rows = []
  for prompt in prompts:
    slots = gen_length
    if context is not None:
      slots = max(min(slots, context - len(prompt)), 1)
    rows.append([*prompt, *[None] * slots])
  return lay_out(rows, seeds)


def cut(canvas, fill, eos_id):
  """What is left of rows whose text ends at the first eos among the slots.

  Args:
    canvas: [B, L] int32, filled.
    fill: [B, L] bool, the slots.
    eos_id: int; one that stands in a prompt ends nothing.

  Returns:
    [B, L] bool, True before that eos.
  """
  ends = np.asarray(fill) & (np.asarray(canvas) == eos_id)
  return np.cumsum(ends, axis=1) == 0


def fill_gaps(texts, encode, seeds=None):
  """Lays out texts in which {{n}} stands for a gap of n tokens.

  Args:
    texts: list of str, e.g. 'def area(r): return {{4}} * r ** 2'.
    encode: from text to a list of tokens.
    seeds: see `lay_out`.

  Returns:
    Request.

  Raises:
    UserError: a text has no gap, or none but empty ones, or one of a million
      tokens; or there is no text.
  """
  rows = []
  for text in texts:
    parts = GAP.split(text)  # text, n, text, n, ..., text
    row = []
    for i, part in enumerate(parts):
      if i % 2 and len(part.lstrip('0')) > 6:
        raise UserError(f'a gap of {part[:20]} tokens is too long: no row is')
      row += [None] * int(part[-7:]) if i % 2 else encode(part)
    if None not in row:
      raise UserError(
        f'no gap in {text!r}: write {{{{n}}}} where n tokens are to be filled'
      )
    rows.append(row)
  return lay_out(rows, seeds)


def widen(request, length):
  """The same rows with padding on the right, [B, length].

  What is sampled for a row does not depend on it, but a program is compiled
  for every length.

  Args:
    request: Request.
    length: at least L of the request.
  """
  *arrays, seeds = request
  more = length - request.canvas.shape[1]
  return Request(*(np.pad(x, ((0, 0), (0, more))) for x in arrays), seeds)


def check_context(context, valid):
  """Checks that rows to sample are not longer than those of the training.

  Args:
    context: tokens of those, config.data.length.
    valid: [B, L] bool, False on padding.

  Raises:
    UserError: a row is too long.
  """
  longest = int(valid.sum(axis=1).max())
  if longest > context:
    raise UserError(
      f'prompt and answer have {longest} tokens together, but the model was '
      f'trained on rows of config.data.length={context}: shorten the prompt or '
      'ask for fewer tokens'
    )


def lay_out(rows, seeds=None):
  """Pads rows of tokens, None where a slot is, to one length.

  Args:
    rows: list of B lists of int or None.
    seeds: [B] int; by default 0, 1, 2, ...

  Returns:
    Request.

  Raises:
    UserError: there are no rows.
  """
  if not rows:
    raise UserError('nothing to sample from: there are no prompts')
  length = max(map(len, rows))
  canvas = np.zeros((len(rows), length), np.int32)
  fill, valid = np.zeros(canvas.shape, bool), np.zeros(canvas.shape, bool)
  for i, row in enumerate(rows):
    canvas[i, : len(row)] = [0 if t is None else t for t in row]
    fill[i, : len(row)] = [t is None for t in row]
    valid[i, : len(row)] = True
  seeds = range(len(rows)) if seeds is None else seeds
  return Request(canvas, fill, valid, np.array(seeds))
