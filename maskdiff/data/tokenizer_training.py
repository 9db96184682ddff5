"""Trains SentencePiece models that are lossless on any text."""

import hashlib
import heapq
import io
import math
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from maskdiff.data import documents
from maskdiff.errors import UserError, one_line

CONTROL = ['<mask>', '<system>', '<user>', '<assistant>', '<end_of_turn>']

# A line break and the indentation after it are one token, and no other token
# contains a line break. SentencePiece matches these symbols after it has
# replaced spaces by U+2581.
LINE_BREAKS = [
  '\n' * breaks + '\u2581' * spaces
  for breaks, spaces in [(1, n) for n in range(0, 25, 4)]
  + [(2, n) for n in (0, 4, 8)]
  + [(3, 0)]
]

CHUNK_CHARS = 4096
HELD_OUT_BYTES = 1 << 20

# The trained model depends on the number of threads, which is therefore fixed.
THREADS = 16

# Sizes of a vocabulary that is chosen by the amount of text, and the bytes of
# text for each id.
_MIN_SIZE, _MAX_SIZE, _BYTES_PER_ID = 512, 1 << 15, 1000
_MAX_TEXT_BYTES = 50 * 10**6  # takes about 1 GB of memory


class SizeError(UserError):
  """The vocabulary is too large or too small for the text.

  Attributes:
    nearest: size closest to the refused size that the text allows.
  """

  def __init__(self, message: str, nearest: int):
    super().__init__(message)
    self.nearest = nearest


def train_on(texts: Iterable[str], vocab_size: int | None) -> bytes:
  """Trains a BPE model on a sample of some texts.

  Args:
    texts: the texts; at most 50 MB of their parts are sampled.
    vocab_size: number of token ids. None chooses it by the amount of text.

  Returns:
    The serialized model. The same texts give the same model.

  Raises:
    UserError: there is no text, or vocab_size does not fit the text.
  """
  sample, _ = draw(texts, _MAX_TEXT_BYTES, one_in=0)
  if not sample:
    raise UserError('no text to train a tokenizer on: give more text')
  if vocab_size is not None:
    return train(iter(sample), vocab_size, 'bpe', THREADS)
  ids = max(1, sum(map(len, sample)) // _BYTES_PER_ID)
  size = min(max(1 << round(math.log2(ids)), _MIN_SIZE), _MAX_SIZE)
  for _ in range(3):
    try:
      return train(iter(sample), size, 'bpe', THREADS)
    except SizeError as error:
      size, refused = error.nearest, error
  raise refused


def chunks(text: str) -> Iterator[str]:
  """Yields parts of a text of at most CHUNK_CHARS characters, cut at line ends.

  Longer lines are cut anywhere, since SentencePiece would drop them.
  """
  return documents.pieces([text], CHUNK_CHARS)


def draw(
  texts: Iterable[str], max_bytes: int, one_in: int
) -> tuple[list[bytes], list[bytes]]:
  """Samples chunks of a stream of texts uniformly.

  A hash of a chunk's number in the stream decides whether the chunk is held
  out. Of the training chunks and of the held-out chunks, those with the
  smallest hashes are sampled, up to a number of bytes.

  Args:
    texts: the stream.
    max_bytes: largest sum of bytes of the training chunks. That of the held-out
      chunks is HELD_OUT_BYTES.
    one_in: hold out one in so many chunks; 0: none.

  Returns:
    (training chunks, held-out chunks), each in the order of the stream.
  """
  samples = [], []  # training and held-out heaps of (-hash, number, chunk)
  free_bytes = [max_bytes, HELD_OUT_BYTES]
  stream = (chunk for text in texts for chunk in chunks(text))
  for number, chunk in enumerate(stream):
    digest = hashlib.blake2b(number.to_bytes(8, 'big'), digest_size=8).digest()
    order, split = int.from_bytes(digest, 'big'), 0
    if one_in:
      order, remainder = divmod(order, one_in)
      split = int(remainder == 0)
    data = chunk.encode()
    heapq.heappush(samples[split], (-order, number, data))
    free_bytes[split] -= len(data)
    while free_bytes[split] < 0:
      *_, data = heapq.heappop(samples[split])
      free_bytes[split] += len(data)
  training, held_out = samples
  return _in_order(training), _in_order(held_out)


def _in_order(heap: list) -> list[bytes]:
  heap.sort(key=lambda item: item[1])
  return [data for *_, data in heap]


def train(
  sentences: Iterator[str | bytes],
  vocab_size: int,
  model_type: str,
  num_threads: int,
) -> bytes:
  """Trains a SentencePiece model that is lossless on any text.

  Returns:
    The serialized model.

  Raises:
    SizeError: the text has too few pieces for vocab_size, or too many
      characters.
    UserError: the text has nothing to train on, such as only line breaks.
  """
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=sentences,
      model_writer=model,
      model_type=model_type,
      vocab_size=vocab_size,
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      byte_fallback=True,
      split_digits=True,
      character_coverage=0.9995,
      max_sentence_length=4 * CHUNK_CHARS,  # in bytes
      pad_id=0,
      bos_id=1,
      eos_id=2,
      unk_id=3,
      pad_piece='<pad>',
      bos_piece='<bos>',
      eos_piece='<eos>',
      unk_piece='<unk>',
      # Control symbols: no text is encoded to their ids.
      control_symbols=CONTROL,
      user_defined_symbols=LINE_BREAKS,
      num_threads=num_threads,
      minloglevel=2,
    )
  except RuntimeError as e:
    # Such as: all texts are line breaks, which are symbols of their own.
    error = _size_error(vocab_size, str(e)) or UserError(
      f'cannot train a tokenizer of {vocab_size} token ids on this text '
      f'({one_line(e)}): give more text, or another --vocab_size'
    )
    raise error from e
  return model.getvalue()


def _size_error(vocab_size: int, message: str) -> SizeError | None:
  size = f'--vocab_size {vocab_size}'
  if found := re.search(r'too high .* value <= (\d+)', message):
    return SizeError(
      f'{size} is too large for this text: set it to {found[1]} or less',
      int(found[1]),
    )
  if found := re.search(r'required_chars\. \d+ vs (\d+)', message):
    return SizeError(
      f'{size} is too small for the characters of this text: set it to '
      f'{found[1]} or more',
      int(found[1]),
    )
  return None
