"""Fixed-length token rows on disk: ArrayRecord shards and a JSON manifest.

    directory/manifest.json
    directory/train-00000.array_record ...
    directory/heldout-00000.array_record ...

One record is one row, little-endian, without a header: the manifest tells its
length and dtype. A directory is complete exactly when its manifest is there
and every shard has the size that the manifest says.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import uuid

import numpy as np
from array_record.python import array_record_module

from maskdiff.errors import UserError

FORMAT_VERSION = 1
MANIFEST = 'manifest.json'
SPLITS = ('train', 'heldout')

_FIX = (
  'delete the directory to prepare it again, or set --config.data.path to a '
  "prepared directory or to 'embedded'"
)


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of rows.

  Attributes:
    file: name inside the directory.
    rows: number of records.
    bytes: size of the file.
    digest: 16 hex digits of the BLAKE2b of all rows' bytes, in order.
  """

  file: str
  rows: int
  bytes: int
  digest: str


@dataclasses.dataclass(frozen=True)
class Split:
  """What one split holds. Everything counts the kept rows only.

  Attributes:
    rows: over all shards.
    tokens: rows * row_length. The eos after each document is a token.
    text_bytes: UTF-8 bytes of the text that exactly these tokens stand for
      (an eos stands for none), so that
      bits per byte = nats per token * tokens / text_bytes / ln 2.
    documents: documents of the split, also those that end in the dropped
      tail (less than one row).
    unigram_entropy_nats: entropy of the token counts, in nats per token; the
      loss of a model that knows the frequencies and nothing else.
  """

  shards: tuple[Shard, ...]
  rows: int
  tokens: int
  text_bytes: int
  documents: int
  unigram_entropy_nats: float


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a directory of rows holds; written last, read first.

  Attributes:
    source: what the text was, in words.
    tokenizer_fingerprint: of the tokenizer that made the rows.
    row_length: tokens per row.
    dtype: 'uint16' or 'uint32', of the tokens on disk.
    splits: 'train' and 'heldout'.
  """

  format_version: int
  source: str
  tokenizer_fingerprint: str
  vocab_size: int
  row_length: int
  dtype: str
  splits: dict[str, Split]


def token_dtype(vocab_size: int) -> str:
  """The smallest dtype on disk that holds every id of a vocabulary."""
  return 'uint16' if vocab_size <= 1 << 16 else 'uint32'


def write_shard(path: str | pathlib.Path, rows: np.ndarray) -> Shard:
  """Writes [R, row_length] rows to one file and returns its entry.

  The file appears under its name only when it is complete.

  Raises:
    OSError: the disk is full or the directory is not writable.
  """
  path = pathlib.Path(path)
  rows = np.ascontiguousarray(rows, rows.dtype.newbyteorder('<'))
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
  # One record per chunk, or reading a single row would decompress them all.
  writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1')
  try:
    for row in rows:
      writer.write(row.tobytes())
    writer.close()
  except RuntimeError as e:
    temporary.unlink(missing_ok=True)
    # What follows the first semicolon repeats the path and an offset.
    raise OSError(str(e).split(';')[0]) from e
  os.replace(temporary, path)
  digest = hashlib.blake2b(rows.tobytes(), digest_size=8).hexdigest()
  return Shard(path.name, len(rows), path.stat().st_size, digest)


def write_manifest(directory: str | pathlib.Path, manifest: Manifest) -> None:
  """Writes manifest.json, in one step. Call it after the last shard."""
  path = pathlib.Path(directory) / MANIFEST
  temporary = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
  text = json.dumps(dataclasses.asdict(manifest), indent=2) + '\n'
  temporary.write_text(text, encoding='utf-8')
  os.replace(temporary, path)


def read_manifest(directory: str | pathlib.Path) -> Manifest:
  """The manifest of a directory, after a check that its shards are all there.

  Raises:
    UserError: the directory or manifest is missing or unreadable, has another
      format version, or a shard is missing or differs in size.
  """
  directory = pathlib.Path(directory)
  path = directory / MANIFEST
  try:
    text = path.read_text(encoding='utf-8')
  except OSError as e:
    raise UserError(f'cannot read {path} ({e.strerror}): {_FIX}') from e
  try:
    fields = json.loads(text)
    version = fields['format_version']
    manifest = _manifest(fields) if version == FORMAT_VERSION else None
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f'{path} is damaged ({e!r}): {_FIX}') from e
  if manifest is None:
    raise UserError(
      f'{path} has format version {version}, this code reads '
      f'{FORMAT_VERSION}: {_FIX}'
    )
  for split in manifest.splits.values():
    for shard in split.shards:
      _check_size(directory / shard.file, shard)
  return manifest


def _manifest(fields: dict) -> Manifest:
  splits = {}
  for name in SPLITS:
    split = dict(fields['splits'][name])
    shards = tuple(Shard(**shard) for shard in split.pop('shards'))
    splits[name] = Split(shards=shards, **split)
  return Manifest(**{**fields, 'splits': splits})


def _check_size(path: pathlib.Path, shard: Shard) -> None:
  try:
    size = path.stat().st_size
  except OSError as e:
    raise UserError(f'shard {path} is missing: {_FIX}') from e
  if size != shard.bytes:
    raise UserError(
      f'shard {path} has {size} bytes, its manifest says {shard.bytes}: {_FIX}'
    )


class RowSource:
  """The rows of one split, by number; a source for grain.MapDataset.

  Safe to read from several threads, and picklable: files are opened again on
  the other side.
  """

  def __init__(
    self, directory: str | pathlib.Path, manifest: Manifest, split: str
  ):
    """Opens every shard of the split.

    Raises:
      UserError: a shard is missing, truncated, damaged, or has another number
        of rows than the manifest says.
    """
    self.directory = pathlib.Path(directory)
    self.manifest = manifest
    self.split = split
    self.row_length = manifest.row_length
    self._dtype = np.dtype(manifest.dtype).newbyteorder('<')
    self._open()

  def _open(self) -> None:
    shards = self.manifest.splits[self.split].shards
    self._paths = [self.directory / shard.file for shard in shards]
    self._stops = list(itertools.accumulate(shard.rows for shard in shards))
    self._readers = [
      _reader(path, shard)
      for path, shard in zip(self._paths, shards, strict=True)
    ]

  def __len__(self) -> int:
    return self._stops[-1] if self._stops else 0

  def __getitem__(self, i: int) -> np.ndarray:
    """Row i: [row_length] int32.

    Raises:
      IndexError: i is not in [0, len).
      UserError: the row is damaged on disk.
    """
    if not 0 <= i < len(self):
      raise IndexError(f'row {i} of {self!r} with {len(self)} rows')
    shard = bisect.bisect_right(self._stops, i)
    at = i - (self._stops[shard - 1] if shard else 0)
    try:
      # The range form: reading by a list of indices starts a thread pool.
      (record,) = self._readers[shard].read(at, at + 1)
      row = np.frombuffer(record, self._dtype)
    except (RuntimeError, ValueError) as e:
      raise UserError(
        f'row {at} of shard {self._paths[shard]} is damaged ({e}): {_FIX}'
      ) from e
    if row.shape != (self.row_length,):
      raise UserError(
        f'row {at} of shard {self._paths[shard]} has {row.size} tokens, its '
        f'manifest says {self.row_length}: {_FIX}'
      )
    return row.astype(np.int32)

  def __repr__(self) -> str:
    return f'RowSource({str(self.directory)!r}, split={self.split!r})'

  def __getstate__(self) -> tuple:
    return self.directory, self.manifest, self.split

  def __setstate__(self, state: tuple) -> None:
    self.__init__(*state)


def _reader(path: pathlib.Path, shard: Shard):
  _check_size(path, shard)
  try:
    # Rows are read in random order, so reading ahead only wastes bandwidth.
    reader = array_record_module.ArrayRecordReader(
      str(path), options='readahead_buffer_size:0', file_reader_buffer_size=4096
    )
    rows = reader.num_records()
  except RuntimeError as e:
    raise UserError(f'shard {path} is damaged ({e}): {_FIX}') from e
  if rows != shard.rows:
    raise UserError(
      f'shard {path} has {rows} rows, its manifest says {shard.rows}: {_FIX}'
    )
  return reader
