"""Answers to prompts, and texts with their gaps filled, as launch/sample.py
gives them: many in batches, a few watched step by step, or one by one.

An answer is a dict: `prompt` or `infill`, what was asked; `seed`; `text`, the
whole; of prompts `answer`, what was added, up to its eos if that ends it;
`tokens` of it; `forwards`, passes through the network that they took, and
`positions`, how many were computed in them.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError
from maskdiff.model.network import Network
from maskdiff.sampling import layouts, prompts, refill, replay, sampler
from maskdiff.sampling.request import Request, SamplerConfig, describe

SHORTEST_ROW = 32  # that a program is compiled for in a conversation


class Sampling(NamedTuple):
  """A loaded model, and how to sample from it."""

  network: Network
  c: SamplerConfig
  tokenizer: Tokenizer
  context: int  # tokens of the rows that it was trained on


class Counts(NamedTuple):
  """What an answer took; see request.Carry."""

  forwards: int
  positions: int


class Texts(NamedTuple):
  """Texts to continue, or texts with gaps to fill, one in each row."""

  prompts: list[prompts.Prompt]
  gaps: bool  # True: texts with gaps; False: prompts to continue
  request: Request


def encode_texts(texts, gaps, encode, gen_length, context=None):
  """Encodes texts into a Request.

  Args:
    texts: list of prompts.Prompt.
    gaps: whether their gaps are to be filled.
    encode: from text to a list of tokens.
    gen_length: of the answers, if there are no gaps.
    context: see `layouts.continue_prompts`.

  Returns:
    Texts.

  Raises:
    UserError: see `layouts.fill_gaps`; or a text is no Unicode.
  """
  seeds = [p.seed for p in texts]
  strings = [p.text for p in texts]
  for text in strings:
    prompts.check_unicode(text, f'{text[:60]!r} is not UTF-8')
  if gaps:
    request = layouts.fill_gaps(strings, encode, seeds)
  else:
    request = layouts.continue_prompts(
      list(map(encode, strings)), gen_length, seeds, context
    )
  return Texts(texts, gaps, request)


def in_batches(s, texts, batch):
  """Yields the answers in order, up to `batch` of them computed together.

  Args:
    s: Sampling.
    texts: Texts.
    batch: texts sampled at once.

  Raises:
    UserError: see `sampler.generate`; after the answers that could be given.
  """
  early, first, broken = {}, 0, []
  for found in refill.answers(s.network, s.c, texts.request, batch):
    early[found.row] = found
    while first in early:
      found = early.pop(first)
      if found.broken:
        broken.append(first)
      else:
        yield _answer(s, texts, first, found.tokens, found)
      first += 1
  if broken:
    raise sampler.broken_error(broken)


def watched(s, texts, see):
  """Answers, step by step.

  Args:
    s: Sampling.
    texts: Texts.
    see: None, or what is called with the list of texts before every step and
      after the last.

  Returns:
    List of answers as `in_batches` yields them, and a replay.Recording.

  Raises:
    UserError: see `sampler.generate`.
  """
  canvases, sures = [], []

  def answers_of(canvas, counts):
    return [
      _answer(s, texts, row, tokens, Counts(*counts))
      for row, (tokens, *counts) in enumerate(zip(canvas, *counts, strict=True))
    ]

  for carry, sure in sampler.walk(s.network, s.c, texts.request):
    canvas, *counts = jax.device_get(
      (carry.canvas, carry.forwards, carry.positions)
    )
    canvases.append(canvas)
    sures.append(sure)
    if see:
      see([a['text'] for a in answers_of(canvas, counts)])
  found = answers_of(canvas, counts)
  return found, replay.Recording(
    np.stack(canvases),
    np.stack(sures),
    texts.request.fill,
    texts.request.valid,
  )


def page(s, texts, recording, **settings):
  """The page that replays what was watched; see `replay.page`.

  Args:
    s: Sampling.
    texts: Texts.
    recording: replay.Recording.
    **settings: what to tell besides the SamplerConfig.
  """
  kind = 'gaps' if texts.gaps else 'prompt'
  titles = [
    f'{kind} {number}, seed {prompt.seed}'
    for number, prompt in enumerate(texts.prompts, start=1)
  ]
  settings = describe(s.network, s.c) | settings
  return replay.page(recording, s.tokenizer, titles, settings)


def for_gaps(c, steps=None):
  """The settings for texts with gaps, of which each has steps of its own.

  Args:
    c: SamplerConfig for prompts.
    steps: of a text; by default one a token.
  """
  return dataclasses.replace(
    c, steps=steps or 0, own_blocks=True, stop_at_eos=False, lookahead=-1
  )


def converse(s, lines, seed, note, gap_steps=None):
  """Yields an answer to every line that can be answered.

  A line is continued by c.gen_length tokens; or, if it has gaps, {{n}} for n
  tokens, they are filled. Rows are padded to a power of two, so that few
  programs are compiled, and answers are what they would be without.

  Args:
    s: Sampling.
    lines: iterable of str, each a request.
    seed: of the first answer; the n-th after it has seed + n.
    note: is called with a line of text when a line cannot be answered, and
      when a program is compiled.
    gap_steps: see `for_gaps`.
  """
  compiled = set()
  for line in lines:
    try:
      texts = _encode_line(s, line, seed)
      c = for_gaps(s.c, gap_steps) if texts.gaps else s.c
      length = texts.request.canvas.shape[1]
      if (c, length) not in compiled:
        note(f'compiling for texts of up to {length} tokens')
        compiled.add((c, length))
      (found,) = in_batches(s._replace(c=c), texts, batch=1)
    except UserError as error:
      note(f'error: {error}')
      continue
    seed += 1
    yield found


def _encode_line(s, line, seed):
  if not line.strip():
    raise UserError(
      'the line is empty: write a text to continue, or one with gaps, {{n}} '
      'for n tokens'
    )
  gaps = '{{' in line
  if '{{' in layouts.GAP.sub('', line):
    raise UserError(
      f'{line[:60]!r} has braces that are no gap: write {{{{n}}}} where n '
      'tokens are to be filled, or give a text with such braces as --prompt'
    )
  texts = encode_texts(
    [prompts.Prompt(line, seed)],
    gaps,
    s.tokenizer.encode,
    s.c.gen_length,
    s.context if s.c.lookahead >= 0 else None,
  )
  request = texts.request
  layouts.check_context(s.context, request.valid)
  slots, length = request.fill.sum(), request.canvas.shape[1]
  if slots > s.c.gen_length:
    raise UserError(
      f'the gaps have {slots} tokens together: start again with '
      f'--gen_length={slots} instead of {s.c.gen_length}'
    )
  padded = max(SHORTEST_ROW, 1 << (length - 1).bit_length())
  padded = max(length, min(padded, s.context))
  return texts._replace(request=layouts.widen(request, padded))


def _answer(s, texts, row, tokens, took):
  """The answer in a row, given its [L] tokens and what it took."""
  fill, valid = texts.request.fill[row], texts.request.valid[row]
  answer = fill
  if s.c.stop_at_eos:
    answer = fill & layouts.cut(tokens[None], fill[None], s.network.eos_id)[0]
  found = {
    'infill' if texts.gaps else 'prompt': texts.prompts[row].text,
    'seed': texts.prompts[row].seed,
    'text': s.tokenizer.decode(tokens[(valid & ~fill) | answer]),
    'tokens': int(answer.sum()),
    'forwards': int(took.forwards),
    'positions': int(took.positions),
  }
  if not texts.gaps:
    found['answer'] = s.tokenizer.decode(tokens[answer])
  return found
