"""Tokens that name the lengths of answers, and documents that teach them.

A conversation becomes two documents:

  prompt  length                  the token of the length is learned
  prompt  length  answer eos eos  the answer is learned, and has this length

The length is the smallest bucket with room for the answer; eos fills the rest.
The documents have the positions that sampling sees: first the prompt and one
mask, then the prompt, the length and the slots of the answer. In one document,
the network could count the positions after the length instead of predicting it.

The tokens are those of the 13 bytes that UTF-8 never contains. No text has
them, and a byte-level vocabulary always does, so the network needs no new
embedding.
"""

import numpy as np

from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError
from maskdiff.posttraining.chat_tokens import Encoded

UNUSED_BYTES = tuple(bytes([b]) for b in (0xC0, 0xC1, *range(0xF5, 0x100)))
SETTING = 'length_tokens'  # of a manifest


def choose(tokenizer: Tokenizer, lengths) -> tuple[tuple[int, int], ...]:
  """Returns the pairs (length, token id) of some lengths, ascending.

  Args:
    tokenizer: Tokenizer.
    lengths: numbers of tokens of an answer, with its eos.

  Raises:
    UserError: a length is not above 0 or is repeated, or the tokenizer has too
      few tokens that no text uses.
  """
  lengths = sorted(lengths)
  if not lengths or lengths[0] < 1 or len(set(lengths)) < len(lengths):
    raise UserError(
      f'lengths {",".join(map(str, lengths))}: must be different and above 0'
    )
  id_of = {piece: i for i, piece in enumerate(tokenizer.pieces)}
  ids = [id_of[piece] for piece in UNUSED_BYTES if piece in id_of]
  if len(ids) < len(lengths):
    raise UserError(
      f'{tokenizer.path} has {len(ids)} tokens of bytes that no text uses, for '
      f'{len(lengths)} lengths: give at most {len(ids)} lengths'
    )
  return tuple(zip(lengths, ids, strict=False))


def to_setting(length_tokens) -> str:
  """Returns pairs as a text for the settings of a manifest: '16=200,32=201'."""
  return ','.join(f'{length}={i}' for length, i in length_tokens)


def of_settings(settings) -> tuple[tuple[int, int], ...]:
  """Returns the pairs in the settings of a manifest; () if it has none.

  Raises:
    UserError: the setting is not one of `to_setting`.
  """
  text = settings.get(SETTING, '')
  try:
    pairs = [pair.split('=') for pair in text.split(',') if pair]
    return tuple((int(length), int(i)) for length, i in pairs)
  except (AttributeError, ValueError) as e:
    raise UserError(
      f'the manifest has {SETTING}={text!r:.60}: prepare the rows again'
    ) from e


def bucket(length_tokens, size: int) -> tuple[int, int] | None:
  """Returns the smallest pair whose length is at least `size`, or None."""
  return next((pair for pair in length_tokens if pair[0] >= size), None)


def documents(
  encoded: Encoded, length: int, token: int, eos_id: int
) -> list[Encoded]:
  """Returns the two documents of a conversation; see the top of the file.

  Args:
    encoded: conversation that ends with its only answer.
    length: tokens of the answer in the second document, at least those of the
      answer.
    token: id of the token that names this length.
    eos_id: id of the token that fills the answer.
  """
  start = int(encoded.answer.argmax())
  prompt = np.append(encoded.tokens[:start], np.int32(token))
  answer = np.full(length, eos_id, np.int32)
  answer[: len(encoded.tokens) - start] = encoded.tokens[start:]
  is_last = np.arange(start + 1) == start
  return [
    Encoded(prompt, is_last),
    Encoded(
      np.concatenate([prompt, answer]),
      np.arange(start + 1 + length) > start,
    ),
  ]
