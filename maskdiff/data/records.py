"""Fixed-length token rows on disk: ArrayRecord shards and a JSON manifest.

    directory/manifest.json
    directory/train-00000.array_record ...
    directory/heldout-00000.array_record

One record is one row, little-endian, without a header: the manifest tells its
length and dtype. A directory is complete exactly when its manifest is there
and every shard is what the manifest says; `verify` looks.
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import resource
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO

import numpy as np
from array_record.python import array_record_module

from maskdiff.data.paths import local_path
from maskdiff.errors import UserError

FORMAT_VERSION = 2
MANIFEST = 'manifest.json'
SPLITS = ('train', 'heldout')

# One record per chunk, or reading a single row would decompress its
# neighbours. Levels above 1 cost twice the time for 2% less space.
_WRITE = 'group_size:1,zstd:1'
# Rows are read in random order, so reading ahead only wastes bandwidth.
_READ = dict(options='readahead_buffer_size:0', file_reader_buffer_size=4096)

_RETRY_S = (0.01, 0.1, 1.0)  # between attempts to read a row

_FIX = (
  'delete the directory and prepare it again, copy the file from elsewhere, or '
  'set --config.data.path to another prepared directory'
)


class DamagedRow(UserError):
  """A row that cannot be read while the rest of its shard may be fine."""


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file of rows.

  Attributes:
    file: name inside the directory.
    rows: number of records.
    bytes: size of the file.
    digest: 16 hex digits of the BLAKE2b of all rows' bytes, in order.
    sample_digest: the same of the first, the middle and the last row.
  """

  file: str
  rows: int
  bytes: int
  digest: str
  sample_digest: str


@dataclasses.dataclass(frozen=True)
class Split:
  """What one split holds. Everything but documents counts the rows.

  Attributes:
    rows: over all shards.
    tokens: rows * row_length. The eos after each document is a token.
    text_bytes: UTF-8 bytes of the text that exactly these tokens stand for
      (eos has none).
    documents: that the split was made of; the last one may be cut off.
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
    settings: what the rows depend on, a flat dict; see data.prepare.
    tokenizer_fingerprint: of the tokenizer that made the rows.
    eos_id: stands after each document, and nowhere else.
    row_length: tokens per row.
    dtype: 'uint16' or 'uint32', of the tokens on disk.
    skipped: documents that were left out, by reason.
    splits: 'train' and 'heldout'.
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


def token_dtype(vocab_size: int) -> str:
  """The smallest dtype on disk that holds every id of a vocabulary."""
  return 'uint16' if vocab_size <= 1 << 16 else 'uint32'


def write_shard(
  path: str | pathlib.Path,
  blocks: Iterable[np.ndarray],
  temporary: str | pathlib.Path | None = None,
) -> Shard | None:
  """Writes [R, row_length] blocks to one file and returns its entry.

  The file appears under its name only when it is complete; without a single
  row there is none, and the result is None. Blocks are consumed one by one.

  Args:
    temporary: directory for the unfinished file, on the same file system; by
      default that of the file.

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
    writer.close()
    reader = array_record_module.ArrayRecordReader(str(unfinished), **_READ)
    sample_digest = _sample_digest(reader, rows, row_bytes)
    reader.close()
    size = unfinished.stat().st_size
    _replace(unfinished, path)
  except (RuntimeError, IndexError) as e:  # a missing file is an empty one
    raise OSError(_short(e)) from e
  finally:
    with contextlib.suppress(RuntimeError):  # a second one, of a full disk
      if writer is not None and writer.is_open():
        writer.close()
    unfinished.unlink(missing_ok=True)
  return Shard(path.name, rows, size, digest.hexdigest(), sample_digest)


def write_file(path: pathlib.Path, write: Callable[[BinaryIO], object]) -> None:
  """Makes a file in one step, with what `write` puts into it.

  Raises:
    OSError: the disk is full or the directory is not writable.
  """
  unfinished = path.with_name(f'.{path.name}.{uuid.uuid4().hex}')
  with open(unfinished, 'wb') as f:
    write(f)
  _replace(unfinished, path)


def _replace(unfinished: pathlib.Path, path: pathlib.Path) -> None:
  # On the disk before it has its name, or a power cut would show half of it.
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
  """Writes manifest.json, in one step. Call it after the last shard."""
  text = json.dumps(dataclasses.asdict(manifest), indent=2) + '\n'
  path = pathlib.Path(directory) / MANIFEST
  write_file(path, lambda f: f.write(text.encode()))


