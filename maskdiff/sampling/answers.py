"""Answers to texts: in batches, recorded step by step, or in a conversation.

An answer is a dict, which launch/sample.py writes as a line of JSON:

    prompt or infill  the text that was continued, or the text with gaps
    seed              int
    text              the whole text
    answer            the added text, cut at its first eos if the sampler stops
                      at eos; missing for texts with gaps
    tokens            number of tokens in the answer, or in the gaps
    forwards          forward passes of the row
    positions         number of positions that these passes computed

With Sampling.trajectory it also says how the row was filled, in lists with one
entry per slot of the row, from left to right. The slots after an eos, which
`answer` leaves out, are among them.

    ids               token
    steps             denoising step that filled the slot, from 1
    confidence        of the token when it was committed; null for slots that
                      were filled with eos because an eos came before
    slots             index of the slot in the row
    given_ids         tokens of the row that are not slots, from left to right
    settings          dict of the settings that sampling depends on
"""

from typing import NamedTuple

import numpy as np

from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError
from maskdiff.model.network import Network
from maskdiff.sampling import (
  layouts,
  prompts,
  recording,
  refill,
  replay,
  sampler,
)
from maskdiff.sampling.request import Request
from maskdiff.sampling.settings import (
  SamplerConfig,
  Settings,
  describe,
  for_gaps,
)

SHORTEST_ROW = 32  # rows of a conversation are padded to at least this length


class Sampling(NamedTuple):
  """A loaded model and the settings to sample with."""

  network: Network
  c: SamplerConfig
  settings: Settings
  tokenizer: Tokenizer
  context: int  # tokens of a training row
  trajectory: bool = False  # whether answers have the step of every slot


class Texts(NamedTuple):
  """Texts to continue, or texts with gaps to fill, one in each row."""

  prompts: list[prompts.Prompt]
  gaps: bool  # True: texts with gaps; False: prompts to continue
  request: Request


