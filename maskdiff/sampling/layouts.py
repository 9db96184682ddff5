"""Requests from tokens: prompts to continue, and texts with gaps to fill."""

import re

import numpy as np

from maskdiff.errors import UserError
from maskdiff.sampling.request import Request
from maskdiff.sampling.settings import DEFAULT

MAX_GAPS = 10**6  # tokens of all gaps of a text, where no context is known
GAP = re.compile(r'\{\{([0-9]+)\}\}')


def continue_prompts(
  prompts, gen_length, seeds=None, context=None, settings=DEFAULT
):
  """Returns a Request with slots for an answer after each prompt.

  Args:
    prompts: list of B token lists, of any lengths.
    gen_length: slots after each prompt.
    seeds: see `lay_out`.
    context: largest number of tokens of a row; fewer slots are added where a
      prompt leaves less room. At least one slot is added, so that
      `check_context` refuses a prompt that is too long. None: no limit.
    settings: see `lay_out`.

  Returns:
    Request; short rows are padded on the right.

  Raises:
    UserError: there are no prompts.
  """
  rows = [prompt_row(prompt, gen_length, context) for prompt in prompts]
  return lay_out(rows, seeds, settings)


def prompt_row(prompt, gen_length, context=None):
  """Returns the row of a prompt: int for a token, None for a slot.

  Args:
    prompt: list of tokens.
    gen_length: see `continue_prompts`.
    context: see `continue_prompts`.
  """
  slots = gen_length
  if context is not None:
    slots = max(min(slots, context - len(prompt)), 1)
  return [*prompt, *[None] * slots]


def fill_gaps(texts, encode, seeds=None, settings=DEFAULT):
  """Returns a Request for texts in which {{n}} is a gap of n tokens.

  Args:
    texts: list of B str, e.g. 'def area(r): return {{4}} * r ** 2'.
    encode: function from text to a list of tokens.
    seeds: see `lay_out`.
    settings: see `lay_out`.

  Returns:
    Request; short rows are padded on the right.

  Raises:
    UserError: there are no texts; a text has no gap, or only gaps of 0 tokens;
      or the gaps have more than MAX_GAPS tokens.
  """
  return lay_out([gap_row(text, encode) for text in texts], seeds, settings)


def gap_row(text, encode, context=None):
  """Returns the row of a text with gaps: int for a token, None for a slot.

  Args:
    text: see `fill_gaps`.
    encode: see `fill_gaps`.
    context: largest number of tokens of a row; None: MAX_GAPS.

  Raises:
    UserError: see `fill_gaps`; or the gaps have more tokens than the context.
  """
  parts = GAP.split(text)  # text, n, text, n, ..., text
  # Larger numbers are as wrong as this one; Python refuses very long numbers.
  sizes = [int(part.lstrip('0')[:12] or '0') for part in parts[1::2]]
  limit = MAX_GAPS if context is None else context
  if sum(sizes) > limit:
    raise UserError(
      f'the gaps have {sum(sizes)} tokens together, more than '
      + (
        f'any model has: at most {limit}'
        if context is None
        else f'a row of config.data.length={context}: ask for fewer tokens'
      )
    )
  row = list(encode(parts[0]))
  for size, part in zip(sizes, parts[2::2], strict=True):
    row += [None] * size
    row += encode(part)
  if None not in row:
    raise UserError(
      f'no gap in {text[:60]!r}: write {{{{n}}}} where n tokens are to be '
      'filled'
    )
  return row


def lay_out(rows, seeds=None, settings=DEFAULT):
  """Returns a Request for rows of tokens and slots, padded to one length.

  Args:
    rows: list of B lists; int for a token, None for a slot.
    seeds: [B] int; by default 0 to B - 1.
    settings: Settings; a field has one value for all rows, or one per row.

  Raises:
    UserError: there are no rows.
  """
  if not rows:
    raise UserError('there are no prompts to sample from')
  length = max(map(len, rows))
  canvas = np.zeros((len(rows), length), np.int32)
  fill, valid = np.zeros(canvas.shape, bool), np.zeros(canvas.shape, bool)
  for i, row in enumerate(rows):
    canvas[i, : len(row)] = [0 if t is None else t for t in row]
    fill[i, : len(row)] = [t is None for t in row]
    valid[i, : len(row)] = True
  seeds = range(len(rows)) if seeds is None else seeds
  return Request(canvas, fill, valid, np.array(seeds), settings)


def widen(request, length):
  """Returns the same rows with padding on the right, [B, length].

  Padding does not change the tokens of a row. Each length needs a compiled
  program, so padding to a few lengths saves compilations.

  Args:
    request: Request.
    length: at least L of the request.
  """
  canvas, fill, valid, *others = request
  added = length - canvas.shape[1]
  padded = (np.pad(x, ((0, 0), (0, added))) for x in (canvas, fill, valid))
  return Request(*padded, *others)


def check_context(context, length):
  """Checks that a row is not longer than the training rows.

  Args:
    context: tokens of a training row, config.data.length.
    length: tokens and slots of the row.

  Raises:
    UserError: the row is too long.
  """
  if length > context:
    raise UserError(
      f'prompt and answer have {length} tokens together, but the model was '
      f'trained on rows of config.data.length={context}: shorten the prompt or '
      'ask for fewer tokens'
    )


def cut(canvas, fill, eos_id):
  """Returns the positions before the first eos among the slots.

  Args:
    canvas: [..., L] int32, filled.
    fill: [..., L] bool, the slots.
    eos_id: int; an eos in the prompt does not count.

  Returns:
    [..., L] bool; all True in a row without eos among its slots.
  """
  is_eos = np.asarray(fill) & (np.asarray(canvas) == eos_id)
  return np.cumsum(is_eos, axis=-1) == 0
