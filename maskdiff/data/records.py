"""Format of prepared data: ArrayRecord shards of rows and a JSON manifest.

    directory/manifest.json
    directory/train-00000.array_record ...
    directory/heldout-00000.array_record

One record is one row, little-endian, without a header. A row holds its tokens,
then its other columns (rows.py). The manifest holds the row length, the dtypes
of the columns, and the size and checksums of every shard. A directory is
complete if it has a manifest and every shard matches it; row_reader.verify
checks this.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterable
from typing import BinaryIO

import numpy as np
from array_record.python import array_record_module

from maskdiff.data import manifest_fields
from maskdiff.data import rows as rows_lib
from maskdiff.errors import UserError, one_line, require_utf8
from maskdiff.files import reading
from maskdiff.files.paths import local_path

FORMAT_VERSION = 2  # rows of tokens only, which earlier code also reads
COLUMNS_VERSION = 3  # rows with more columns, which earlier code cannot read
MANIFEST = 'manifest.json'
SPLITS = ('train', 'heldout')

# One record per chunk, or reading a single row would decompress its
# neighbours. Levels above 1 cost twice the time for 2% less space.
_WRITE = 'group_size:1,zstd:1'
# Rows are read in random order, so reading ahead only wastes bandwidth.
READ_OPTIONS = dict(
  options='readahead_buffer_size:0', file_reader_buffer_size=4096
)

FIX = (
  'delete the directory and prepare it again, copy the file from elsewhere, or '
  'set --config.data.path to another prepared directory'
)


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of rows.

  Attributes:
    file: name inside the directory.
    rows: number of records.
    bytes: size of the file.
    digest: 16 hex digits of the BLAKE2b of all rows' bytes, in order.
    sample_digest: the same hash of the first, the middle and the last row.
  """

  file: str
  rows: int
  bytes: int
  digest: str
  sample_digest: str


