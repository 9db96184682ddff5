"""Writes rows that a program makes as a prepared directory.

`launch/prepare.py` writes rows of tokens from text. `write_rows` also writes
the columns `doc` and `answer`, such as those of conversations:

    rows = Rows(tokens=tokens, doc=doc, answer=answer)  # NumPy, [R, L] each
    write_rows('data/chat', {'train': [rows]}, tokenizer, source='my chats')
"""

import contextlib
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from maskdiff.data import records
from maskdiff.data import rows as rows_lib
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.data.rows import Rows
from maskdiff.data.shards import unigram_entropy
from maskdiff.errors import UserError, one_line, require_utf8
from maskdiff.files.paths import local_path

SHARD_ROWS = 1 << 16
_UNFINISHED = '.unfinished'  # folder of the files until all are written


def write_rows(
  directory: str | pathlib.Path,
  splits: Mapping[str, Iterable[Rows]],
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  source: str,
  settings: Mapping[str, str | int | float | bool] | None = None,
  shard_rows: int = SHARD_ROWS,
) -> records.Manifest:
  """Writes blocks of rows as a prepared directory, for config.data.path.

  The rows keep their order. The files depend on the rows, not on the sizes of
  the blocks. The manifest is written last. If a block is refused or the disk is
  full, no file remains.

  Args:
    directory: directory to write; new or empty.
    splits: blocks of rows by split, 'train' and 'heldout'; a missing split is
      empty. A block is a Rows of arrays [R, L] with the same L and the same
      columns as all other blocks. `tokens` are ids of the tokenizer, without
      the mask. `doc` is -1 on padding, else below L. `answer` is bool.
    tokenizer: Tokenizer of the tokens; its files are copied to the directory.
    source: description of the rows, for readers of the manifest.
    settings: settings with which the rows were made; stored in the manifest.
    shard_rows: rows per file.

  Returns:
    The manifest. Its statistics count the tokens that carry a loss.

  Raises:
    UserError: a block is not as described above, no split has a row, no token
      of a split carries a loss, the directory is not empty, or the disk is full
      or not writable.
  """
  if shard_rows < 1:
    raise ValueError(f'shard_rows must be positive: {shard_rows}')
  directory = local_path(directory)
  require_utf8(directory)  # ArrayRecord takes no other path
  unknown = sorted(splits.keys() - set(records.SPLITS))
  if unknown:
    raise UserError(
      f'{directory}: {unknown[0]!r} is not a split; use '
      f'{" and ".join(map(repr, records.SPLITS))}'
    )
  try:
    with _unfinished_directory(directory) as unfinished:
      tokenizer_lib.copy(tokenizer, unfinished)
      blocks = _Blocks(directory, tokenizer)
      written = {
        split: _write(
          unfinished, blocks, split, splits.get(split, ()), shard_rows
        )
        for split in records.SPLITS
      }
      manifest = _manifest(blocks, written, source, settings)
      records.write_manifest(unfinished, manifest)
  except OSError as e:
    raise UserError(
      f'cannot write rows to {directory} ({one_line(e)}): free disk space or '
      'choose another directory'
    ) from e
  return manifest