def encode_texts(texts, gaps, encode, gen_length, context=None):
  """Encodes texts and returns them with their Request, as Texts.

  Args:
    texts: list of prompts.Prompt.
    gaps: True: fill the gaps of the texts; False: continue the texts.
    encode: function from text to a list of tokens.
    gen_length: slots after each text; not used with gaps.
    context: see `layouts.continue_prompts`; not used with gaps.

  Raises:
    UserError: see `layouts.fill_gaps`; or a text is not valid Unicode.
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
  """Yields the answers in order, computed in batches.

  Args:
    s: Sampling.
    texts: Texts.
    batch: rows sampled at once.

  Raises:
    UserError: see `sampler.generate`. Rows with NaN or infinite logits are
      reported after all other answers were yielded.
  """
  finished, next_row, broken = {}, 0, []
  request = texts.request._replace(settings=s.settings)
  for filled in refill.answers(s.network, s.c, request, batch):
    finished[filled.row] = filled
    while next_row in finished:
      filled = finished.pop(next_row)
      if filled.broken:
        broken.append(next_row)
      else:
        counts = filled.forwards, filled.positions
        yield _answer(s, texts, next_row, filled.recording, *counts)
      next_row += 1
  if broken:
    raise sampler.broken_error(broken)


def record(s, texts, show=None):
  """Returns the answers and the recording of each.

  Args:
    s: Sampling.
    texts: Texts.
    show: function that is called with the list of texts before every step and
      after the last.

  Returns:
    List of answers as `in_batches` yields them, and a list of Recordings.

  Raises:
    UserError: see `sampler.generate`.
  """
  request = texts.request._replace(settings=s.settings)
  carry = sampler.complete(s.network, s.c, request)
  sampler.check(carry)
  recordings = recording.of_rows(carry, request.fill, request.valid)
  counts = np.asarray(carry.forwards), np.asarray(carry.positions)
  if show:
    for step in range(max(map(recording.num_steps, recordings)) + 1):
      show([_text_after(s, r, step) for r in recordings])
  return [
    _answer(s, texts, row, *of_row)
    for row, of_row in enumerate(zip(recordings, *counts, strict=True))
  ], recordings


def trajectory(s, recorded):
  """Returns the fields of an answer that say how its slots were filled.

  Args:
    s: Sampling.
    recorded: Recording.
  """
  tokens, fill, steps, confidence = recorded
  return {
    'given_ids': tokens[~fill].tolist(),
    'slots': np.flatnonzero(fill).tolist(),
    'ids': tokens[fill].tolist(),
    'steps': steps[fill].tolist(),
    'confidence': [None if np.isnan(x) else float(x) for x in confidence[fill]],
    'settings': describe(s.network, s.c, s.settings),
  }


def page(s, texts, recordings, **settings):
  """Returns the HTML page that replays recordings; see `replay.page`.

  Args:
    s: Sampling.
    texts: Texts.
    recordings: list of Recordings.
    **settings: shown on the page after the settings of the sampler.
  """
  kind = 'gaps' if texts.gaps else 'prompt'
  titles = [
    f'{kind} {number}, seed {prompt.seed}'
    for number, prompt in enumerate(texts.prompts, start=1)
  ]
  settings = describe(s.network, s.c, s.settings) | settings
  return replay.page(recordings, s.tokenizer, titles, settings)


def converse(s, lines, seed, note, gap_steps=None):
  """Yields an answer to each line of a conversation.

  A line with gaps, {{n}} for n tokens, is filled. Other lines are continued by
  s.settings.gen_length tokens. Rows are padded to a power of two, at most the
  context, so that few programs are compiled. Padding does not change the
  answers. The error of a line without an answer is passed to `note`.

  Args:
    s: Sampling.
    lines: iterable of str.
    seed: seed of the first answer; it grows by 1 per answer.
    note: function that is called with a line of text for every error and for
      every compilation.
    gap_steps: see `settings.for_gaps`.
  """
  compiled = set()
  for line in lines:
    try:
      texts = _encode_line(s, line, seed)
      c, settings = s.c, s.settings
      if texts.gaps:
        c, settings = for_gaps(c, settings, gap_steps)
      length = texts.request.canvas.shape[1]
      if (c, length) not in compiled:
        note(f'compiling for texts of up to {length} tokens')
        compiled.add((c, length))
      (answer,) = in_batches(s._replace(c=c, settings=settings), texts, batch=1)
    except UserError as error:
      note(f'error: {error}')
      continue
    seed += 1
    yield answer


def _encode_line(s, line, seed):
  if not line.strip():
    raise UserError(
      'the line is empty: write a text to continue, or one with gaps, {{n}} '
      'for n tokens'
    )
  gaps = '{{' in line
  if '{{' in layouts.GAP.sub('', line):
    raise UserError(
      f'{line[:60]!r} has braces that are not a gap: write {{{{n}}}} where n '
      'tokens are to be filled, or pass a text with such braces as --prompt'
    )
  texts = encode_texts(
    [prompts.Prompt(line, seed)],
    gaps,
    s.tokenizer.encode,
    s.settings.gen_length,
    s.context if s.c.lookahead >= 0 else None,
  )
  request = texts.request
  layouts.check_context(s.context, request.valid)
  slots, length = request.fill.sum(), request.canvas.shape[1]
  if slots > s.settings.gen_length:
    raise UserError(
      f'the gaps have {slots} tokens together: restart with '
      f'--gen_length={slots} instead of {s.settings.gen_length}'
    )
  padded = max(SHORTEST_ROW, 1 << (length - 1).bit_length())
  padded = min(padded, s.context)  # at least `length`, see check_context
  return texts._replace(request=layouts.widen(request, padded))


def _answer(s, texts, row, recorded, forwards, positions):
  """Returns the answer of a row as a dict.

  Args:
    s: Sampling.
    texts: Texts.
    row: int.
    recorded: Recording.
    forwards: see state.Carry.
    positions: see state.Carry.
  """
  answer = _in_answer(s, recorded, recorded.tokens)
  result = {
    'infill' if texts.gaps else 'prompt': texts.prompts[row].text,
    'seed': texts.prompts[row].seed,
    'text': _text_after(s, recorded, recording.num_steps(recorded)),
    'tokens': int(answer.sum()),
    'forwards': int(forwards),
    'positions': int(positions),
  }
  if not texts.gaps:
    result['answer'] = s.tokenizer.decode(recorded.tokens[answer])
  if s.trajectory:
    result |= trajectory(s, recorded)
  return result


def _text_after(s, recorded, step):
  """Returns the text after a number of denoising steps."""
  tokens = recording.canvas_after(recorded, step, s.network.mask_id)
  shown = ~recorded.fill | _in_answer(s, recorded, tokens)
  return s.tokenizer.decode(tokens[shown])


def _in_answer(s, recorded, tokens):
  """Returns [n] bool, the slots of a row before the first eos that ends it."""
  if not s.settings.stop_at_eos:
    return recorded.fill
  cut = layouts.cut(tokens, recorded.fill, s.network.eos_id)
  return recorded.fill & cut
