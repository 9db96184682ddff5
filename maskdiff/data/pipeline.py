"""Batches of rows on devices, in a deterministic order.

Sample s of a run is a pure function of (rows on disk, weights, seed, length,
s). Each host reads only its own rows of each global batch, by random access.
So the data do not depend on the number of hosts, the mesh, threads or restarts.
The state of the pipeline is one integer, the number of samples consumed.

    rows = host_rows(sharding, (B, L))
    batches = train_batches(datasets, global_batch=B, rows=rows, ...)
    for batch in to_device(batches, sharding, (B, L)): ...

A batch is a `Rows`. If one dataset of a mixture stores a column, all batches of
the mixture have this column. It is filled in for rows of the other datasets.
"""

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np

from maskdiff.data import order as order_lib
from maskdiff.data import records, row_reader
from maskdiff.data import rows as rows_lib
from maskdiff.data.rows import Rows
from maskdiff.data.samples import Samples, fewer_batches, num_samples
from maskdiff.errors import UserError

# Held-out samples are the same in every run, whatever its seed.
HELDOUT_SEED = 0

# The order of about this many samples is computed at once.
_WINDOW = 1024


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared directory as a part of a mixture; see `parse_mixture`.

  Attributes:
    name: directory as the user wrote it, for messages and metrics.
    directory: directory of the rows.
    weight: weight relative to the other parts of the mixture.
    manifest: manifest of the directory.
  """

  name: str
  directory: str
  weight: float
  manifest: records.Manifest


def parse_mixture(path: str) -> list[tuple[str, float]]:
  """Parses 'DIR' or 'DIR=WEIGHT,DIR=WEIGHT,...' to directories and weights.

  Raises:
    UserError: a directory is named twice, or a weight is missing or not
      positive.
  """
  parts = [part.strip() for part in path.split(',')]
  whole = '://' not in path and os.path.isdir(os.path.expanduser(path))
  if whole or (len(parts) == 1 and '=' not in path):
    return [(path, 1.0)]
  mixture = {}
  for part in parts:
    directory, _, weight = (p.strip() for p in part.rpartition('='))
    try:
      number = float(weight)
    except ValueError:
      number = 0.0
    if not directory or not 0 < number < float('inf'):
      raise UserError(
        f'data path {path!r}: {part!r} must be DIRECTORY=WEIGHT with a '
        'positive weight, as in --config.data.path=data/web=0.7,data/code=0.3'
      )
    if _real_path(directory) in map(_real_path, mixture):
      raise UserError(f'data path {path!r} names {directory} twice')
    mixture[directory] = number
  return list(mixture.items())


def _real_path(directory: str) -> str:
  return os.path.realpath(os.path.expanduser(directory))


def train_batches(
  datasets: Sequence[Dataset],
  *,
  global_batch: int,
  length: int,
  seed: int,
  start_sample: int,
  rows: Sequence[int],
  num_threads: int,
  max_damaged_rows: int = 0,
  skip: Sequence[tuple[int, int]] = (),
) -> Iterator[Rows]:
  """Returns an endless iterator over this host's rows of the global batches.

  Row r of global batch k is sample start_sample + k * global_batch + r, plus
  the number of skipped samples before it; see `sample_number`. Each epoch of a
  dataset is a new permutation of all its samples. Batches span the end of an
  epoch, so no sample is lost or repeated.

  Args:
    datasets: parts of the mixture.
    global_batch: rows of a global batch.
    length: tokens per sample; a divisor or a multiple of the row length.
    seed: seed of the order.
    start_sample: samples consumed so far, with any batch size.
    rows: global row numbers that this host supplies; see `host_rows`.
    num_threads: threads that read ahead; 0 reads each batch on demand.
    max_damaged_rows: number of damaged rows per dataset that are reported and
      replaced by the next row. One more ends the run. Each process counts the
      rows that it reads.
    skip: (first, end) ranges of sample numbers to skip.

  Returns:
    Iterator of Rows of NumPy arrays [len(rows), length], with every column that
    one of the datasets stores.

  Raises:
    UserError: the length does not fit a row length, a weight is too small,
      or, while iterating, a row is damaged on disk.
  """
  if start_sample < 0:
    raise ValueError(f'start_sample must not be negative: {start_sample}')
  stored = {name for d in datasets for name in d.manifest.columns}
  columns = tuple(name for name in rows_lib.COLUMNS if name in stored)
  samples = [
    _open(d, 'train', length, max_damaged_rows, columns) for d in datasets
  ]
  order = _order(datasets, [len(s) for s in samples], seed)
  number = functools.partial(sample_number, start_sample, skip=skip)
  source = _Batches(samples, order, length, global_batch, rows, number)
  return _iterate(source, num_threads)


def sample_number(start, count, skip=()):
  """Returns the number of a sample in a run that skips some samples.

  Args:
    start: number from which samples are counted.
    count: int or array, number of samples between `start` and this one, without
      skipped samples.
    skip: ascending (first, end) ranges of sample numbers to skip. Numbers below
      `start` have no effect.

  Returns:
    int64 in the shape of count.
  """
  number = start + np.asarray(count, np.int64)
  for first, end in skip:
    first = max(first, start)
    if end > first:
      number = np.where(number >= first, number + end - first, number)
  return number


def heldout_batches(
  dataset: Dataset,
  *,
  batch: int,
  length: int,
  num_batches: int,
  rows: Sequence[int],
  num_threads: int,
) -> Iterator[Rows]:
  """Returns this host's rows of held-out batches, the same in every run.

  The samples are the first num_batches * batch of one fixed permutation. The
  order does not depend on the batch size or the number of batches.

  Args:
    dataset: Dataset; its split 'heldout' is read.
    batch: rows of a global batch.
    length: tokens per sample; a divisor or a multiple of the row length.
    num_batches: number of batches.
    rows: global row numbers that this host supplies; see `host_rows`.
    num_threads: threads that read ahead; 0 reads each batch on demand.

  Returns:
    Iterator of num_batches Rows of NumPy arrays [len(rows), length], with the
    columns of the dataset.

  Raises:
    UserError: the length does not fit the row length, the split has fewer than
      num_batches * batch samples, or, while iterating, a row is damaged on
      disk.
  """
  samples = _open(
    dataset, 'heldout', length, 0, tuple(dataset.manifest.columns)
  )
  if not len(samples):
    raise UserError(
      f'{dataset.directory} has no held-out text for a sample of {length} '
      'tokens: prepare it with a larger --heldout_fraction (or with '
      '--train_tokenizer, which chooses one), or set --config.eval.path to '
      'other data'
    )
  if num_batches * batch > len(samples):
    raise UserError(
      f'the held-out part of {dataset.directory} has {len(samples)} samples of '
      f'{length} tokens, fewer than {num_batches} batches of {batch}: '
      f'{fewer_batches(len(samples), batch)}'
    )
  order = _order([dataset], [len(samples)], HELDOUT_SEED)
  number = functools.partial(sample_number, 0)
  source = _Batches([samples], order, length, batch, rows, number, num_batches)
  return _iterate(source, num_threads)


def fingerprint(
  datasets: Sequence[Dataset], *, seed: int, length: int
) -> dict[str, str | int | list]:
  """Returns a dict of JSON values that determine the order of the data.

  Two runs with equal fingerprints read the same rows for the same sample
  number. Batch size, number of hosts, and the names and directories of datasets
  are not part of the fingerprint, so a resumed run may change them.

  Raises:
    UserError: the length does not fit a row length.
  """
  manifests = [d.manifest for d in datasets]
  sizes = [
    num_samples(m.splits['train'].rows, m.row_length, length) for m in manifests
  ]
  order = _order(datasets, sizes, seed)
  source, index = order_lib.locate(order, np.arange(64))
  columns = [list(m.columns) for m in manifests]
  return {
    'tokenizer': sorted({m.tokenizer_fingerprint for m in manifests}),
    'shards': [len(m.splits['train'].shards) for m in manifests],
    'rows': [
      _digest([shard.digest for shard in m.splits['train'].shards])
      for m in manifests
    ],
    'shares': list(order.shares),
    'samples': sizes,
    'length': length,
    'seed': seed,
    # The first 64 samples, to notice a change of the code.
    'order': _digest([source.tolist(), index.tolist()]),
    # Absent for rows of tokens only, as in fingerprints of earlier code.
    **({'columns': columns} if any(columns) else {}),
  }


def host_rows(
  sharding: jax.sharding.Sharding, global_shape: tuple[int, ...]
) -> tuple[int, ...]:
  """Returns the rows of a global batch on this process's devices, sorted."""
  rows = set()
  for index in sharding.addressable_devices_indices_map(global_shape).values():
    rows.update(range(*index[0].indices(global_shape[0])))
  return tuple(sorted(rows))