def read_manifest(directory: str | pathlib.Path) -> Manifest:
  """The manifest of a directory; its shards are not looked at.

  Raises:
    UserError: the directory or manifest is missing or unreadable, or has
      another format version.
  """
  directory = local_path(directory)
  path = directory / MANIFEST
  try:
    text = path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as e:
    reason = getattr(e, 'strerror', None) or 'not text'
    raise UserError(
      f'cannot read {path} ({reason}): it is written when launch/prepare.py '
      'has finished; run that (again), or set --config.data.path to a prepared '
      "directory or to 'embedded'"
    ) from e
  try:
    fields = json.loads(text)
    version = fields['format_version']
    manifest = _manifest(fields) if version == FORMAT_VERSION else None
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(f'{path} is damaged ({e!r}): {_FIX}') from e
  if manifest is None:
    raise UserError(
      f'{path} has format version {version}, this code reads '
      f'{FORMAT_VERSION}: delete the directory and prepare it again'
    )
  return manifest


def _manifest(fields: dict) -> Manifest:
  splits = {}
  for name in SPLITS:
    split = dict(fields['splits'][name])
    shards = tuple(Shard(**shard) for shard in split.pop('shards'))
    splits[name] = Split(shards=shards, **split)
  return Manifest(**{**fields, 'splits': splits})


def verify(
  directory: str | pathlib.Path,
  manifest: Manifest,
  *,
  rows: str = 'sample',
  share: tuple[int, int] = (0, 1),
  threads: int = 32,
) -> None:
  """Compares shards with the manifest: size, number of rows, checksums.

  To open a shard takes time in proportion to its rows: about 0.3 ms, and 5 ms
  when it has 60,000 of them, on a local disk.

  Args:
    rows: whose checksums are compared: 'none', 'sample' (three of each shard)
      or 'all'.
    share: (i, n) checks every n-th shard from the i-th on, so that n hosts
      divide the work.

  Raises:
    UserError: names the shards that are missing, truncated or damaged.
  """
  directory = local_path(directory)
  dtype = np.dtype(manifest.dtype).newbyteorder('<')
  row_bytes = manifest.row_length * dtype.itemsize

  def problem(shard: Shard) -> str | None:
    path = directory / shard.file
    try:
      reader = _reader(path, shard)
      same = rows == 'none' or shard.sample_digest == _sample_digest(
        reader, shard.rows, row_bytes
      )
      if rows == 'all':
        same = same and shard.digest == _digest(reader, shard.rows)
      if not same:
        raise UserError(f'shard {path} does not match its checksum: {_FIX}')
    except RuntimeError as e:
      return f'shard {path} is damaged ({_short(e)}): {_FIX}'
    except UserError as e:
      return str(e)
    return None

  shards = [s for split in manifest.splits.values() for s in split.shards]
  mine = shards[share[0] :: share[1]]
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    problems = [p for p in pool.map(problem, mine) if p]
  if problems:
    more = len(problems) - 1
    raise UserError(problems[0] + (f' (and {more} more shards)' * (more > 0)))


