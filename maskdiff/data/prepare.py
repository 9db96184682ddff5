"""Documents to token rows on disk, once.

`prepare` is the work; `embedded` is `prepare` of the Python library with a
cache in front. The result depends on the documents' names and texts, the
tokenizer and the row length, and on nothing else: not on the order in which
the documents arrive, nor on the number of threads.
"""

import hashlib
import itertools
import os
import pathlib
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from maskdiff.data import records, sources
from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError

# Of the embedded corpus: one document in 20 is never trained on, and a shard
# has about 8 MB at 256 tokens a row.
EMBEDDED_HELDOUT_FRACTION = 0.05
EMBEDDED_SHARD_TOKENS = 1 << 22

_DOCUMENTS_PER_BATCH = 128


def prepare(
  documents: Iterable[sources.Document],
  tokenizer: Tokenizer,
  directory: str | pathlib.Path,
  *,
  row_length: int,
  heldout_fraction: float,
  rows_per_shard: int,
  source: str,
) -> records.Manifest:
  """Writes documents as rows of row_length tokens and returns the manifest.

  The documents of a split stand in an order given by a hash of their names,
  each followed by eos, and are cut into rows; less than a row is dropped at
  the end. The directory appears in one step when all is written; a process
  that is killed before leaves only a hidden sibling, which may be deleted. A
  directory that is there already is kept, also when another process made it
  in the meantime.

  Args:
    documents: (name, text) pairs with unique names; held in memory.
    heldout_fraction: share of the documents, chosen by a hash of their names,
      that goes to the split 'heldout'.
    rows_per_shard: rows in each file but the last of a split.
    source: what the text is, in words; kept in the manifest.

  Raises:
    UserError: a split has less than one row, two documents share a name, the
      disk is full or not writable, or the directory holds something else.
  """
  directory = pathlib.Path(directory)
  made_of = (source, tokenizer.fingerprint, row_length)
  splits = {'train': [], 'heldout': []}
  for name, text in _ordered(documents):
    held_out = _fraction('split', name) < heldout_fraction
    splits['heldout' if held_out else 'train'].append((name, text))

  temporary = directory.with_name(f'.{directory.name}.{uuid.uuid4().hex}')
  try:
    if directory.is_dir() and any(directory.iterdir()):
      return _existing(directory, made_of)
    temporary.mkdir(parents=True)
    manifest = records.Manifest(
      format_version=records.FORMAT_VERSION,
      source=source,
      tokenizer_fingerprint=tokenizer.fingerprint,
      vocab_size=tokenizer.vocab_size,
      row_length=row_length,
      dtype=records.token_dtype(tokenizer.vocab_size),
      splits={
        name: _write_split(
          temporary, name, docs, tokenizer, row_length, rows_per_shard
        )
        for name, docs in splits.items()
      },
    )
    records.write_manifest(temporary, manifest)
    _publish(temporary, directory)
  except OSError as e:
    raise UserError(
      f'cannot write prepared data to {directory} ({e.strerror or e}): free '
      'some space or choose another place with --config.data.cache_dir=PATH'
    ) from e
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  return _existing(directory, made_of)


