"""SentencePiece models with control symbols and byte fallback.

tokenizer/train.py makes them.
"""

import pathlib
import re

import sentencepiece

from maskdiff.errors import UserError

# SentencePiece writes spaces in its pieces as this character.
SPACE = '\u2581'
REPLACEMENT = '\ufffd'.encode()

# Types of a piece in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
_BPE = 2  # the model type of TrainerSpec; 1, the default, is unigram

# Options by (field of the ModelProto, field of the message in it), with the
# defaults of sentencepiece_model.proto.
_FIELDS = {
  (2, 35): 'byte_fallback',
  (3, 2): 'precompiled_charsmap',
  (3, 3): 'add_dummy_prefix',
  (3, 4): 'remove_extra_whitespaces',
  (3, 5): 'escape_whitespaces',
}
_DEFAULTS = {
  'byte_fallback': False,
  'precompiled_charsmap': b'',
  'add_dummy_prefix': True,
  'remove_extra_whitespaces': True,
  'escape_whitespaces': True,
}
# What the normalization of a model that loses no text has.
_LOSSLESS = {
  'precompiled_charsmap': False,
  'add_dummy_prefix': False,
  'remove_extra_whitespaces': False,
  'escape_whitespaces': True,
}

# A line of a tiktoken file, which is sometimes called tokenizer.model: a token
# in base64, and its rank.
_TIKTOKEN = re.compile(rb'[A-Za-z0-9+/]+={0,2} \d{1,9}\r?\n')

FIX = (
  'set --config.data.tokenizer, or --tokenizer of launch/prepare.py, to a '
  'model made by tokenizer/train.py, such as tokenizer/stdlib_4k.model, or to '
  'a byte-level tokenizer.json'
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
    pieces = [_piece_bytes(processor, i) for i in range(processor.vocab_size())]
    options = _options(content)
  except (RuntimeError, ValueError) as e:  # also of pieces that are not UTF-8
    kind = 'is a tiktoken file, not' if is_tiktoken(content) else 'is not'
    raise UserError(f'{path} {kind} a SentencePiece model: {FIX}') from e

  kinds = ('pad', 'bos', 'eos', 'mask')
  ids = {kind: processor.piece_to_id(f'<{kind}>') for kind in kinds}
  # An ordinary piece named <mask> would let text produce the mask id.
  absent = [f'<{k}>' for k, i in ids.items() if not processor.is_control(i)]
  if absent:
    raise UserError(
      f'tokenizer {path} has no control symbol {", ".join(absent)}: {FIX}'
    )
  if not options['byte_fallback'] or not all(
    processor.is_byte(processor.piece_to_id(f'<0x{byte:02X}>'))
    for byte in range(256)
  ):
    raise UserError(f'tokenizer {path} has no byte fallback: {FIX}')
  wrong = [
    key for key, value in _LOSSLESS.items() if bool(options[key]) != value
  ]
  if wrong:
    raise UserError(
      f'tokenizer {path} changes some texts by its normalization '
      f'({", ".join(wrong)}): {FIX}'
    )
  return processor, pieces, ids


def special_tokens(processor) -> dict[str, int]:
  """Returns the ids of the control symbols by their texts."""
  ids = range(processor.vocab_size())
  return {processor.id_to_piece(i): i for i in ids if processor.is_control(i)}


def is_tiktoken(content: bytes) -> bool:
  """Returns whether a file begins as tiktoken files do."""
  return _TIKTOKEN.match(content) is not None


def _options(content):
  """Returns the options of a model file that affect whether text is lost.

  The file is a ModelProto of sentencepiece_model.proto. Its field 2 is the
  TrainerSpec, field 3 the NormalizerSpec.
  """
  options = dict(_DEFAULTS)
  for number, message in _fields(content):
    if number not in (2, 3):
      continue
    for field, value in _fields(message):
      if key := _FIELDS.get((number, field)):
        # The library skips a field of another wire type.
        kind = bytes if isinstance(_DEFAULTS[key], bytes) else int
        if not isinstance(value, kind):
          raise ValueError(f'{key} has the wrong wire type')
        options[key] = value
  return options


def kinds(content: bytes) -> tuple[list[int], bool]:
  """Returns the type of each piece of a model file, and whether it is BPE.

  Raises:
    ValueError: the file is malformed.
  """
  types, is_bpe = [], False
  for number, message in _fields(content):
    if number == 1:
      types.append(dict(_fields(message)).get(3, NORMAL))
    elif number == 2:
      is_bpe = dict(_fields(message)).get(3) == _BPE
  return types, is_bpe


def _fields(message):
  """Yields the number and the value of each field of a protobuf message.

  Raises:
    ValueError: the message is malformed.
  """
  if not isinstance(message, bytes):
    raise ValueError('a number in place of a message')
  at = 0
  while at < len(message):
    tag, at = _varint(message, at)
    match tag & 7:
      case 0:
        value, at = _varint(message, at)
      case 1 | 5 as wire:  # numbers, which no option is
        value, at = None, at + (8 if wire == 1 else 4)
      case 2:
        length, at = _varint(message, at)
        value, at = message[at : at + length], at + length
      case _:
        raise ValueError('unknown wire type')
    if at > len(message):
      raise ValueError('a field ends after its message')
    yield tag >> 3, value


def _varint(message, at):
  """Returns an integer of variable length, and the index after it."""
  value = 0
  for shift in range(0, 70, 7):
    if at >= len(message):
      raise ValueError('an integer ends after its message')
    byte = message[at]
    value, at = value | (byte & 127) << shift, at + 1
    if byte < 128:
      return value, at
  raise ValueError('an integer of more than ten bytes')


def encode_batch(processor, texts, num_threads: int) -> list[list[int]]:
  """Token ids of every text, in order, on `num_threads` threads."""
  # The library would decode a literal SPACE as a space. It is therefore
  # encoded as bytes, and the text around it in parts.
  plain = [t for t in texts if SPACE not in t]
  encoded = iter(processor.encode(plain, num_threads=num_threads))
  return [
    _encode_around(processor, t) if SPACE in t else next(encoded) for t in texts
  ]


def _encode_around(processor, text: str) -> list[int]:
  byte_ids = [
    processor.piece_to_id(f'<0x{byte:02X}>') for byte in SPACE.encode()
  ]
  first, *rest = text.split(SPACE)
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
  return piece.replace(SPACE, ' ').encode()
