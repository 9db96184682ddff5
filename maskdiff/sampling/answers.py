"""Answers to texts: from files, recorded step by step, or in a conversation.

An answer is a dict, which launch/sample.py writes as a line of JSON:

    prompt or infill  the text that was continued, or the text with gaps
    seed              int
    text              the whole text
    answer            the added text, cut at its first eos if the sampler stops
                      at eos; missing for texts with gaps
    tokens            number of tokens in the answer, or in the gaps
    forwards          forward passes of the row
    positions         number of positions that these passes computed
    length            number of slots, if the network has predicted it;
                      `forwards` and `positions` include the prediction

`trajectory` adds how the row was filled, in lists with one entry per slot of
the row, from left to right. They include the slots after an eos, which `answer`
leaves out.

    ids               token
    steps             denoising step that filled the slot, from 1
    confidence        of the token when it was committed; null for slots that
                      were filled with eos because an eos came before
    slots             index of the slot in the row
    given_ids         tokens of the row that are not slots, from left to right
    settings          dict of the settings that sampling depends on
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError
from maskdiff.model.network import Network
from maskdiff.sampling import (
  layouts,
  lengths,
  passes,
  recording,
  replay,
  sampler,
)
from maskdiff.sampling.prompts import Prompt, check_unicode
from maskdiff.sampling.serve import RowRequest, serve
from maskdiff.sampling.serve_shares import serve_all
from maskdiff.sampling.settings import (
  SamplerConfig,
  Settings,
  describe,
  fit_blocks,
  for_gaps,
)

SHORTEST_ROW = 32  # rows of a conversation are padded to at least this length


class Sampling(NamedTuple):
  """A loaded model and the settings to sample with."""

  network: Network
  c: SamplerConfig
  tokenizer: Tokenizer | None  # None: answers have no texts
  context: int  # tokens of a training row
  trajectory: bool = False  # whether answers have the step of every slot


class Text(NamedTuple):
  """A text to continue, or a text with gaps to fill, as a row."""

  prompt: Prompt
  gaps: bool  # True: a text with gaps; False: a prompt to continue
  row: list  # int for a token, None for a slot
  settings: Settings
  length: lengths.Length | None = None  # the predicted one


def encode_text(prompt, gaps, settings, encode, context, open_length=False):
  """Returns the Text of a prompt.

  Args:
    prompt: prompts.Prompt.
    gaps: True: fill the gaps of the text; False: continue the text.
    settings: Settings; a prompt is continued by settings.gen_length slots.
    encode: function from text to a list of tokens.
    context: largest number of tokens of a row.
    open_length: whether a prompt may get fewer slots than gen_length, as many
      as its row has room for.

  Raises:
    UserError: see `layouts.gap_row`; the row is longer than the context; or the
      text is not valid Unicode.
  """
  check_unicode(prompt.text, f'{prompt.text[:60]!r} is not UTF-8')
  if gaps:
    row = layouts.gap_row(prompt.text, encode, context)
  else:
    tokens, slots = encode(prompt.text), settings.gen_length
    if not open_length:  # before the slots take memory
      layouts.check_context(context, len(tokens) + slots)
    row = layouts.prompt_row(tokens, slots, context)
  layouts.check_context(context, len(row))
  return Text(prompt, gaps, row, settings)


def fit(network, c, texts, settings):
  """Returns a SamplerConfig that fits a list of texts.

  Blocks are no longer than the longest answer, see `settings.fit_blocks`. The
  program is guided if a text has guidance.

  Args:
    network: Network.
    c: SamplerConfig.
    texts: list of Text; empty for a conversation.
    settings: Settings of texts without settings of their own.
  """
  slots = [max(t.row.count(None), t.settings.gen_length) for t in texts]
  longest = max(slots, default=settings.gen_length)
  return dataclasses.replace(
    fit_blocks(network, c, longest),
    guided=c.guided or any(t.settings.guidance > 0 for t in texts),
  )


def filled(s, texts, batch, length=0):
  """Yields each Text with its serve.Answer, in order.

  Args:
    s: Sampling.
    texts: list of Text.
    batch: number of rows sampled at once.
    length: positions for which the program is compiled; by default those of the
      longest text. Padding does not change the answers.

  Raises:
    UserError: a request is not valid; the texts before it have been yielded. Or
      logits were NaN or infinite; all other texts have been yielded.
  """
  requests = [
    RowRequest(i, text.row, text.prompt.seed, text.settings)
    for i, text in enumerate(texts)
  ]
  length = length or max(len(text.row) for text in texts)
  waiting, first, broken = {}, 0, []
  for answer in serve_all(s.network, s.c, requests, batch, length):
    waiting[answer.id] = answer
    while first in waiting:
      answer = waiting.pop(first)
      if answer.error and not answer.recording:
        raise answer.error
      if answer.error:
        broken.append(first)
      else:
        yield texts[first], answer
      first += 1
  if broken:
    raise sampler.broken_error(f'row(s) {broken}')


def in_batches(s, texts, batch):
  """Yields the answers in order; arguments and errors as for `filled`."""
  for text, answer in filled(s, texts, batch):
    yield as_dict(s, text, answer)


def record(s, texts, batch, show=None):
  """Returns the answers and the recording of each.

  Args:
    s: Sampling.
    texts: list of Text.
    batch: number of rows sampled at once.
    show: function of a list of str, the texts after a step. It is called for
      the texts before the first step and after every step.

  Returns:
    List of answers as `in_batches` yields them, and a list of Recordings.

  Raises:
    UserError: see `filled`.
  """
  found = list(filled(s, texts, batch))
  recordings = [answer.recording for _, answer in found]
  if show:
    for step in range(max(map(recording.num_steps, recordings)) + 1):
      show(
        [_text_after(s, text, a.recording, step) for text, a in found],
      )
  return [as_dict(s, text, answer) for text, answer in found], recordings


def page(s, texts, recordings, **settings):
  """Returns the HTML page that replays recordings; see `replay.page`.

  Args:
    s: Sampling.
    texts: list of Text, with the same settings.
    recordings: list of Recordings.
    **settings: shown on the page after the settings of the sampler.
  """
  titles = [
    f'{"gaps" if text.gaps else "prompt"} {number}, seed {text.prompt.seed}'
    for number, text in enumerate(texts, start=1)
  ]
  settings = describe(s.network, s.c, texts[0].settings) | settings
  return replay.page(recordings, s.tokenizer, titles, settings)


def converse(s, settings, lines, seed, note, gap_steps=None):
  """Yields an answer to each line of a conversation.

  A line with gaps, {{n}} for n tokens, is filled. Other lines are continued by
  settings.gen_length tokens. Rows are padded to a power of two, at most the
  context, so that short lines are cheap and few programs are compiled. Padding
  does not change the answers. If a line fails, its error is passed to `note`.

  Args:
    s: Sampling.
    settings: Settings for prompts.
    lines: iterable of str. The next line is taken after the answer.
    seed: seed of the first answer; it grows by 1 per answer.
    note: function that is called with a line of text for every error and for
      every compilation.
    gap_steps: see `settings.for_gaps`.
  """
  compiled = set()
  for line in lines:
    try:
      c, text = _encode_line(s, settings, line, seed, gap_steps)
      length = padded_length(len(text.row), s.context)
      if (c, length) not in compiled:
        note(f'compiling for texts of up to {length} tokens')
        compiled.add((c, length))
      request = RowRequest(seed, text.row, seed, text.settings)
      (answer,) = serve(s.network, c, [request], 1, length)
      if answer.error:
        raise answer.error
    except UserError as error:
      note(f'error: {error}')
      continue
    seed += 1
    yield as_dict(s._replace(c=c), text, answer)


def padded_length(length, context):
  """Returns the length that rows are padded to, so that few are compiled.

  Args:
    length: positions of the longest row, at most `context`.
    context: tokens of a training row.

  Returns:
    A power of two of at least SHORTEST_ROW, or the context if that is shorter.
  """
  return min(max(SHORTEST_ROW, 1 << (length - 1).bit_length()), context)


def _encode_line(s, settings, line, seed, gap_steps):
  """Returns the SamplerConfig for a line of a conversation, and its Text."""
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
  c, max_slots = s.c, settings.gen_length
  open_length = c.lookahead >= 0 or (
    settings.stop_at_eos and passes.exact_cache(s.network)
  )
  if gaps:
    c, settings = for_gaps(c, settings, gap_steps)
  text = encode_text(
    Prompt(line, seed),
    gaps,
    settings,
    s.tokenizer.encode,
    s.context,
    open_length,
  )
  slots = text.row.count(None)
  if slots > max_slots:
    raise UserError(
      f'the gaps have {slots} tokens together: restart with '
      f'--gen_length={slots} instead of {max_slots}'
    )
  return c, text


def as_dict(s, text, answer):
  """Returns an answer as a dict.

  Args:
    s: Sampling.
    text: Text.
    answer: serve.Answer without an error.
  """
  recorded = answer.recording
  in_answer = _in_answer(s, text, recorded, recorded.tokens)
  result = {
    'infill' if text.gaps else 'prompt': text.prompt.text,
    'seed': text.prompt.seed,
    **({'text': _filled_text(s, text, recorded)} if s.tokenizer else {}),
    'tokens': int(in_answer.sum()),
    'forwards': answer.forwards,
    'positions': answer.positions,
  }
  if text.length:
    result['length'] = text.length.slots
    result['forwards'] += text.length.forwards
    result['positions'] += text.length.positions
  if s.tokenizer and not text.gaps:
    result['answer'] = s.tokenizer.decode(recorded.tokens[in_answer])
  if s.trajectory:
    result |= trajectory(recorded)
    result['settings'] = describe(s.network, s.c, text.settings)
  return result


def trajectory(recorded):
  """Returns the fields of an answer that say how its slots were filled."""
  tokens, fill, steps, confidence = recorded
  return {
    'given_ids': tokens[~fill].tolist(),
    'slots': np.flatnonzero(fill).tolist(),
    'ids': tokens[fill].tolist(),
    'steps': steps[fill].tolist(),
    'confidence': [None if np.isnan(x) else float(x) for x in confidence[fill]],
  }


def _text_after(s, text, recorded, step):
  """Returns the text after a number of denoising steps."""
  tokens = recording.canvas_after(recorded, step, s.network.mask_id)
  shown = ~recorded.fill | _in_answer(s, text, recorded, tokens)
  return s.tokenizer.decode(tokens[shown])


def _filled_text(s, text, recorded):
  return _text_after(s, text, recorded, recording.num_steps(recorded))


def _in_answer(s, text, recorded, tokens):
  """Returns [n] bool, the slots of a row before the first eos that ends it."""
  if not text.settings.stop_at_eos:
    return recorded.fill
  cut = layouts.cut(tokens, recorded.fill, s.network.eos_id)
  return recorded.fill & cut