def embedded(
  tokenizer: Tokenizer,
  cache_dir: str | pathlib.Path,
  row_length: int,
  log: Callable[[str], None] = print,
) -> pathlib.Path:
  """A directory with the rows of the embedded corpus; prepared on first use.

  Its name holds the Python version, the tokenizer's fingerprint and the row
  length, so different ones live side by side in cache_dir.

  Raises:
    UserError: as `prepare`, or a directory of that name exists and is damaged.
  """
  version = f'{sys.version_info.major}.{sys.version_info.minor}'
  name = f'embedded-py{version}-{tokenizer.fingerprint}-{row_length}'
  directory = pathlib.Path(cache_dir).expanduser() / name
  if os.path.exists(directory):
    records.read_manifest(directory)
    return directory

  documents = list(sources.embedded())
  megabytes = sum(len(text.encode()) for _, text in documents) / 1e6
  log(
    f'data: preparing the Python {version} library, {len(documents)} files, '
    f'{megabytes:.1f} MB, in {directory} (once)'
  )
  start = time.perf_counter()
  manifest = prepare(
    documents,
    tokenizer,
    directory,
    row_length=row_length,
    heldout_fraction=EMBEDDED_HELDOUT_FRACTION,
    rows_per_shard=max(1, EMBEDDED_SHARD_TOKENS // row_length),
    source=f'Python {version} standard library',
  )
  splits = manifest.splits.values()
  tokens = sum(split.tokens for split in splits)
  text_bytes = sum(split.text_bytes for split in splits)
  log(
    f'data: prepared {tokens:,} tokens, {text_bytes / tokens:.2f} bytes per '
    f'token, in {time.perf_counter() - start:.1f} s'
  )
  return directory


def _fraction(purpose: str, name: str) -> float:
  # Python's own hash changes from one process to the next.
  key = f'{purpose}\0{name}'.encode()
  digest = hashlib.blake2b(key, digest_size=8).digest()
  return int.from_bytes(digest, 'big') / 2**64


def _ordered(documents: Iterable[sources.Document]) -> list[sources.Document]:
  documents = sorted(documents, key=lambda d: (_fraction('order', d[0]), d[0]))
  for (name, _), (following, _) in itertools.pairwise(documents):
    if name == following:
      raise UserError(f'two documents are named {name!r}: rename one')
  return documents


def _write_split(
  directory, name, documents, tokenizer, row_length, rows_per_shard
) -> records.Split:
  dtype = records.token_dtype(tokenizer.vocab_size)
  counts = np.zeros(tokenizer.vocab_size, np.int64)
  shards = []
  tokens = _encoded(documents, tokenizer, dtype)
  for rows in _cut(tokens, row_length, rows_per_shard, dtype):
    file = f'{name}-{len(shards):05d}.array_record'
    shards.append(records.write_shard(directory / file, rows))
    counts += np.bincount(rows.ravel(), minlength=tokenizer.vocab_size)
  if not shards:
    raise UserError(
      f'the split {name!r} has {len(documents)} documents and not one row of '
      f'{row_length} tokens: give more documents, or choose a shorter row '
      'length or another held-out fraction'
    )
  piece_bytes = np.array([len(piece) for piece in tokenizer.pieces])
  probability = counts[counts > 0] / counts.sum()
  return records.Split(
    shards=tuple(shards),
    rows=sum(shard.rows for shard in shards),
    tokens=int(counts.sum()),
    text_bytes=int(counts @ piece_bytes),
    documents=len(documents),
    unigram_entropy_nats=float(-(probability @ np.log(probability))),
  )


def _encoded(documents, tokenizer, dtype) -> Iterator[np.ndarray]:
  threads = os.cpu_count() or 1
  for start in range(0, len(documents), _DOCUMENTS_PER_BATCH):
    texts = [t for _, t in documents[start : start + _DOCUMENTS_PER_BATCH]]
    for ids in tokenizer.encode_batch(texts, threads):
      yield np.array([*ids, tokenizer.eos_id], dtype)


def _cut(chunks, row_length, rows_per_shard, dtype) -> Iterator[np.ndarray]:
  """[R, row_length] blocks, R = rows_per_shard but for the last."""
  block = row_length * rows_per_shard
  rest = np.zeros(0, dtype)
  pending, size = [], 0
  for chunk in chunks:
    pending.append(chunk)
    size += len(chunk)
    if size < block:
      continue
    rest = np.concatenate(pending)
    while len(rest) >= block:
      yield rest[:block].reshape(-1, row_length)
      rest = rest[block:]
    pending, size = [rest], len(rest)
  rest = np.concatenate([np.zeros(0, dtype), *pending])
  rows = len(rest) // row_length
  if rows:
    yield rest[: rows * row_length].reshape(rows, row_length)


def _existing(directory: pathlib.Path, made_of: tuple) -> records.Manifest:
  found = records.read_manifest(directory)
  if made_of != (found.source, found.tokenizer_fingerprint, found.row_length):
    raise UserError(
      f'{directory} holds rows of another source, tokenizer or row length: '
      'delete it or choose another directory'
    )
  return found


def _publish(temporary: pathlib.Path, directory: pathlib.Path) -> None:
  try:
    temporary.rename(directory)
  except OSError:
    # A rename fails where a directory with files in it exists already: that
    # of a process that was faster, which holds the same rows.
    if not directory.is_dir():
      raise
