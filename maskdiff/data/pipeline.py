"""Token rows to device batches, in an order that nothing can disturb.

Sample s of a run is a pure function of (rows on disk, weights, seed, length,
s). A host that must supply some rows of each global batch reads exactly
those, by random access, so that host count, mesh, threads and restarts do not
show in the data, and a position is one integer: the number of samples consumed.

    rows = host_rows(sharding, (B, L))
    batches = train_batches(datasets, global_batch=B, rows=rows, ...)
    for batch in to_device(batches, sharding, (B, L)): ...
"""

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from maskdiff.data import order as order_lib
from maskdiff.data import records, row_reader
from maskdiff.data.samples import Samples, num_samples
from maskdiff.errors import UserError

# Held-out samples are the same in every run, whatever its seed.
HELDOUT_SEED = 0

# The order of about this many samples is worked out at once.
_WINDOW = 1024


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A prepared directory as a part of a mixture; see `parse_mixture`.

  Attributes:
    name: as the user wrote it, for messages and metrics.
    directory: of the rows.
    weight: relative to the other parts of the mixture.
    manifest: of the directory.
  """

  name: str
  directory: str
  weight: float
  manifest: records.Manifest


def parse_mixture(path: str) -> list[tuple[str, float]]:
  """Directories and weights of 'DIR' or 'DIR=WEIGHT,DIR=WEIGHT,...'.

  Raises:
    UserError: a directory comes twice, or a weight is missing or not positive.
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
    if os.path.normpath(directory) in map(os.path.normpath, mixture):
      raise UserError(f'data path {path!r} names {directory} twice')
    mixture[directory] = number
  return list(mixture.items())


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
) -> Iterator[np.ndarray]:
  """This host's rows of every global batch, without end.

  Row r of global batch k is sample start_sample + k * global_batch + r, or a
  later one if samples are passed over; see `sample_number`. Each epoch of a
  dataset is a new permutation of all its samples, and batches run across its
  end, so none is lost or repeated there.

  Args:
    length: tokens per sample; a divisor or a multiple of the row length.
    start_sample: samples consumed so far, by whatever batch size.
    rows: global row numbers that this host supplies; see `host_rows`.
    num_threads: that read ahead; 0 reads when a batch is asked for.
    max_damaged_rows: of a dataset that are replaced by its next row, and
      reported, before one more ends the run; counted by each host, from the
      start of its process.
    skip: (first, end) ranges of samples that are passed over.

  Returns:
    Iterator of [len(rows), length] int32.

  Raises:
    UserError: the length does not fit a row length, a weight is too small,
      or, while iterating, a row is damaged on disk.
  """
  if start_sample < 0:
    raise ValueError(f'start_sample must not be negative: {start_sample}')
  samples = [_open(d, 'train', length, max_damaged_rows) for d in datasets]
  order = _order(datasets, [len(s) for s in samples], seed)
  number = functools.partial(sample_number, start_sample, skip=skip)
  source = _Batches(samples, order, length, global_batch, rows, number)
  return _iterate(source, num_threads)


def sample_number(start, count, skip=()):
  """The number of a sample of a run, which has passed over some.

  Args:
    start: number of the first sample.
    count: how many came before this one, an int or an array of them.
    skip: ascending (first, end) ranges of samples that are passed over; what
      of them lies before `start` no longer matters.

  Returns:
    int64, like count.
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
) -> Iterator[np.ndarray]:
  """This host's rows of num_batches batches, the same in every run.

  They are the first num_batches * batch samples after one fixed shuffle, so
  fewer batches or another batch size see a prefix of the same samples.

  Returns:
    Iterator of num_batches arrays [len(rows), length] int32.

  Raises:
    UserError: the length does not fit the row length, there are fewer
      samples than asked for, or, while iterating, a row is damaged on disk.
  """
  samples = _open(dataset, 'heldout', length, 0)
  if not len(samples):
    raise UserError(
      f'{dataset.directory} has no held-out text: prepare it with a larger '
      '--heldout_fraction, or set --config.eval.path to other data'
    )
  if num_batches * batch > len(samples):
    raise UserError(
      f'the held-out part of {dataset.directory} has {len(samples)} samples of '
      f'{length} tokens, fewer than {num_batches} batches of {batch}: set '
      f'--config.eval.batches to at most {len(samples) // batch}, or prepare '
      'more held-out text'
    )
  order = _order([dataset], [len(samples)], HELDOUT_SEED)
  number = functools.partial(sample_number, 0)
  source = _Batches([samples], order, length, batch, rows, number, num_batches)
  return _iterate(source, num_threads)


def fingerprint(
  datasets: Sequence[Dataset], *, seed: int, length: int
) -> dict[str, str | int | list]:
  """What decides the order of the data; flat and JSON-able.

  Two runs with equal fingerprints read the same tokens at the same sample
  index. Batch size and host count are not part of it, on purpose, nor are the
  place where a dataset lies and the name of its source.

  Raises:
    UserError: the length does not fit a row length.
  """
  manifests = [d.manifest for d in datasets]
  sizes = [
    num_samples(m.splits['train'].rows, m.row_length, length) for m in manifests
  ]
  order = _order(datasets, sizes, seed)
  source, index = order_lib.locate(order, np.arange(64))
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
    # Of the code: the first samples, as a guard against a change of the order.
    'order': _digest([source.tolist(), index.tolist()]),
  }


def host_rows(
  sharding: jax.sharding.Sharding, global_shape: tuple[int, ...]
) -> tuple[int, ...]:
  """The rows of a global batch that this process's devices need, sorted."""
  needed = set()
  for index in sharding.addressable_devices_indices_map(global_shape).values():
    needed.update(range(*index[0].indices(global_shape[0])))
  return tuple(sorted(needed))


