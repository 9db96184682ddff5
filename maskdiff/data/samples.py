"""Reads samples of a fixed number of tokens from rows of another length."""

import sys
import threading

import numpy as np

from maskdiff.data import row_reader
from maskdiff.data import rows as rows_lib
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError


def num_samples(rows: int, row_length: int, length: int) -> int:
  """Returns the number of samples of `length` tokens in `rows` rows.

  A long row is cut into row_length / length samples; short rows are joined,
  length / row_length to a sample. Rows that do not fill a last sample are not
  used.

  Raises:
    UserError: neither length is a multiple of the other.
  """
  if length < 1 or (row_length % length and length % row_length):
    raise UserError(
      f'a sequence length of {length} does not fit rows of {row_length} '
      f'tokens: set --config.data.length={row_length}, or another divisor or '
      f'multiple of it, or prepare the data again with --row_length={length}'
    )
  return rows * row_length // length


def fewer_batches(samples: int, batch: int) -> str:
  """Returns the advice on how to evaluate on a small number of samples.

  Args:
    samples: number of held-out samples, not 0, too few for the config.
    batch: samples per batch.
  """
  more = 'prepare more held-out text'
  if samples >= batch:
    return f'set --config.eval.batches={samples // batch}, or {more}'
  if samples < 2:  # antithetic times are drawn for pairs
    return more
  # A power of two is even and can be divided among devices.
  batch = 1 << (samples.bit_length() - 1)
  return f'set --config.eval.batch={batch} --config.eval.batches=1, or {more}'


class Samples:
  """Random access to the samples of one split, by number.

  Up to max_damaged damaged rows are reported and replaced by the next row.
  """

  def __init__(
    self, rows, length: int, max_damaged: int, columns=(), eos_id: int = -1
  ):
    """Opens no file.

    Args:
      rows: row_reader.RowSource.
      length: tokens per sample.
      max_damaged: number of damaged rows to replace.
      columns: names of the columns of the samples. Columns that the rows lack
        are filled in.
      eos_id: last token of every document, from which `doc` is filled in.
    """
    self._rows, self._length, self._max_damaged = rows, length, max_damaged
    self.columns, self._eos_id = columns, eos_id
    self._len = num_samples(len(rows), rows.row_length, length)
    self._damaged, self._lock = set(), threading.Lock()

  def __len__(self) -> int:
    return self._len

  def read(self, samples: np.ndarray) -> Rows:
    """Returns Rows of [M, length], samples [M]; tokens in the dtype on disk.

    Raises:
      DamagedRow: more than max_damaged rows, or all rows, are damaged.
    """
    row_length = self._rows.row_length
    if self._length >= row_length:
      per_sample = self._length // row_length
      rows = samples[:, None] * per_sample + np.arange(per_sample)
      found = rows_lib.join(self._read(rows.ravel()), per_sample)
    else:
      per_row = row_length // self._length
      rows, part = np.divmod(samples, per_row)
      shape = len(samples), per_row, self._length
      index = np.arange(len(samples))
      cut = lambda x: x.reshape(shape)[index, part]
      found = rows_lib.map_columns(cut, self._read(rows))
    return rows_lib.fill(found, self.columns, self._eos_id)

  def _read(self, rows: np.ndarray) -> Rows:
    rows = rows.tolist()
    try:
      return self._rows.read(rows)
    except row_reader.DamagedRow:
      if not self._max_damaged:
        raise
      found = [self._row(row) for row in rows]
      columns = zip(*found, strict=True)
      return Rows(
        *(None if c[0] is None else np.concatenate(c) for c in columns)
      )

  def _row(self, row: int) -> Rows:
    first = row
    while True:
      try:
        return self._rows.read([row])
      except row_reader.DamagedRow as e:
        self._count(row, e)
        # The replacement does not depend on the host or on restarts.
        row = (row + 1) % len(self._rows)
        if row == first:
          raise

  def _count(self, row: int, error: row_reader.DamagedRow) -> None:
    with self._lock:
      known = row in self._damaged
      if not known and len(self._damaged) == self._max_damaged:
        raise error
      self._damaged.add(row)
    if not known:
      print(
        f'damaged row {len(self._damaged)} of at most {self._max_damaged}, '
        f'replaced by the next row: {error}',
        file=sys.stderr,
        flush=True,
      )