def to_device(
  batches: Iterable[Rows],
  sharding: jax.sharding.Sharding,
  global_shape: tuple[int, int],
) -> Iterator[Rows]:
  """Moves batches to devices as global arrays, prefetching one batch.

  Args:
    batches: Rows of NumPy arrays [len(host_rows(sharding, global_shape)), L],
      this host's rows of each batch.
    sharding: splits the batch, the length or both.
    global_shape: (B, L).

  Returns:
    Iterator of Rows of jax.Array [B, L]. The transfer of the next batch starts
    before a batch is returned, so it overlaps with the step. Its `close` closes
    `batches`.
  """
  rows = host_rows(sharding, global_shape)
  index_of_row = {row: i for i, row in enumerate(rows)}

  def put(column: np.ndarray) -> jax.Array:
    def part(index: tuple[slice, slice]) -> np.ndarray:
      # The rows of a device are adjacent in the global batch and in `column`.
      start, stop, _ = index[0].indices(global_shape[0])
      first = index_of_row[start]
      return column[first : first + stop - start, index[1]]

    return jax.make_array_from_callback(global_shape, sharding, part)

  ahead = collections.deque()
  try:
    for batch in batches:
      ahead.append(jax.tree.map(put, batch))
      if len(ahead) == 2:
        yield ahead.popleft()
    yield from ahead
  finally:
    # Ends the threads of grain, which read ahead.
    getattr(batches, 'close', lambda: None)()


