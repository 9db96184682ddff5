"""Rows of a batch: tokens and the optional columns doc and answer.

A column that the data do not store is None. None is part of the structure of
the pytree, so a missing column takes no memory on the host or the devices. The
objectives treat a missing column as follows: without `doc`, documents end with
eos; without `answer`, every token is an answer.

On disk a row holds its columns one after the other, little-endian: the tokens,
then `doc` as int16 or int32, then `answer` as bits.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

COLUMNS = ('doc', 'answer')  # in their order on disk, after the tokens
PADDING = -1  # the `doc` of a position without text
_BITS = 'bits'  # eight values of `answer` per byte, the first in the high bit


class Rows(NamedTuple):
  """Rows of tokens with their columns.

  Attributes:
    tokens: [B, L] int32.
    doc: [B, L] int32, the document of each token, -1 on padding. The numbers of
      the documents of a row are distinct and in any order. None: every document
      ends with eos, and the row has no padding.
    answer: [B, L] bool, the tokens that may be masked and carry a loss; the
      other tokens are a prompt. None: all tokens.
  """

  tokens: Any
  doc: Any = None
  answer: Any = None

  @property
  def columns(self) -> tuple[str, ...]:
    """Names of the columns that are not None, without the tokens."""
    return tuple(name for name in COLUMNS if getattr(self, name) is not None)


def empty(shape: tuple[int, int], columns: Sequence[str]) -> Rows:
  """Returns Rows of uninitialized NumPy arrays with these columns."""
  dtypes = {'doc': np.int32, 'answer': bool}
  others = {name: np.empty(shape, dtypes[name]) for name in columns}
  return Rows(np.empty(shape, np.int32), **others)


def map_columns(function: Callable, rows: Rows) -> Rows:
  """Returns Rows with `function` applied to every column that is not None."""
  return Rows(*(None if x is None else function(x) for x in rows))


def disk_dtypes(columns: Sequence[str], row_length: int) -> dict[str, str]:
  """Returns the dtype on disk of each column by name, in the order of COLUMNS.

  The numbers of documents are below the row length.
  """
  doc = 'int16' if row_length <= 1 << 15 else 'int32'
  dtypes = {'doc': doc, 'answer': _BITS}
  return {name: dtypes[name] for name in COLUMNS if name in columns}


def column_bytes(dtype: str, row_length: int) -> int:
  """Returns the bytes on disk of one column of a row."""
  if dtype == _BITS:
    return -(-row_length // 8)
  return row_length * np.dtype(dtype).itemsize


def pack(rows: Rows, dtype: str, columns: Mapping[str, str]) -> np.ndarray:
  """Returns the bytes of rows on disk, [R, row bytes] uint8.

  Args:
    rows: Rows of NumPy arrays [R, L] that hold these columns.
    dtype: dtype of the tokens on disk.
    columns: from `disk_dtypes`.
  """
  parts = [_to_bytes(rows.tokens, dtype)]
  for name, column_dtype in columns.items():
    column = getattr(rows, name)
    if column_dtype == _BITS:
      parts.append(np.packbits(column, axis=1))
    else:
      parts.append(_to_bytes(column, column_dtype))
  return np.concatenate(parts, axis=1)


def unpack(
  data: bytes, dtype: str, columns: Mapping[str, str], row_length: int
) -> Rows:
  """Returns the Rows of the joined bytes of R rows; inverts `pack`.

  Returns:
    Rows of [R, row_length]: tokens in the dtype on disk, doc int32, answer
    bool.
  """
  token_dtype = np.dtype(dtype).newbyteorder('<')
  if not columns:
    return Rows(np.frombuffer(data, token_dtype).reshape(-1, row_length))
  sizes = [column_bytes(d, row_length) for d in (dtype, *columns.values())]
  raw = np.frombuffer(data, np.uint8).reshape(-1, sum(sizes))
  first, *others = np.split(raw, np.cumsum(sizes)[:-1], axis=1)
  rows = Rows(np.ascontiguousarray(first).view(token_dtype))
  for (name, column_dtype), part in zip(columns.items(), others, strict=True):
    if column_dtype == _BITS:
      column = np.unpackbits(part, axis=1, count=row_length).view(bool)
    else:
      column_dtype = np.dtype(column_dtype).newbyteorder('<')
      column = np.ascontiguousarray(part).view(column_dtype).astype(np.int32)
    rows = rows._replace(**{name: column})
  return rows


def join(rows: Rows, count: int) -> Rows:
  """Joins every `count` adjacent rows, [R, L] to [R / count, count L].

  Document numbers are below L. The numbers of the i-th of the joined rows are
  raised by i L, so a document never continues in the next row. Without `doc`, a
  document continues until its eos.
  """
  length = rows.tokens.shape[1]
  if rows.doc is not None:
    part = np.arange(len(rows.doc), dtype=np.int32)[:, None] % count
    doc = np.where(rows.doc < 0, PADDING, rows.doc + part * length)
    rows = rows._replace(doc=doc)
  return map_columns(lambda x: x.reshape(-1, count * length), rows)


def fill(rows: Rows, columns: Sequence[str], eos_id: int) -> Rows:
  """Returns Rows with missing columns added: doc from eos, answer all True.

  Args:
    rows: Rows of NumPy arrays [R, L].
    columns: names of the columns that the result has.
    eos_id: last token of every document.
  """
  if 'doc' in columns and rows.doc is None:
    eos = (rows.tokens == eos_id).astype(np.int32)
    doc = np.cumsum(eos, axis=1, dtype=np.int32) - eos
    rows = rows._replace(doc=doc)
  if 'answer' in columns and rows.answer is None:
    rows = rows._replace(answer=np.ones(rows.tokens.shape, bool))
  return rows


def split_documents(rows: Rows, eos_id: int) -> list[np.ndarray]:
  """Returns the tokens of each document of one row, without padding.

  A document that ends with eos keeps its eos.

  Args:
    rows: Rows of NumPy arrays [L], a single row.
    eos_id: last token of every document, used if `doc` is not stored.
  """
  if rows.doc is None:
    ends = np.flatnonzero(rows.tokens == eos_id) + 1
    return np.split(rows.tokens, ends)
  ends = np.flatnonzero(np.diff(rows.doc)) + 1
  documents = np.split(rows.tokens, ends)
  numbers = rows.doc[[0, *ends]]
  return [d for d, n in zip(documents, numbers, strict=True) if n != PADDING]


def _to_bytes(column: np.ndarray, dtype: str) -> np.ndarray:
  column = np.ascontiguousarray(column, np.dtype(dtype).newbyteorder('<'))
  return column.view(np.uint8)
