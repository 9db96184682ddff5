"""Documents of a part of the input, read and encoded.

`of_text` encodes texts. Another function of the same form may be given to
prepare.prepare, such as one that encodes conversations.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from maskdiff.data import readers, records, sources
from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError

_TEXT_CHARS = 1 << 20  # characters encoded at once


class BadRecord(UserError):
  """A record cannot be used. The preparation is not to be resumed."""


class Document(NamedTuple):
  """An encoded document.

  Attributes:
    key: the split of the document depends on the hash of this text.
    tokens: [n] integers, with the eos at the end.
    answer: [n] bool, the tokens that carry a loss; None: all tokens.
    truncated: whether tokens or turns were cut off.
  """

  key: str
  tokens: np.ndarray
  answer: np.ndarray | None = None
  truncated: bool = False


def of_text(
  part: sources.Part,
  tokenizer: Tokenizer,
  counts: dict[str, int],
  *,
  num_threads: int = 1,
  piece_chars: int = 0,
) -> Iterator[Document]:
  """Yields the encoded texts of a part.

  Args:
    part: the part.
    tokenizer: Tokenizer.
    counts: numbers of skipped documents by reason; modified.
    num_threads: threads that encode.
    piece_chars: see `pieces`.

  Raises:
    UserError: input is damaged, or more than half of it is not text.
  """
  dtype = records.token_dtype(tokenizer.vocab_size)
  texts = pieces(texts_of(part, counts), piece_chars)
  for text, ids in _encoded(texts, tokenizer, num_threads):
    tokens = np.empty(len(ids) + 1, dtype)
    tokens[:-1], tokens[-1] = ids, tokenizer.eos_id
    yield Document(text, tokens)


def texts_of(part: sources.Part, skipped: dict) -> Iterator[str]:
  """Yields the texts of a part; counts skipped documents in `skipped`.

  Raises:
    UserError: input is damaged, or more than half of it is not text.
  """
  readable, unreadable = 0, 0
  for document in sources.read(part):
    if not isinstance(document, readers.Skipped):
      readable += 1
      yield document
      continue
    skipped[document.reason] = skipped.get(document.reason, 0) + 1
    unreadable += document.reason != readers.EMPTY
    if unreadable >= 100 and unreadable > readable:
      raise UserError(
        f'more than half of the documents before {document.where} cannot be '
        f'read ({document.reason}): check the format of that file'
      )


def pieces(texts: Iterable[str], chars: int) -> Iterator[str]:
  """Yields parts of at most `chars` characters, cut at line ends if possible.

  Longer lines are cut anywhere. With chars=0, texts stay whole.
  """
  for text in texts:
    if not chars:
      yield text
      continue
    start = 0
    while start < len(text):
      stop = start + chars
      if stop < len(text):
        stop = text.rfind('\n', start, stop) + 1 or stop
      yield text[start:stop]
      start = stop


def _encoded(
  documents: Iterable[str], tokenizer, num_threads: int
) -> Iterator[tuple[str, list[int]]]:
  """Yields texts and their ids."""
  texts, chars = [], 0

  def encoded():
    ids = tokenizer.encode_batch(texts, num_threads)
    return list(zip(texts, ids, strict=True))

  for document in documents:
    texts.append(document)
    chars += len(document)
    if chars >= _TEXT_CHARS:
      yield from encoded()
      texts, chars = [], 0
  yield from encoded()
