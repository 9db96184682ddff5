"""Conversations to token ids, and the spans of the answers to be learned.

The text of a template is encoded with special tokens; the contents of messages
are not. Strings in a content that look like special tokens are replaced by
characters of Unicode's private use while the template renders, so that each
special token of the rendered text comes from the template, and put back before
the text between two special tokens is encoded. Templates that trim or examine
contents work as usual.

The prompt of an answer is encoded on its own, so it has the same ids in
training as in sampling.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError
from maskdiff.posttraining import chat

_EXCHANGE = (
  {'role': 'user', 'content': 'a'},
  {'role': 'assistant', 'content': 'b'},
)
SPECIAL = ('bos', 'eos', 'pad', 'mask')


class Encoder(NamedTuple):
  """A template with a tokenizer; make one with `encoder`.

  Attributes:
    template: chat.Template.
    tokenizer: Tokenizer.
    ids: ids of the special tokens by their texts.
    names: texts of special tokens by the names that templates use: bos_token,
      eos_token, pad_token and mask_token.
    pattern: regular expression of all special tokens.
    fixed_date: see chat.render.
  """

  template: chat.Template
  tokenizer: Tokenizer
  ids: Mapping[str, int]
  names: Mapping[str, str]
  pattern: re.Pattern
  fixed_date: bool


class Encoded(NamedTuple):
  """An encoded conversation.

  Attributes:
    tokens: [n] int32.
    answer: [n] bool, the tokens of the trained turns.
  """

  tokens: np.ndarray
  answer: np.ndarray


class _Safe(NamedTuple):
  """Messages without texts of special tokens, and how to put these back."""

  messages: list
  originals: dict[str, str]  # by their private characters


def encoder(
  template: chat.Template, tokenizer: Tokenizer, fixed_date: bool = True
) -> Encoder:
  """Returns an Encoder; fixed_date is for rows, see chat.render."""
  ids = tokenizer.special_tokens()
  texts = {i: text for text, i in ids.items()}
  names = {
    f'{name}_token': texts[i]
    for name in SPECIAL
    if (i := getattr(tokenizer, f'{name}_id')) in texts
  }
  longest_first = sorted(ids, key=len, reverse=True)
  pattern = re.compile('|'.join(map(re.escape, longest_first)))
  return Encoder(template, tokenizer, ids, names, pattern, fixed_date)


def prompt_ids(encoder: Encoder, messages: Sequence[Mapping]) -> list[int]:
  """Returns the ids of a conversation and the header of the next answer.

  `encode` gives an answer the same prompt.

  Raises:
    UserError: the template refuses the conversation or fails.
  """
  safe = _safe(encoder, messages)
  text = _render(encoder, safe.messages, generation_prompt=True)
  ids = [i for part in _pieces(encoder, safe, text) for i in part]
  _check_ids(encoder, ids)
  return ids


def encode(
  encoder: Encoder, messages: Sequence[Mapping], trained: Sequence[int]
) -> Encoded:
  """Returns the tokens of a conversation up to its last trained turn.

  The prompt of a turn is the rendered conversation before it, with the header
  of the next answer. The turn is what follows this prompt, up to and including
  the special token that the template writes after the content. Whatever the
  template adds after the last turn, such as LLaDA's empty header, is cut off.
  The last token is eos: it is added, as an answer, if the turn ends with
  another token.

  Args:
    encoder: Encoder.
    messages: the conversation, see conversations.parse.
    trained: indices of the trained turns, ascending and not empty.

  Raises:
    UserError: the prompt of a turn is not the start of the rendered
      conversation, or the conversation up to the turn is not; the template ends
      a turn without a special token, fails, or has not exactly one bos at the
      start if it has any. The caller knows the file.
  """
  safe = _safe(encoder, messages[: trained[-1] + 1])
  text = _render(encoder, safe.messages)
  parts, at = [], 0
  for turn in trained:
    start, stop = _span(encoder, safe.messages, turn, text)
    parts += [(text[at:start], False), (text[start:stop], True)]
    at = stop
  tokens, answer = [], []
  for part, is_answer in parts:
    for ids in _pieces(encoder, safe, part):
      tokens += ids
      answer += [is_answer] * len(ids)
  if tokens[-1] != encoder.tokenizer.eos_id:
    tokens.append(encoder.tokenizer.eos_id)
    answer.append(True)
  _check_ids(encoder, tokens)
  return Encoded(np.array(tokens, np.int32), np.array(answer))


def end_ids(encoder: Encoder) -> tuple[int, ...]:
  """Returns the special tokens that end an answer, eos among them.

  Templates that cannot be used for training have no known end, except eos.
  """
  ends = {encoder.tokenizer.eos_id}
  try:
    encoded = encode(encoder, _EXCHANGE, [1])
  except UserError:
    return tuple(ends)
  special = set(encoder.ids.values())
  for token in encoded.tokens[encoded.answer][::-1].tolist():
    if token not in special:
      break
    ends.add(token)
  return tuple(sorted(ends))


def _span(encoder, messages, turn: int, text: str) -> tuple[int, int]:
  """Returns the characters of a trained turn in the rendered conversation."""
  if not turn:
    raise UserError('the first turn is an answer: it needs a turn before it')
  prompt = _render(encoder, messages[:turn], generation_prompt=True)
  until = text
  if turn < len(messages) - 1:
    until = _render(encoder, messages[: turn + 1])
  end = _end_of_turn(encoder, messages, turn)
  start = len(prompt)
  stop = text.find(end, start) + len(end)
  if not text.startswith(prompt) or text[:stop] != until[:stop]:
    raise UserError(
      f'template {encoder.template.name!r} renders messages[{turn}] after its '
      'prompt in another way than in the whole conversation, so that training '
      'would not match sampling: choose --turns=each, which makes a document '
      'of each answer, or another template, --chat_arguments or conversation'
    )
  return start, stop


def _end_of_turn(encoder, messages, turn: int) -> str:
  """Returns what a template writes after an answer, to its special token."""
  used = [encoder.template.source, *_strings(messages)]
  (content,) = chat.unused_characters(used, 1)
  answer = {'role': messages[turn]['role'], 'content': content}
  text = _render(encoder, [*messages[:turn], answer])
  after = text.rpartition(content)[2]
  end = encoder.pattern.search(after)
  if content not in text or end is None:
    raise UserError(
      f'template {encoder.template.name!r} ends messages[{turn}] with no '
      f'special token of {encoder.tokenizer.path}: choose the template of this '
      'tokenizer, or plain'
    )
  return after[: end.end()]


def _render(encoder, messages, generation_prompt=False) -> str:
  return chat.render(
    encoder.template,
    messages,
    generation_prompt=generation_prompt,
    special=encoder.names,
    fixed_date=encoder.fixed_date,
  ).text


def _safe(encoder: Encoder, messages: Sequence[Mapping]) -> _Safe:
  values = _strings(messages)
  found = sorted({t for v in values for t in encoder.pattern.findall(v)})
  if not found:
    return _Safe(list(messages), {})
  used = [*values, encoder.template.source, encoder.template.arguments]
  private = chat.unused_characters(used, len(found))
  marks = dict(zip(found, private, strict=True))
  hide = lambda v: (
    encoder.pattern.sub(lambda match: marks[match[0]], v)
    if isinstance(v, str)
    else v
  )
  return _Safe(
    [{key: hide(v) for key, v in m.items()} for m in messages],
    {mark: text for text, mark in marks.items()},
  )


def _strings(messages) -> list[str]:
  return [v for m in messages for v in m.values() if isinstance(v, str)]


def _original(safe: _Safe, text: str) -> str:
  return text.translate(str.maketrans(safe.originals))


def _pieces(encoder: Encoder, safe: _Safe, text: str) -> Iterator[list[int]]:
  """Yields the ids of a part of a rendered text."""
  at = 0
  for match in encoder.pattern.finditer(text):
    if match.start() > at:
      yield encoder.tokenizer.encode(_original(safe, text[at : match.start()]))
    yield [encoder.ids[match[0]]]
    at = match.end()
  if at < len(text):
    yield encoder.tokenizer.encode(_original(safe, text[at:]))


def _check_ids(encoder: Encoder, ids: list[int]) -> None:
  tokenizer = encoder.tokenizer
  bos = ids.count(tokenizer.bos_id)
  if tokenizer.bos_id == tokenizer.eos_id:
    return
  if bos > 1 or (bos and ids[0] != tokenizer.bos_id):
    raise UserError(
      f'template {encoder.template.name!r} writes {bos} bos tokens; correct it '
      'so that it writes one at the start'
    )
  if tokenizer.mask_id in ids:
    raise UserError(
      f'template {encoder.template.name!r} writes the mask token: remove it'
    )