@contextlib.contextmanager
def _unfinished_directory(directory: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a folder whose files move to the directory if no error occurs."""
  created = not directory.exists()
  directory.mkdir(parents=True, exist_ok=True)
  others = sorted(path.name for path in directory.iterdir())
  if others:
    hint = 'an unfinished write' if others[0] == _UNFINISHED else 'files'
    raise UserError(
      f'{directory} holds {hint} ({others[0]}): delete the directory or choose '
      'another one'
    )
  unfinished = directory / _UNFINISHED
  unfinished.mkdir()
  moved = []
  try:
    yield unfinished
    # The manifest is last: it marks a complete directory.
    is_manifest = lambda path: path.name == records.MANIFEST
    for path in sorted(unfinished.iterdir(), key=is_manifest):
      moved.append(directory / path.name)
      records.replace(path, directory / path.name)
  except BaseException:
    for path in reversed(moved):  # the manifest first
      with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    shutil.rmtree(unfinished, ignore_errors=True)
    if created:
      with contextlib.suppress(OSError):
        directory.rmdir()
    raise
  unfinished.rmdir()


def _write(folder, blocks, split, of_split, shard_rows) -> records.Split:
  """Writes the shards of a split to a folder."""
  pending = _packed(blocks, split, of_split)
  shards, rest = [], []
  while True:
    path = folder / f'{split}-{len(shards):05d}.array_record'
    shard = records.write_shard(path, _take(pending, shard_rows, rest))
    if shard is None:
      return blocks.finish(split, tuple(shards))
    shards.append(shard)


def _manifest(blocks, splits, source, settings) -> records.Manifest:
  if not any(split.rows for split in splits.values()):
    raise UserError(f'{blocks.directory}: there is no row to write')
  tokenizer = blocks.tokenizer
  columns = rows_lib.disk_dtypes(blocks.columns, blocks.row_length)
  return records.Manifest(
    format_version=(
      records.COLUMNS_VERSION if columns else records.FORMAT_VERSION
    ),
    source=source,
    settings=dict(settings or {}),
    tokenizer_fingerprint=tokenizer.fingerprint,
    vocab_size=blocks.vocab_size,
    eos_id=tokenizer.eos_id,
    row_length=blocks.row_length,
    dtype=records.token_dtype(blocks.vocab_size),
    skipped={},
    splits=splits,
    columns=columns,
  )


def _packed(blocks, split, of_split) -> Iterator[np.ndarray]:
  """Yields the bytes of the rows of each block, [R, row bytes] uint8."""
  dtype = records.token_dtype(blocks.vocab_size)
  for block in of_split:
    rows = blocks.add(split, block)
    if len(rows.tokens):
      columns = rows_lib.disk_dtypes(rows.columns, rows.tokens.shape[1])
      yield rows_lib.pack(rows, dtype, columns)


def _take(blocks, rows: int, rest: list) -> Iterator[np.ndarray]:
  """Yields blocks with `rows` rows in total; `rest` gets the next rows."""
  while rows:
    block = rest.pop() if rest else next(blocks, None)
    if block is None:
      return
    if len(block) > rows:
      rest.append(block[rows:])
      block = block[:rows]
    rows -= len(block)
    yield block


class _Blocks:
  """Checks blocks of rows and counts their tokens.

  Attributes:
    directory: directory of the rows, for messages.
    tokenizer: Tokenizer of the rows.
    vocab_size: number of token ids, including special ids that the tokenizer
      file lacks.
    row_length: tokens per row; None before the first block.
    columns: names of the columns that every block has, without the tokens.
  """

  def __init__(self, directory, tokenizer):
    special = tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id
    ids = [i for i in special if i is not None]
    self.vocab_size = max(tokenizer.vocab_size, 1 + max(ids))
    self.row_length, self.columns = None, ()
    self.directory, self.tokenizer = directory, tokenizer
    self._piece_bytes = np.zeros(self.vocab_size, np.int64)
    self._piece_bytes[: tokenizer.vocab_size] = list(map(len, tokenizer.pieces))
    zeros = lambda: np.zeros(self.vocab_size, np.int64)
    self._counts = {split: zeros() for split in records.SPLITS}
    self._rows = dict.fromkeys(records.SPLITS, 0)
    self._documents = dict.fromkeys(records.SPLITS, 0)

  def add(self, split: str, block: Rows) -> Rows:
    """Returns a checked block as NumPy arrays, and counts its tokens."""
    where = f'{self.directory}, {split} rows from {self._rows[split]}'
    rows = self._checked(where, block)
    self._rows[split] += len(rows.tokens)
    if rows.doc is None:
      valid = np.ones(rows.tokens.shape, bool)
      documents = np.count_nonzero(rows.tokens == self.tokenizer.eos_id)
    else:
      valid = rows.doc != rows_lib.PADDING
      numbers = np.sort(rows.doc, axis=1)
      first = np.diff(numbers, axis=1, prepend=rows_lib.PADDING) != 0
      documents = np.count_nonzero(first)
    if rows.answer is not None:
      valid = valid & rows.answer
    self._documents[split] += int(documents)
    self._counts[split] += np.bincount(
      rows.tokens[valid], minlength=self.vocab_size
    )
    return rows

  def finish(self, split: str, shards) -> records.Split:
    """Returns the entry of a split for the manifest."""
    counts = self._counts[split]
    text_bytes = int(counts @ self._piece_bytes)
    if shards and not text_bytes:
      raise UserError(
        f'{self.directory}: the split {split!r} has no text to learn: every '
        'token is a prompt, padding or a special token'
      )
    return records.Split(
      shards=shards,
      rows=self._rows[split],
      tokens=int(counts.sum()),
      text_bytes=text_bytes,
      documents=self._documents[split],
      unigram_entropy_nats=unigram_entropy(counts),
    )

  def _checked(self, where: str, block: Rows) -> Rows:
    if not isinstance(block, Rows):
      raise UserError(f'{where}: a block is {type(block).__name__}, not Rows')
    rows = _arrays(where, block)
    shape = rows.tokens.shape
    if len(shape) != 2 or not shape[1]:
      raise UserError(f'{where}: tokens have the shape {shape}, not [R, L]')
    if self.row_length is None:
      self.row_length, self.columns = shape[1], rows.columns
    if shape[1] != self.row_length:
      raise UserError(
        f'{where}: rows have {shape[1]} tokens, but earlier rows have '
        f'{self.row_length}; write rows of one length'
      )
    if rows.columns != self.columns:
      names = [', '.join(('tokens', *c)) for c in (rows.columns, self.columns)]
      raise UserError(
        f'{where}: the columns are {names[0]}, but earlier rows have {names[1]}'
        '; write the same columns in every block'
      )
    _check_columns(where, rows)
    _check_range(where, 'tokens', rows.tokens, 0, self.vocab_size)
    mask_id = self.tokenizer.mask_id
    if mask_id is not None and (rows.tokens == mask_id).any():
      raise UserError(
        f'{where}: tokens contain the mask token {mask_id}, which cannot be '
        'learned; pad rows with another token'
      )
    rows = rows._replace(tokens=rows.tokens.astype(np.int32))
    if rows.doc is not None:
      _check_range(where, 'doc', rows.doc, rows_lib.PADDING, self.row_length)
      rows = rows._replace(doc=rows.doc.astype(np.int32))
    return rows


def _arrays(where: str, block: Rows) -> Rows:
  arrays = {}
  for name in ('tokens', *block.columns):
    try:
      arrays[name] = np.asarray(getattr(block, name))
    except ValueError as e:
      raise UserError(f'{where}: {name} is not an array ({one_line(e)})') from e
  return Rows(**arrays)


def _check_columns(where: str, rows: Rows) -> None:
  """Checks the shape and the kind of dtype of every column."""
  kinds = {'tokens': 'integers', 'doc': 'integers', 'answer': 'bool'}
  for name in ('tokens', *rows.columns):
    column = getattr(rows, name)
    if column.shape != rows.tokens.shape:
      raise UserError(
        f'{where}: {name} has the shape {column.shape}, tokens have '
        f'{rows.tokens.shape}'
      )
    kind = np.integer if kinds[name] == 'integers' else np.bool_
    if not np.issubdtype(column.dtype, kind):
      raise UserError(
        f'{where}: {name} has the dtype {column.dtype}, not {kinds[name]}'
      )


def _check_range(where, name, column, low: int, stop: int) -> None:
  bad = (column < low) | (column >= stop)
  if bad.any():
    row, position = np.argwhere(bad)[0]
    raise UserError(
      f'{where}: {name} is {column[row, position]} at position {position} of '
      f'row {row} of the block; it must be at least {low} and below {stop}'
    )