class RowSource:
  """The rows of one split, by number.

  Shards are opened when first read, and stay open. Safe to read from several
  threads, and picklable: files are opened again on the other side.
  """

  def __init__(
    self, directory: str | pathlib.Path, manifest: Manifest, split: str
  ):
    """Takes the manifest's word for what is on disk; see `verify`.

    Raises:
      UserError: the split has more shards than this process may open files.
    """
    self.directory = local_path(directory)
    self.manifest = manifest
    self.split = split
    self.row_length = manifest.row_length
    self._dtype = np.dtype(manifest.dtype).newbyteorder('<')
    self._shards = manifest.splits[split].shards
    self._row_bytes = self.row_length * self._dtype.itemsize
    self._stops = list(itertools.accumulate(s.rows for s in self._shards))
    self._starts = [0, *self._stops]
    self._readers = [None] * len(self._shards)
    self._opening = threading.Lock()
    _allow_open_files(len(self._shards))

  def __len__(self) -> int:
    return self._stops[-1] if self._stops else 0

  def __getitem__(self, i: int) -> np.ndarray:
    """Row i: [row_length]; otherwise as `read`."""
    return self.read([i])[0]

  def read(self, rows: Sequence[int]) -> np.ndarray:
    """Some rows: [R, row_length] uint16 or uint32, little-endian.

    Raises:
      IndexError: a row is not in [0, len).
      DamagedRow: a row is damaged on disk.
      UserError: its shard is missing, truncated or damaged as a whole.
    """
    found = []
    for i in rows:
      shard = bisect.bisect_right(self._stops, i)
      if i < 0 or shard == len(self._stops):
        raise IndexError(f'row {i} of {self!r} with {len(self)} rows')
      at = i - self._starts[shard]
      try:
        record = self._record(shard, at)
        if len(record) != self._row_bytes:
          raise RuntimeError(f'{len(record)} bytes, not {self._row_bytes}')
      except RuntimeError as e:
        path = self.directory / self._shards[shard].file
        raise DamagedRow(
          f'row {at} of shard {path} is damaged ({_short(e)}): {_FIX}'
        ) from e
      found.append(record)
    # Joined as bytes, which is faster than row by row as arrays.
    tokens = np.frombuffer(b''.join(found), self._dtype)
    return tokens.reshape(len(found), self.row_length)

  def _record(self, shard: int, at: int) -> bytes:
    for wait_s in (*_RETRY_S, None):
      reader = self._readers[shard] or self._open(shard)
      try:
        # The range form: reading by a list of indices starts a thread pool.
        return reader.read(at, at + 1)[0]
      except RuntimeError as e:
        # Checksums do not get better; what a network file system does may.
        if 'mismatch' in str(e) or wait_s is None:
          raise
      self._readers[shard] = None
      time.sleep(wait_s)

  def _open(self, shard: int):
    with self._opening:
      if self._readers[shard] is None:
        entry = self._shards[shard]
        self._readers[shard] = _reader(self.directory / entry.file, entry)
      return self._readers[shard]

  def __repr__(self) -> str:
    return f'RowSource({str(self.directory)!r}, split={self.split!r})'

  def __getstate__(self) -> tuple:
    return self.directory, self.manifest, self.split

  def __setstate__(self, state: tuple) -> None:
    self.__init__(*state)


def _reader(path: pathlib.Path, shard: Shard):
  try:
    # Opened, not asked for its size: the library takes a file that it cannot
    # open for an empty one.
    with open(path, 'rb') as f:
      size = os.fstat(f.fileno()).st_size
  except FileNotFoundError as e:
    raise UserError(f'shard {path} is missing: {_FIX}') from e
  except OSError as e:
    raise UserError(f'cannot open shard {path}: {e.strerror}') from e
  if size != shard.bytes:
    raise UserError(
      f'shard {path} has {size} bytes, its manifest says {shard.bytes}: {_FIX}'
    )
  try:
    reader = array_record_module.ArrayRecordReader(str(path), **_READ)
    rows = reader.num_records()
  except RuntimeError as e:
    raise UserError(f'shard {path} is damaged ({_short(e)}): {_FIX}') from e
  if rows != shard.rows:
    raise UserError(
      f'shard {path} has {rows} rows, its manifest says {shard.rows}: {_FIX}'
    )
  return reader


def _digest(reader, rows: int, step: int = 4096) -> str:
  digest = hashlib.blake2b(digest_size=8)
  for start in range(0, rows, step):
    for record in reader.read(start, min(start + step, rows)):
      digest.update(record)
  return digest.hexdigest()


def _sample_digest(reader, rows: int, row_bytes: int) -> str:
  digest = hashlib.blake2b(digest_size=8)
  for at in (0, rows // 2, rows - 1):
    (record,) = reader.read(at, at + 1)
    if len(record) != row_bytes:
      raise RuntimeError(f'row {at} has {len(record)} bytes, not {row_bytes}')
    digest.update(record)
  return digest.hexdigest()


def _allow_open_files(shards: int) -> None:
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = shards + 1024
  if hard != resource.RLIM_INFINITY and needed > hard:
    raise UserError(
      f'{shards} shards are more files than this process may open ({hard}): '
      'raise the limit (ulimit -Hn, or LimitNOFILE= of the service)'
    )
  if soft != resource.RLIM_INFINITY and soft != hard:
    # On top of the limit so far, which may be meant for other sources.
    wanted = max(soft, 1024) + shards
    if hard != resource.RLIM_INFINITY:
      wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _short(error: Exception) -> str:
  # What follows the first semicolon repeats the path and an offset.
  return str(error).split(';')[0]
