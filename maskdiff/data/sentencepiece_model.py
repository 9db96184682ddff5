"""SentencePiece models with control symbols and byte fallback.

tokenizer/train.py makes them.
"""

import pathlib

import sentencepiece

from maskdiff.errors import UserError

# SentencePiece writes spaces in its pieces as this character.
_SPACE = '\u2581'
REPLACEMENT = '\ufffd'.encode()

_FIX = (
  'set --config.data.tokenizer to a model made by tokenizer/train.py, such as '
  'tokenizer/stdlib_4k.model, or to a byte-level tokenizer.json'
)


def read(path: pathlib.Path, content: bytes):
  """Reads a SentencePiece model.

  Returns:
    - `processor`: sentencepiece.SentencePieceProcessor.
    - `pieces`: list of the bytes that each id stands for.
    - `ids`: dict with 'pad', 'bos', 'eos' and 'mask'.

  Raises:
    UserError: see tokenizer.load.
  """
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(content)
    if not processor.vocab_size():
      raise RuntimeError('no pieces')
  except RuntimeError as e:
    raise UserError(f'{path} is not a SentencePiece model: {_FIX}') from e

  kinds = ('pad', 'bos', 'eos', 'mask')
  ids = {kind: processor.piece_to_id(f'<{kind}>') for kind in kinds}
  # An ordinary piece named <mask> would let text produce the mask id.
  absent = [f'<{k}>' for k, i in ids.items() if not processor.is_control(i)]
  if absent:
    raise UserError(
      f'tokenizer {path} has no control symbol {", ".join(absent)}: {_FIX}'
    )
  if not processor.is_byte(processor.piece_to_id('<0x00>')):
    raise UserError(f'tokenizer {path} has no byte fallback: {_FIX}')
  pieces = [_piece_bytes(processor, i) for i in range(processor.vocab_size())]
  return processor, pieces, ids


def encode_batch(processor, texts, num_threads: int) -> list[list[int]]:
  """Token ids of every text, in order, on `num_threads` threads."""
  # The library would decode a literal _SPACE as a space. It is therefore
  # encoded as bytes, and the text around it in parts.
  plain = [t for t in texts if _SPACE not in t]
  encoded = iter(processor.encode(plain, num_threads=num_threads))
  return [
    _encode_around(processor, t) if _SPACE in t else next(encoded)
    for t in texts
  ]


def _encode_around(processor, text: str) -> list[int]:
  byte_ids = [
    processor.piece_to_id(f'<0x{byte:02X}>') for byte in _SPACE.encode()
  ]
  first, *rest = text.split(_SPACE)
  ids = processor.encode(first)
  for part in rest:
    ids += byte_ids + processor.encode(part)
  return ids


def _piece_bytes(processor, i: int) -> bytes:
  piece = processor.id_to_piece(i)
  if processor.is_control(i):
    return b''
  if processor.is_unknown(i):
    return REPLACEMENT
  if processor.is_byte(i):
    return bytes([int(piece[1:-1], 16)])
  return piece.replace(_SPACE, ' ').encode()
