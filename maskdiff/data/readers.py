"""Streaming readers: one per input format, from a file to documents."""

import contextlib
import dataclasses
import gzip
import importlib
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from maskdiff.errors import UserError

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
    data = _unpacked(path, file).read()
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
  with open_parquet(path, size, text_key) as file:
    groups = range(start, stop or file.metadata.num_row_groups)
    row = sum(file.metadata.row_group(g).num_rows for g in range(start))
    for batch in file.iter_batches(
      _RECORDS_PER_BATCH, groups, [text_key], use_threads=False
    ):
      try:
        values = batch.column(0).to_pylist()
      except UnicodeDecodeError:
        values = batch.column(0).cast('binary').to_pylist()
      for value in values:
        yield value, 'row', row
        row += 1


def _tfds_records(path, size, start, stop, text_key):
  feature = tfds_feature(os.path.dirname(path), text_key)
  array_record = module('array_record.python.array_record_module')
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
    lines = _unpacked(path, file)
    while (at < stop or not stop) and (line := lines.readline()):
      number += 1
      if not line.isspace():
        yield (line, 'byte', at) if stop else (line, 'line', number)
      at += len(line)


def _unpacked(path: str, file: BinaryIO) -> BinaryIO:
  if path.lower().endswith('.gz'):
    return io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER)
  if path.lower().endswith('.zst'):
    return io.BufferedReader(_Zstandard(file), _BUFFER)
  return file


class _Zstandard(io.RawIOBase):
  """Decompresses a file; unlike zstandard's reader, it detects truncation."""

  def __init__(self, file: BinaryIO):
    zstandard = module('zstandard')
    # The largest window, made by `zstd --long=31`.
    self._unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    self._error = zstandard.ZstdError
    self._file = file
    self._frame = None
    self._packed, self._unpacked = b'', memoryview(b'')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    while not self._unpacked:
      packed = self._packed or self._file.read(1 << 16)
      if not packed and self._frame:
        raise EOFError('the compressed data are truncated')
      if not packed:
        return 0
      self._frame = self._frame or self._unpacker.decompressobj()
      try:
        self._unpacked = memoryview(self._frame.decompress(packed))
      except self._error as e:
        raise OSError(str(e)) from e
      self._packed = self._frame.unused_data
      if self._frame.eof:
        self._frame = None
    count = min(len(buffer), len(self._unpacked))
    buffer[:count] = self._unpacked[:count]
    self._unpacked = self._unpacked[count:]
    return count


def tfds_feature(directory: str, text_key: str):
  """Returns a decoder of the text field, much faster than one of all fields."""
  tfds = module('tensorflow_datasets')
  features = tfds.builder_from_directory(directory).info.features
  if text_key not in features:
    raise _no_field(directory, text_key, features)
  return tfds.features.FeaturesDict({text_key: features[text_key]})


@contextlib.contextmanager
def open_parquet(path: str, size: int, text_key: str):
  """Opens a Parquet file; raises UserError if it lacks the column text_key."""
  parquet = module('pyarrow.parquet')
  damage = module('pyarrow').ArrowException
  # By default pyarrow holds a whole row group in memory.
  options = dict(pre_buffer=False, buffer_size=_BUFFER)
  with _open(path, size, damage), parquet.ParquetFile(path, **options) as file:
    names = file.schema_arrow.names
    if text_key not in names:
      raise _no_field(path, text_key, names)
    yield file


@contextlib.contextmanager
def _open(path: str, size: int, *damage: type[Exception]) -> Iterator[BinaryIO]:
  """Opens a file; turns OSErrors and `damage` while reading into UserErrors."""
  try:
    with open(path, 'rb', _BUFFER) as file:
      actual = os.fstat(file.fileno()).st_size
      if actual != size:
        raise UserError(
          f'{path} changed from {size} to {actual} bytes since the start: '
          'restore the file, or prepare into another directory'
        )
      yield file
  except UserError:
    raise
  except (OSError, EOFError, zlib.error, *damage) as e:
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
  reason = getattr(error, 'strerror', None) or str(error)
  reason = ' '.join(reason.split())
  return UserError(f'cannot read {path} ({reason}): replace it or remove it')


def _no_field(where: str, text_key: str, names: Iterable[str]) -> UserError:
  return UserError(
    f'{where} has no field {text_key!r} among {sorted(names)}: set --text_key '
    'to the field that holds the text'
  )


def module(name: str):
  """Imports an optional package; raises UserError if it is not installed."""
  try:
    return importlib.import_module(name)
  except ImportError as e:
    package = name.partition('.')[0]
    raise UserError(
      f'{package} is not installed and this format needs it: pip install -r '
      'requirements-data.txt'
    ) from e