class _Batches:
  """A source for grain.MapDataset: item k is this host's rows of batch k."""

  def __init__(
    self,
    samples: Sequence[Samples],  # all with the same columns
    order: order_lib.Order,
    length: int,
    global_batch: int,
    rows: Sequence[int],
    number: Callable,
    num_batches: int | None = None,
  ):
    if not rows or not 0 <= min(rows) <= max(rows) < global_batch:
      raise ValueError(f'rows {rows} are not rows of a batch of {global_batch}')
    self._samples, self._order, self._length = samples, order, length
    self._columns = samples[0].columns
    self._rows = np.asarray(rows, np.int64)
    self._global_batch, self._number = global_batch, number
    self._per_window = max(1, _WINDOW // len(rows))
    self._locate = functools.lru_cache(maxsize=4)(self._window)
    self._len = 1 << 40 if num_batches is None else num_batches

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, k: int) -> Rows:
    window, at = divmod(k, self._per_window)
    source, index = (x[at] for x in self._locate(window))
    if len(self._samples) == 1:
      rows = self._samples[0].read(index)
      return rows._replace(tokens=rows.tokens.astype(np.int32))
    batch = rows_lib.empty((len(source), self._length), self._columns)
    for number, samples in enumerate(self._samples):
      from_source = source == number
      part = samples.read(index[from_source])
      for column, values in zip(batch, part, strict=True):
        if column is not None:
          column[from_source] = values
    return batch

  def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
    first = window * self._per_window
    batches = np.arange(first, first + self._per_window)
    numbers = self._number(batches[:, None] * self._global_batch + self._rows)
    source, index = order_lib.locate(self._order, numbers.ravel())
    return source.reshape(numbers.shape), index.reshape(numbers.shape)

  def __repr__(self) -> str:
    return f'batches of {self._global_batch} x {self._length}'


def _iterate(batches: _Batches, num_threads: int) -> Iterator[Rows]:
  # The import takes 0.1 s, and scripts that need no batches should not pay it.
  import grain

  # An element is a whole batch, because grain takes 0.1 ms per element.
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def _open(
  dataset: Dataset,
  split: str,
  length: int,
  max_damaged: int,
  columns: tuple[str, ...],
) -> Samples:
  rows = row_reader.RowSource(dataset.directory, dataset.manifest, split)
  return Samples(rows, length, max_damaged, columns, dataset.manifest.eos_id)


def _order(datasets, sizes: Sequence[int], seed: int) -> order_lib.Order:
  for dataset, size in zip(datasets, sizes, strict=True):
    if not size:
      raise UserError(
        f'{dataset.directory} has no training rows for one sample: prepare it '
        'with more text or a smaller --heldout_fraction, or set a shorter '
        '--config.data.length'
      )
  weights = tuple(d.weight for d in datasets)
  try:
    return order_lib.make_order(tuple(sizes), weights, seed)
  except ValueError as e:
    raise UserError(f'config.data.path: {e}') from e


def _digest(values: list) -> str:
  return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()
