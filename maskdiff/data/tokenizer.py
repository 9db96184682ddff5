"""Text to token ids and back, without loss, on a SentencePiece model.

What is unusual: `decode` takes ids with masks anywhere among them, also
between the byte pieces of one character, because that is what a half-denoised
canvas looks like. It works on the bytes each id stands for, not on
SentencePiece's own decoder.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from maskdiff.errors import UserError

# SentencePiece writes spaces in its pieces as this character.
_SPACE = '\u2581'
_REPLACEMENT = '\ufffd'.encode()


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A loaded SentencePiece model; make one with `load`.

  Attributes:
    path: the model file.
    vocab_size: number of ids; valid ids are in [0, vocab_size).
    fingerprint: 16 hex digits of the SHA-256 of the model file.
    pieces: [vocab_size] the UTF-8 bytes each id stands for; empty for control
      ids. A text's bytes are the joined pieces of its ids.
  """

  path: str
  vocab_size: int
  pad_id: int
  bos_id: int
  eos_id: int
  mask_id: int
  fingerprint: str
  pieces: tuple[bytes, ...] = dataclasses.field(repr=False)
  processor: sentencepiece.SentencePieceProcessor = dataclasses.field(
    repr=False, compare=False
  )

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, without bos or eos. Never a control id.

    Raises:
      TypeError: the text has lone surrogates, which no UTF-8 file holds.
    """
    return self.encode_batch([text], num_threads=1)[0]

  def encode_batch(
    self, texts: Sequence[str], num_threads: int
  ) -> list[list[int]]:
    """`encode` of every text, in order, on `num_threads` threads."""
    # The character that stands for a space would come back as a space, so
    # texts that really contain it are encoded around it.
    plain = [t for t in texts if _SPACE not in t]
    encoded = iter(self.processor.encode(plain, num_threads=num_threads))
    return [
      self._encode_around(t) if _SPACE in t else next(encoded) for t in texts
    ]

  def _encode_around(self, text: str) -> list[int]:
    byte_ids = [
      self.processor.piece_to_id(f'<0x{byte:02X}>') for byte in _SPACE.encode()
    ]
    first, *rest = text.split(_SPACE)
    ids = self.processor.encode(first)
    for part in rest:
      ids += byte_ids + self.processor.encode(part)
    return ids

  def decode(self, ids: Iterable[int], mask_text: str = '\u2591') -> str:
    """The text that ids stand for; the inverse of `encode`.

    Control ids (pad, bos, eos, chat roles) are dropped, the mask id is shown
    as `mask_text`, and bytes that are not valid UTF-8 (a character with some
    of its bytes still masked) as the replacement character. So are ids from
    vocab_size on: a model's vocabulary may be larger than its tokenizer's.

    Raises:
      IndexError: an id is negative.
    """
    mask = mask_text.encode()
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), int)
    if ids.size and ids.min() < 0:
      raise IndexError('token ids must not be negative')

    def piece(i):
      if i == self.mask_id:
        return mask
      return self.pieces[i] if i < self.vocab_size else '\ufffd'.encode()

    return b''.join(map(piece, ids)).decode('utf-8', errors='replace')


def load(path: str | pathlib.Path) -> Tokenizer:
  """A Tokenizer from a SentencePiece model file.

  Raises:
    UserError: the file is missing, is not a SentencePiece model, cannot
      encode every text (no byte fallback), or lacks the symbols <pad>, <bos>,
      <eos>, <mask>.
  """
  path = pathlib.Path(path)
  fix = (
    'set --config.data.tokenizer to a model made by tokenizer/train.py, such '
    'as tokenizer/stdlib_4k.model'
  )
  try:
    model = path.read_bytes()
  except OSError as e:
    raise UserError(
      f'cannot read tokenizer {path} ({e.strerror}): {fix}'
    ) from e
  processor = sentencepiece.SentencePieceProcessor()
  try:
    processor.LoadFromSerializedProto(model)
    if not processor.vocab_size():
      raise RuntimeError('no pieces')
  except RuntimeError as e:
    raise UserError(f'{path} is not a SentencePiece model: {fix}') from e

  ids = {p: processor.piece_to_id(p) for p in ('<pad>', '<bos>', '<eos>')}
  ids['<mask>'] = processor.piece_to_id('<mask>')
  # An ordinary piece named <mask> would let text produce the mask id.
  absent = [piece for piece, i in ids.items() if not processor.is_control(i)]
  if absent:
    raise UserError(
      f'tokenizer {path} has no control symbol {", ".join(absent)}: {fix}'
    )
  if not processor.is_byte(processor.piece_to_id('<0x00>')):
    raise UserError(f'tokenizer {path} has no byte fallback: {fix}')
  return Tokenizer(
    path=str(path),
    vocab_size=processor.vocab_size(),
    pad_id=ids['<pad>'],
    bos_id=ids['<bos>'],
    eos_id=ids['<eos>'],
    mask_id=ids['<mask>'],
    fingerprint=hashlib.sha256(model).hexdigest()[:16],
    pieces=tuple(_bytes(processor, i) for i in range(processor.vocab_size())),
    processor=processor,
  )


def _bytes(processor, i: int) -> bytes:
  piece = processor.id_to_piece(i)
  if processor.is_control(i):
    return b''
  if processor.is_unknown(i):
    return _REPLACEMENT
  if processor.is_byte(i):
    return bytes([int(piece[1:-1], 16)])
  return piece.replace(_SPACE, ' ').encode()