def to_device(
  batches: Iterable[np.ndarray],
  sharding: jax.sharding.Sharding,
  global_shape: tuple[int, int],
) -> Iterator[jax.Array]:
  """Global [B, L] int32 arrays from this host's rows, one batch ahead.

  Args:
    batches: arrays [len(host_rows(sharding, global_shape)), L] int32.
    sharding: over rows, columns or both.

  Returns:
    Iterator of jax.Array. The transfer of the next one has started when one
    is handed out, so it overlaps with the step.
  """
  position = {row: i for i, row in enumerate(host_rows(sharding, global_shape))}

  def put(batch: np.ndarray) -> jax.Array:
    def part(index: tuple[slice, slice]) -> np.ndarray:
      # A device's rows are adjacent in the global batch, so here as well.
      start, stop, _ = index[0].indices(global_shape[0])
      first = position[start]
      return batch[first : first + stop - start, index[1]]

    return jax.make_array_from_callback(global_shape, sharding, part)

  ahead = collections.deque()
  for batch in batches:
    ahead.append(put(batch))
    if len(ahead) == 2:
      yield ahead.popleft()
  yield from ahead


class _Batches:
  """This host's rows of global batch k, by k; a source for grain.MapDataset."""

  def __init__(
    self, samples, order, length, global_batch, rows, number, num_batches=None
  ):
    if not rows or not 0 <= min(rows) <= max(rows) < global_batch:
      raise ValueError(f'rows {rows} are not rows of a batch of {global_batch}')
    self._samples, self._order, self._length = samples, order, length
    self._rows = np.asarray(rows, np.int64)
    self._global_batch, self._number = global_batch, number
    self._per_window = max(1, _WINDOW // len(rows))
    self._locate = functools.lru_cache(maxsize=4)(self._window)
    self._len = 1 << 40 if num_batches is None else num_batches

  def __len__(self) -> int:
    return self._len

  def __getitem__(self, k: int) -> np.ndarray:
    window, at = divmod(k, self._per_window)
    source, index = (x[at] for x in self._locate(window))
    if len(self._samples) == 1:
      return self._samples[0].read(index).astype(np.int32)
    batch = np.empty((len(source), self._length), np.int32)
    for number, samples in enumerate(self._samples):
      mine = source == number
      batch[mine] = samples.read(index[mine])
    return batch

  def _window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
    first = window * self._per_window
    batches = np.arange(first, first + self._per_window)
    numbers = self._number(batches[:, None] * self._global_batch + self._rows)
    source, index = order_lib.locate(self._order, numbers.ravel())
    return source.reshape(numbers.shape), index.reshape(numbers.shape)

  def __repr__(self) -> str:
    return f'batches of {self._global_batch} x {self._length}'


def _iterate(batches: _Batches, num_threads: int) -> Iterator[np.ndarray]:
  import grain  # takes 0.1 s, and evaluation of files needs no batches

  # An element is a whole batch: grain takes 0.1 ms an element.
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  return iter(grain.MapDataset.source(batches).to_iter_dataset(options))


def _open(
  dataset: Dataset, split: str, length: int, max_damaged: int
) -> Samples:
  rows = row_reader.RowSource(dataset.directory, dataset.manifest, split)
  return Samples(rows, length, max_damaged)


def _order(datasets, sizes: Sequence[int], seed: int) -> order_lib.Order:
  for dataset, size in zip(datasets, sizes, strict=True):
    if not size:
      raise UserError(
        f'{dataset.directory} has no training rows for one sample: prepare it '
        'with more text or a smaller held-out fraction'
      )
  weights = tuple(d.weight for d in datasets)
  try:
    return order_lib.make_order(tuple(sizes), weights, seed)
  except ValueError as e:
    raise UserError(f'config.data.path: {e}') from e


def _digest(values: list) -> str:
  return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()
