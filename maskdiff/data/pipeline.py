"""Token rows to device batches, in an order that nothing can disturb.

Sample s of a run is a pure function of (rows on disk, seed, length, s). A
host that must supply some rows of each global batch reads exactly those, by
random access, so that host count, mesh, threads and restarts do not show in
the data, and a position is one integer: the number of samples consumed.

    rows = host_rows(sharding, (B, L))
    batches = train_batches(source, global_batch=B, rows=rows, ...)
    for batch in to_device(batches, sharding, (B, L)): ...
"""

import collections
import hashlib
from collections.abc import Iterable, Iterator, Sequence

import grain
import jax
import numpy as np

from maskdiff.data import records
from maskdiff.errors import UserError

# Held-out samples are the same in every run, whatever its seed.
HELDOUT_SEED = 0


class _SubRows:
  """Rows as samples: a row of k * length tokens is k samples in a row."""

  def __init__(self, source: records.RowSource, length: int):
    self._source = source
    self._length = length
    self._per_row = source.row_length // length

  def __len__(self) -> int:
    return len(self._source) * self._per_row

  def __getitem__(self, i: int) -> np.ndarray:
    row, part = divmod(i, self._per_row)
    start = part * self._length
    return self._source[row][start : start + self._length]

  def __repr__(self) -> str:
    return f'{self._source!r} in parts of {self._length}'


class _HostView(grain.MapDataset):
  """The samples that one host supplies, batch after batch.

  With b = len(rows), element i is sample
  start_sample + (i // b) * global_batch + rows[i % b] of the parent.
  """

  def __init__(
    self,
    parent: grain.MapDataset,
    *,
    global_batch: int,
    rows: Sequence[int],
    start_sample: int,
  ):
    super().__init__(parent)
    self._global_batch = global_batch
    self._rows = tuple(rows)
    self._start = start_sample

  def __len__(self) -> int:
    batches = (len(self._parent) - self._start) // self._global_batch
    # An endless parent is sys.maxsize long, at which grain's sums overflow.
    return min(batches * len(self._rows), 1 << 62)

  def __getitem__(self, i):
    if isinstance(i, slice):
      return self.slice(i)
    batch, at = divmod(i, len(self._rows))
    return self._parent[
      self._start + batch * self._global_batch + self._rows[at]
    ]


def train_batches(
  source: records.RowSource,
  *,
  global_batch: int,
  length: int,
  seed: int,
  start_sample: int,
  rows: Sequence[int],
  num_threads: int,
) -> Iterator[np.ndarray]:
  """This host's rows of every global batch, without end.

  Row r of global batch k is sample start_sample + k * global_batch + r. Each
  epoch is a new permutation of all samples, and batches run across its end,
  so none is lost or repeated there.

  Args:
    length: tokens per sample; divides the row length.
    start_sample: samples consumed so far, by whatever batch size.
    rows: global row numbers that this host supplies; see `host_rows`.
    num_threads: that read ahead; 0 reads when a batch is asked for.

  Returns:
    Iterator of [len(rows), length] int32.

  Raises:
    UserError: the length does not divide the row length, or, while iterating,
      a row is damaged on disk.
  """
  if start_sample < 0:
    raise ValueError(f'start_sample must not be negative: {start_sample}')
  samples = _shuffled(source, length, seed).repeat(None)
  return _batches(samples, global_batch, rows, start_sample, num_threads)


def heldout_batches(
  source: records.RowSource,
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
    UserError: the length does not divide the row length, there are fewer
      samples than asked for, or, while iterating, a row is damaged on disk.
  """
  samples = _shuffled(source, length, HELDOUT_SEED)
  if num_batches * batch > len(samples):
    raise UserError(
      f'{source!r} has {len(samples)} samples of {length} tokens, fewer than '
      f'{num_batches} batches of {batch}: set --config.eval.batches to at '
      f'most {len(samples) // batch}, or prepare more held-out text'
    )
  samples = samples[: num_batches * batch]
  return _batches(samples, batch, rows, 0, num_threads)


def fingerprint(
  manifest: records.Manifest, split: str, *, seed: int, length: int
) -> dict[str, str | int]:
  """What decides the order of the data; flat and JSON-able.

  Two runs with equal fingerprints read the same tokens at the same sample
  index. Batch size and host count are not part of it, on purpose.

  Raises:
    UserError: the length does not divide the row length.
  """
  _check_length(manifest.row_length, length)
  shards = manifest.splits[split].shards
  samples = manifest.splits[split].rows * (manifest.row_length // length)
  # The shuffle is grain's. A sample of its result guards against a change
  # there, where a version number would also refuse releases that are alike.
  order = _shuffle(grain.MapDataset.range(samples), seed)
  head = [int(order[i]) for i in range(min(64, samples))]
  return {
    'source': manifest.source,
    'split': split,
    'tokenizer': manifest.tokenizer_fingerprint,
    'rows': _digest([shard.digest for shard in shards]),
    'samples': samples,
    'length': length,
    'seed': seed,
    'order': _digest(head),
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


def _shuffled(source, length: int, seed: int) -> grain.MapDataset:
  _check_length(source.row_length, length)
  return _shuffle(grain.MapDataset.source(_SubRows(source, length)), seed)


def _shuffle(samples: grain.MapDataset, seed: int) -> grain.MapDataset:
  # grain shuffles epoch e with seed + e, so neighbouring seeds would share
  # all epochs but one; and its default seeds depend on the pipeline's shape.
  digest = hashlib.blake2b(str(seed).encode(), digest_size=4).digest()
  return samples.shuffle(seed=int.from_bytes(digest, 'big'))


def _batches(samples, global_batch, rows, start_sample, num_threads):
  if not rows or not 0 <= min(rows) <= max(rows) < global_batch:
    raise ValueError(f'rows {rows} are not rows of a batch of {global_batch}')
  view = _HostView(
    samples, global_batch=global_batch, rows=rows, start_sample=start_sample
  )
  options = grain.ReadOptions(
    num_threads=num_threads, prefetch_buffer_size=2 * num_threads
  )
  return iter(view.batch(len(rows)).to_iter_dataset(options))


def _check_length(row_length: int, length: int) -> None:
  if length < 1 or row_length % length:
    raise UserError(
      f'a sequence length of {length} does not divide the prepared rows of '
      f'{row_length} tokens: set --config.data.length to a divisor of '
      f'{row_length}, or prepare the data again with rows of {length}'
    )


def _digest(values: list) -> str:
  return hashlib.blake2b(repr(values).encode(), digest_size=8).hexdigest()