@dataclasses.dataclass(frozen=True)
class Split:
  """Shards and statistics of one split.

  Attributes:
    shards: files of the split.
    rows: number of rows in all shards.
    tokens: number of tokens that carry a loss: rows * row_length, without
      padding and prompts. The eos after each document is a token.
    text_bytes: UTF-8 bytes of the text of these tokens (eos has none).
    documents: number of documents in the split; the last one may be cut off.
    unigram_entropy_nats: entropy of the token frequencies, in nats per token:
      the loss of a unigram model.
  """

  shards: tuple[Shard, ...]
  rows: int
  tokens: int
  text_bytes: int
  documents: int
  unigram_entropy_nats: float


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Contents of a prepared directory; written after its last shard.

  Attributes:
    source: description of the input.
    settings: settings that decide the rows, a flat dict; see data.prepare.
    tokenizer_fingerprint: fingerprint of the tokenizer that made the rows.
    eos_id: token after each document. It occurs nowhere else, unless the rows
      have the column `doc`.
    row_length: tokens per row.
    dtype: dtype of the tokens on disk, 'uint16' or 'uint32'.
    skipped: number of skipped documents by reason.
    splits: 'train' and 'heldout'.
    columns: dtype on disk of each column after the tokens, by name, from
      rows.disk_dtypes; empty in format version 2.
    statistics: numbers of tokens and documents by name, see shards.STATISTICS;
      empty if launch/prepare.py did not write the columns.
  """

  format_version: int
  source: str
  settings: dict[str, str | int | float | bool]
  tokenizer_fingerprint: str
  vocab_size: int
  eos_id: int
  row_length: int
  dtype: str
  skipped: dict[str, int]
  splits: dict[str, Split]
  columns: dict[str, str] = dataclasses.field(default_factory=dict)
  statistics: dict[str, int] = dataclasses.field(default_factory=dict)

  @property
  def row_bytes(self) -> int:
    """Bytes of a row on disk, uncompressed."""
    dtypes = self.dtype, *self.columns.values()
    return sum(rows_lib.column_bytes(d, self.row_length) for d in dtypes)


def token_dtype(vocab_size: int) -> str:
  """Returns the smallest dtype on disk that holds all ids of a vocabulary."""
  return 'uint16' if vocab_size <= 1 << 16 else 'uint32'


def write_shard(
  path: str | pathlib.Path,
  blocks: Iterable[np.ndarray],
  temporary: str | pathlib.Path | None = None,
) -> Shard | None:
  """Writes blocks of rows to one file and returns its entry.

  A block is [R, row_length] tokens, or [R, row bytes] uint8 from rows.pack. The
  file gets its name when it is complete. If there are no rows, no file is
  written and the result is None. Blocks are consumed one by one.

  Args:
    temporary: directory for the unfinished file, on the same file system;
      default: the directory of `path`.

  Raises:
    OSError: the disk is full or the directory is not writable.
  """
  path = pathlib.Path(path)
  unfinished = pathlib.Path(temporary or path.parent) / (
    f'.{path.name}.{uuid.uuid4().hex}'
  )
  digest, rows, row_bytes = hashlib.blake2b(digest_size=8), 0, 0
  writer = None
  try:
    for block in blocks:
      if not len(block):
        continue
      block = np.ascontiguousarray(block, block.dtype.newbyteorder('<'))
      with _library_errors():
        writer = writer or array_record_module.ArrayRecordWriter(
          str(unfinished), _WRITE
        )
        for row in block:
          writer.write(row.tobytes())
      digest.update(block)
      rows += len(block)
      row_bytes = block.shape[1] * block.itemsize
    if writer is None:
      return None
    with _library_errors():
      writer.close()
      reader = array_record_module.ArrayRecordReader(
        str(unfinished), **READ_OPTIONS
      )
      samples = sample_digest(reader, rows, row_bytes)
      reader.close()
    size = unfinished.stat().st_size
    replace(unfinished, path)
  finally:
    with contextlib.suppress(RuntimeError):  # a full disk raises once more
      if writer is not None and writer.is_open():
        writer.close()
    unfinished.unlink(missing_ok=True)
  return Shard(path.name, rows, size, digest.hexdigest(), samples)


@contextlib.contextmanager
def _library_errors():
  """Raises errors of ArrayRecord as OSError."""
  try:
    yield
  # The library reads a missing file as an empty one.
  except (RuntimeError, IndexError) as e:
    raise OSError(short_reason(e)) from e


def write_file(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
  """Writes a file atomically; `write` receives the open binary file.

  Raises:
    OSError: the disk is full or the directory is not writable.
  """
  unfinished = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
  with open(unfinished, 'wb') as f:
    write(f)
  replace(unfinished, path)


def replace(unfinished: pathlib.Path, path: pathlib.Path) -> None:
  """Gives a finished file its name, on the same file system.

  Raises:
    OSError: the directory is not writable.
  """
  # Sync before the rename: after a power cut the name must not show half a
  # file.
  _sync(unfinished)
  os.replace(unfinished, path)
  _sync(path.parent)


def _sync(path: pathlib.Path) -> None:
  handle = os.open(path, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def write_manifest(directory: str | pathlib.Path, manifest: Manifest) -> None:
  """Writes manifest.json atomically. Call it after the last shard.

  Raises:
    UserError: `read_manifest` would refuse it, for example for a setting that
      is a list.
    OSError: the disk is full or the directory is not writable.
  """
  fields = dataclasses.asdict(manifest)
  # Earlier code does not know these fields.
  for name in ('columns', 'statistics'):
    if not fields[name]:
      del fields[name]
  text = json.dumps(fields, indent=2) + '\n'
  path = pathlib.Path(directory) / MANIFEST
  try:
    manifest_fields.check(reading.parse_json(text, MANIFEST), SPLITS)
  except ValueError as e:
    raise UserError(f'cannot write {path}: {one_line(e)}') from e
  write_file(path, lambda f: f.write(text.encode()))


def read_manifest(directory: str | pathlib.Path) -> Manifest:
  """Reads the manifest of a directory; does not open its shards.

  Raises:
    UserError: the directory or manifest is missing or unreadable, has another
      format version, or holds a value that a manifest cannot have.
  """
  path = local_path(directory) / MANIFEST
  require_utf8(path.parent)  # ArrayRecord takes no other path
  try:
    content = reading.read_bytes(path)
  except UserError as e:
    raise UserError(
      f'{e}: it is written when launch/prepare.py has finished; run that '
      f'(again){_text_hint(path.parent)}, or set --config.data.path to a '
      "prepared directory or to 'embedded'"
    ) from e
  try:
    fields = reading.parse_json(content, MANIFEST)
    version = manifest_fields.version(fields)
    if version in (FORMAT_VERSION, COLUMNS_VERSION):
      manifest_fields.check(fields, SPLITS)
      return _manifest(fields)
  except ValueError as e:  # also UserError
    raise UserError(f'{path} is damaged ({one_line(e)}): {FIX}') from e
  raise UserError(
    f'{path} has format version {version}, this code reads {FORMAT_VERSION} '
    f'and {COLUMNS_VERSION}: delete the directory and prepare it again'
  )


def _text_hint(directory: pathlib.Path) -> str:
  # A directory of text, not of rows whose preparation was interrupted.
  if not directory.is_dir() or (directory / '.prepare').exists():
    return ''
  return (
    f', as in `python launch/prepare.py --source {directory} --out '
    f'{directory}_rows --train_tokenizer`'
  )


def _manifest(fields: dict) -> Manifest:
  splits = {}
  for name in SPLITS:
    split = dict(fields['splits'][name])
    shards = tuple(Shard(**shard) for shard in split.pop('shards'))
    splits[name] = Split(shards=shards, **split)
  manifest = Manifest(**{**fields, 'splits': splits})
  if bool(manifest.columns) != (manifest.format_version == COLUMNS_VERSION):
    raise ValueError(
      f'columns {manifest.columns} in format version {manifest.format_version}'
    )
  return manifest


def sample_digest(reader, rows: int, row_bytes: int) -> str:
  """Returns the checksum of the first, middle and last row of a shard.

  Raises:
    RuntimeError: a row is damaged or does not have row_bytes bytes.
  """
  digest = hashlib.blake2b(digest_size=8)
  for at in (0, rows // 2, rows - 1):
    (record,) = reader.read(at, at + 1)
    if len(record) != row_bytes:
      raise RuntimeError(f'row {at} has {len(record)} bytes, not {row_bytes}')
    digest.update(record)
  return digest.hexdigest()


def short_reason(error: Exception) -> str:
  """Returns the message of an ArrayRecord error without path and offset."""
  return str(error).split(';')[0]
