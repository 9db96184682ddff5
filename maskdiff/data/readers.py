"""Streaming readers: one per input format, from a file to documents."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from maskdiff.data import unpack
from maskdiff.errors import UserError, one_line
from maskdiff.files import reading

# Why a document is skipped.
NOT_UTF8 = 'not UTF-8'
NOT_JSON = 'not JSON'
NO_TEXT = 'no text'
EMPTY = 'empty'
NOT_UNICODE = 'not Unicode'
REASONS = (NOT_UTF8, NOT_JSON, NO_TEXT, EMPTY, NOT_UNICODE)

# Bytes per read; a mounted bucket gets one request for each.
_BUFFER = 1 << 20
_RECORDS_PER_BATCH = 256
_BATCH_BYTES = 1 << 26  # of Parquet
_TEXT_TYPES = ('string', 'binary')  # of Parquet

# Largest document and line. Parsed JSON takes up to 20 times its bytes.
MAX_DOCUMENT_BYTES = 1 << 28
MAX_LINE_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Skipped:
  """A document that cannot be used.

  Attributes:
    reason: one of REASONS.
    where: the file and the place in it: a line, counted from 1; the byte at
      which the line starts, if the file was cut; a row or a record, counted
      from 0.
  """

  reason: str
  where: str


# A reader yields tuples: a value and, except for whole files, its place in the
# file. The value is str, bytes, Skipped, or any object that is not a text.


def whole_file(path, size, *_):
  with _open(path, size) as file:
    data = _read(_unpacked(path, file, size), path)
  yield (data,)


def _text_lines(path, size, start, stop, _):
  for line, *place in _lines(path, size, start, stop):
    yield line.removesuffix(b'\n').removesuffix(b'\r'), *place


def _json_lines(path, size, start, stop, text_key):
  seen = False
  for line, *place in _lines(path, size, start, stop):
    try:
      # Decode first: json guesses the encoding of bytes and accepts surrogates.
      value = json.loads(line.decode().removeprefix('\ufeff'))
    except UnicodeDecodeError:
      value = Skipped(NOT_UTF8, _where(path, *place))
    except (ValueError, RecursionError):
      value = Skipped(NOT_JSON, _where(path, *place))
    else:
      # If no earlier document has the field, text_key is probably wrong. If
      # some have it, only this document is bad.
      if isinstance(value, dict) and text_key not in value and not seen:
        raise _no_field(_where(path, *place), text_key, value)
      value = value.get(text_key) if isinstance(value, dict) else None
      seen = seen or value is not None
    yield value, *place


def _parquet_rows(path, size, start, stop, text_key):
  left = limit = unpack.limit_bytes(size)
  with open_parquet(path, size, text_key) as (file, dictionaries):
    groups = range(start, stop or file.metadata.num_row_groups)
    row = sum(file.metadata.row_group(g).num_rows for g in range(start))
    for group in groups:
      if dictionaries is None:  # the column is not text
        num_rows = file.metadata.row_group(group).num_rows
        values = itertools.repeat(None, num_rows)
      else:
        values = _parquet_texts(file, dictionaries, group, text_key)
      for value in values:
        yield value, 'row', row
        row += 1
        left -= len(value or b'')
        if left < 0:
          raise unpack.expands(path, limit)


def _parquet_texts(file, dictionaries, group: int, text_key: str):
  """Yields the texts of a row group as bytes or None, few at a time."""
  read = lambda file, rows: file.iter_batches(
    rows, [group], [text_key], use_threads=False
  )
  # A dictionary stores a repeated text once, but pyarrow copies it for every
  # row of a batch, so that a small file could fill the memory.
  longest = 1
  for batch in itertools.islice(read(dictionaries, 1), 1):
    lengths = batch.column(0).dictionary.cast('binary')
    longest = max((len(v.as_py() or b'') for v in lengths), default=1)
  metadata = file.metadata.row_group(group)
  mean = metadata.total_byte_size // max(1, metadata.num_rows)
  rows = _BATCH_BYTES // max(1, longest, mean)
  for batch in read(file, max(1, min(rows, _RECORDS_PER_BATCH))):
    yield from batch.column(0).cast('large_binary').to_pylist()


def _record_rows(path, size, start, stop):
  with open_parquet(path, size, '') as (file, _):
    groups = range(start, stop or file.metadata.num_row_groups)
    row = sum(file.metadata.row_group(g).num_rows for g in range(start))
    for group in groups:
      metadata = file.metadata.row_group(group)
      mean = metadata.total_byte_size // max(1, metadata.num_rows)
      rows = min(_BATCH_BYTES // max(1, mean), _RECORDS_PER_BATCH)
      batches = file.iter_batches(max(1, rows), [group], use_threads=False)
      for record in (r for batch in batches for r in batch.to_pylist()):
        yield record, 'row', row
        row += 1


def _tfds_records(path, size, start, stop, text_key):
  feature = tfds_feature(os.path.dirname(path), text_key)
  array_record = unpack.module('array_record.python.array_record_module')
  # ArrayRecord and tfds raise several types of exceptions.
  with _open(path, size, Exception):
    reader = array_record.ArrayRecordReader(path)
    for first in range(start, stop, _RECORDS_PER_BATCH):
      last = min(first + _RECORDS_PER_BATCH, stop)
      for at, record in enumerate(reader.read(first, last), first):
        yield feature.deserialize_example_np(record)[text_key], 'record', at
    reader.close()


READERS = {
  'files': whole_file,
  'lines': _text_lines,
  'jsonl': _json_lines,
  'parquet': _parquet_rows,
  'tfds': _tfds_records,
}


def _read(file: BinaryIO, path: str) -> bytes:
  """Returns the rest of a file; raises UserError if it is too long."""
  data = io.BytesIO()
  while chunk := file.read(_BUFFER):
    data.write(chunk)
    if data.tell() > MAX_DOCUMENT_BYTES:
      raise UserError(
        f'{path} holds a document of more than {MAX_DOCUMENT_BYTES:,} bytes, '
        'the limit: cut the file into smaller ones, or give --by_line if each '
        'line of a .txt file is a document'
      )
  return data.getvalue()


def _lines(
  path: str, size: int, start: int, stop: int
) -> Iterator[tuple[bytes, str, int]]:
  """Yields nonblank lines that begin in a range of bytes, with their places."""
  with _open(path, size) as file:
    number, at = 0, start
    if start:
      # Skip a line that begins before the range.
      file.seek(start - 1)
      at -= 1
      while at < stop:
        skipped = file.readline(_BUFFER)
        at += len(skipped)
        if skipped.endswith(b'\n'):
          break
    lines = _unpacked(path, file, size)
    while at < stop or not stop:
      line = lines.readline(MAX_LINE_BYTES + 1)
      if not line:
        break
      number += 1
      place = ('byte', at) if stop else ('line', number)
      if len(line) > MAX_LINE_BYTES:
        raise UserError(
          f'{_where(path, *place)} has more than {MAX_LINE_BYTES:,} bytes, the '
          'limit for a line: break the line or remove it'
        )
      if not line.isspace():
        yield line, *place
      at += len(line)


# Readers of whole records, which have no text_key.
RECORD_READERS = {'jsonl': _lines, 'parquet': _record_rows}


def _unpacked(path: str, file: BinaryIO, size: int) -> BinaryIO:
  return unpack.unpacked(path, file, size, _BUFFER)


def tfds_feature(directory: str, text_key: str):
  """Returns a decoder of the text field, much faster than one of all fields."""
  tfds = unpack.module('tensorflow_datasets')
  features = tfds.builder_from_directory(directory).info.features
  if text_key not in features:
    raise _no_field(directory, text_key, features)
  return tfds.features.FeaturesDict({text_key: features[text_key]})


@contextlib.contextmanager
def open_parquet(path: str, size: int, text_key: str):
  """Opens a Parquet file, also to read the dictionaries of a column of text.

  Yields:
    (file, the same file with the column as dictionaries; None if the column is
    not text, or text_key is '').

  Raises:
    UserError: the file is damaged, or does not have one column text_key.
  """
  parquet = unpack.module('pyarrow.parquet')
  # UnicodeDecodeError: a text of a row is not UTF-8.
  damage = (unpack.module('pyarrow').ArrowException, UnicodeDecodeError)
  # By default pyarrow holds a whole row group in memory.
  options = dict(pre_buffer=False, buffer_size=_BUFFER)
  with (
    _open(path, size, *damage),
    parquet.ParquetFile(path, **options) as file,
    contextlib.ExitStack() as stack,
  ):
    if not text_key:
      yield file, None
      return
    names = file.schema_arrow.names
    if text_key not in names:
      raise _no_field(path, text_key, names)
    if names.count(text_key) > 1:
      raise UserError(f'{path} has several columns {text_key!r}: rename them')
    type = file.schema_arrow.field(text_key).type
    type = str(getattr(type, 'value_type', type))
    dictionaries = None
    # The names of nested columns in the file are longer.
    if (
      type.removeprefix('large_').removesuffix('_view') in _TEXT_TYPES
      and file.metadata.schema.names.count(text_key) == 1
    ):
      options |= dict(metadata=file.metadata, read_dictionary=[text_key])
      dictionaries = stack.enter_context(parquet.ParquetFile(path, **options))
    yield file, dictionaries


@contextlib.contextmanager
def _open(path: str, size: int, *damage: type[Exception]) -> Iterator[BinaryIO]:
  """Opens a file; turns OSErrors and `damage` while reading into UserErrors."""
  try:
    opened = reading.open_regular(path, _BUFFER)
  except UserError as e:
    raise UserError(f'{e}: replace it or remove it') from e
  try:
    with opened as file:
      actual = os.fstat(file.fileno()).st_size
      if actual != size:
        raise UserError(
          f'{path} changed from {size} to {actual} bytes since the start: '
          'restore the file, or prepare into another directory'
        )
      yield file
  except UserError:
    raise
  except (OSError, *unpack.DAMAGE, *damage) as e:
    raise cannot_read(path, e) from e


def document(value, path: str, *place) -> str | Skipped:
  """Returns the text of a reader's value, or why it cannot be used."""
  if isinstance(value, Skipped):
    return value
  if isinstance(value, bytes):
    try:
      value = value.decode()
    except UnicodeDecodeError:
      return Skipped(NOT_UTF8, _where(path, *place))
  if not isinstance(value, str):
    return Skipped(NO_TEXT, _where(path, *place))
  if not value:
    return Skipped(EMPTY, _where(path, *place))
  try:
    value.encode()
  except UnicodeEncodeError:
    return Skipped(NOT_UNICODE, _where(path, *place))
  return value


def _where(path: str, *place) -> str:
  return ' '.join([path, *map(str, place)])


def cannot_read(path: str, error: Exception) -> UserError:
  reason = one_line(getattr(error, 'strerror', None) or error)
  return UserError(f'cannot read {path} ({reason}): replace it or remove it')


def _no_field(where: str, text_key: str, names: Iterable[str]) -> UserError:
  first = ', '.join(repr(name[:40]) for name in sorted(names)[:10])
  return UserError(
    f'{where} has no field {text_key!r} among {first}: set --text_key to the '
    'field that holds the text'
  )
