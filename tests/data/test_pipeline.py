"""The data order is a pure function of the seed and the sample index."""

import itertools
import json

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from maskdiff.data import pipeline, records
from maskdiff.errors import UserError

ROWS, ROW_LENGTH, BATCH = 50, 32, 8


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """Rows that tell where they are from: token = 100 * row + column."""
  directory = tmp_path_factory.mktemp('pipeline')
  splits = {}
  for name in records.SPLITS:
    rows = 100 * np.arange(ROWS)[:, None] + np.arange(ROW_LENGTH)
    shards = tuple(
      records.write_shard(directory / f'{name}-{n}', part.astype(np.uint16))
      for n, part in enumerate(np.split(rows, [20]))
    )
    splits[name] = records.Split(
      shards, ROWS, ROWS * ROW_LENGTH, 1, 1, unigram_entropy_nats=1.0
    )
  manifest = records.Manifest(
    1, 'counting', 'none', 8192, ROW_LENGTH, 'uint16', splits
  )
  records.write_manifest(directory, manifest)
  return directory


@pytest.fixture(scope='module')
def source(directory):
  manifest = records.read_manifest(directory)
  return records.RowSource(directory, manifest, 'train')


def take(n, source, **changes):
  """The first n batches, stacked: [n, b, L]."""
  settings = dict(
    global_batch=BATCH,
    length=ROW_LENGTH,
    seed=3,
    start_sample=0,
    rows=range(BATCH),
    num_threads=0,
  )
  batches = pipeline.train_batches(source, **(settings | changes))
  return np.stack(list(itertools.islice(batches, n)))


def samples(batches):
  """[n, b, L] as a list of samples in global order."""
  return [tuple(row) for batch in batches for row in batch]


@pytest.mark.parametrize('length', [ROW_LENGTH, ROW_LENGTH // 4])
def test_each_epoch_is_a_permutation(source, length):
  size = ROWS * ROW_LENGTH // length
  flat = samples(take(3 * size // BATCH, source, length=length))
  every = {
    tuple(part)
    for i in range(ROWS)
    for part in source[i].reshape(-1, length)
  }  # fmt: skip
  epochs = [flat[e * size : (e + 1) * size] for e in range(2)]
  for epoch in epochs:
    assert len(epoch) == size and set(epoch) == every
  assert epochs[0] != epochs[1]


def test_batches_are_int32(source):
  batch = take(1, source)[0]
  assert batch.shape == (BATCH, ROW_LENGTH) and batch.dtype == np.int32


@pytest.mark.parametrize('hosts', [2, 4, 8])
def test_global_batches_are_the_same_for_any_number_of_hosts(source, hosts):
  whole = take(30, source)  # over four epochs
  per_host = BATCH // hosts
  parts = [
    take(30, source, rows=range(h * per_host, (h + 1) * per_host))
    for h in range(hosts)
  ]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_a_host_may_supply_any_rows(source):
  whole = take(30, source)
  rows = (1, 2, 6)
  np.testing.assert_array_equal(take(30, source, rows=rows), whole[:, rows])


@pytest.mark.parametrize('step', [1, 6, 7, 100])
def test_resume_equals_skipping(source, step):
  whole = take(step + 5, source)
  resumed = take(5, source, start_sample=step * BATCH)
  np.testing.assert_array_equal(resumed, whole[step:])


def test_another_batch_size_continues_at_the_same_sample(source):
  whole = samples(take(12, source))
  resumed = take(4, source, global_batch=6, rows=range(6), start_sample=24)
  assert samples(resumed) == whole[24:48]
  resumed = take(4, source, global_batch=6, rows=range(6), start_sample=7)
  assert samples(resumed) == whole[7:31]


@pytest.mark.parametrize('num_threads', [1, 3])
def test_threads_do_not_show(source, num_threads):
  np.testing.assert_array_equal(
    take(20, source, num_threads=num_threads), take(20, source)
  )


def test_seeds_differ_also_from_each_others_later_epochs(source):
  """grain alone gives seed s epoch 1 the order of seed s + 1 epoch 0."""
  per_epoch = ROWS // 2
  orders = [
    tuple(samples(batches)[e * ROWS : (e + 1) * ROWS])
    for seed in range(4)
    for batches in [
      take(4 * per_epoch, source, seed=seed, global_batch=2, rows=(0, 1))
    ]
    for e in range(4)
  ]
  assert len(set(orders)) == 16


def test_order_is_pinned(source):
  """A change here breaks the resumption of every run that exists."""
  pinned = [11, 47, 10, 42, 1, 20, 19, 34]
  first = take(1, source)[0, :, 0] // 100
  assert first.tolist() == pinned


def test_length_must_divide_the_row(source):
  with pytest.raises(UserError, match='length of 24 .*config.data.length'):
    take(1, source, length=24)
  with pytest.raises(UserError, match='length of 64 .*config.data.length'):
    take(1, source, length=64)


def test_wrong_rows_are_refused(source):
  for rows in ((), (BATCH,), (-1,)):
    with pytest.raises(ValueError, match='not rows of a batch'):
      take(1, source, rows=rows)


def test_damaged_row_stops_the_run_and_names_the_file(directory, tmp_path):
  for path in directory.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  content = bytearray((tmp_path / 'train-1').read_bytes())
  content[len(content) // 50] ^= 1
  (tmp_path / 'train-1').write_bytes(content)
  source = records.RowSource(tmp_path, records.read_manifest(tmp_path), 'train')
  for num_threads in (0, 2):
    with pytest.raises(UserError, match='train-1 is damaged'):
      take(ROWS // BATCH + 1, source, num_threads=num_threads)


def heldout(source, **changes):
  settings = dict(
    batch=4,
    length=ROW_LENGTH,
    num_batches=3,
    rows=range(4),
    num_threads=0,
  )
  return list(pipeline.heldout_batches(source, **(settings | changes)))


def test_heldout_is_a_fixed_sample_without_repeats(source):
  batches = heldout(source)
  assert len(batches) == 3
  flat = samples(batches)
  assert len(set(flat)) == 12
  assert samples(heldout(source)) == flat
  assert samples(heldout(source, batch=6, num_batches=2, rows=range(6))) == flat
  assert samples(heldout(source, num_batches=12))[:12] == flat


def test_heldout_by_hosts(source):
  whole = np.stack(heldout(source))
  parts = [np.stack(heldout(source, rows=rows)) for rows in ((0, 1), (2, 3))]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_too_many_heldout_batches_are_refused(source):
  assert len(heldout(source, num_batches=12)) == 12
  with pytest.raises(UserError, match='config.eval.batches to at most 12'):
    heldout(source, num_batches=13)


def test_fingerprint_tells_what_decides_the_order(directory):
  manifest = records.read_manifest(directory)
  base = pipeline.fingerprint(manifest, 'train', seed=1, length=16)
  assert json.loads(json.dumps(base)) == base
  assert base == pipeline.fingerprint(manifest, 'train', seed=1, length=16)
  changed = pipeline.fingerprint(manifest, 'train', seed=2, length=16)
  assert {k for k in base if base[k] != changed[k]} == {'seed', 'order'}
  changed = pipeline.fingerprint(manifest, 'train', seed=1, length=32)
  differ = {k for k in base if base[k] != changed[k]}
  assert differ == {'length', 'samples', 'order'}


MESHES = {
  'batch': ((8, 1), PartitionSpec('batch')),
  'batch and length': ((4, 2), PartitionSpec('batch', 'length')),
  'length': ((1, 8), PartitionSpec(None, 'length')),
  'length first': ((2, 4), PartitionSpec('length', 'batch')),
  'both on rows': ((4, 2), PartitionSpec(('length', 'batch'))),
  'replicated': ((4, 2), PartitionSpec()),
}


@pytest.mark.parametrize('name', MESHES)
def test_every_mesh_gives_the_same_global_arrays(source, name):
  shape, spec = MESHES[name]
  mesh = jax.make_mesh(
    shape, ('batch', 'length'), axis_types=(AxisType.Auto,) * 2
  )
  sharding = NamedSharding(mesh, spec)
  global_shape = (BATCH, ROW_LENGTH)
  rows = pipeline.host_rows(sharding, global_shape)
  assert rows == tuple(range(BATCH))

  expected = take(5, source, rows=rows)
  arrays = list(pipeline.to_device(iter(expected), sharding, global_shape))
  assert len(arrays) == 5
  for array, batch in zip(arrays, expected, strict=True):
    assert array.sharding == sharding and array.dtype == np.int32
    np.testing.assert_array_equal(array, batch)
    for shard in array.addressable_shards:
      np.testing.assert_array_equal(shard.data, batch[shard.index])


def test_host_rows_are_those_of_its_devices():
  """Of two hosts with 4 devices each; one holds rows that are not adjacent."""
  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))

  class OneHost:
    def __init__(self, devices):
      self.devices = devices

    def addressable_devices_indices_map(self, shape):
      everything = NamedSharding(
        mesh, PartitionSpec('batch')
      ).addressable_devices_indices_map(shape)
      return {d: everything[d] for d in self.devices}

  devices = list(mesh.devices)
  assert pipeline.host_rows(OneHost(devices[4:]), (16, 4)) == (*range(8, 16),)
  ends = OneHost(devices[:1] + devices[-1:])
  assert pipeline.host_rows(ends, (16, 4)) == (0, 1, 14, 15)


def test_one_batch_is_in_flight(source):
  asked = []

  def batches():
    for k in itertools.count():
      asked.append(k)
      yield np.full((BATCH, 4), k, np.int32)

  mesh = jax.make_mesh((8,), ('batch',), axis_types=(AxisType.Auto,))
  sharding = NamedSharding(mesh, PartitionSpec('batch'))
  arrays = pipeline.to_device(batches(), sharding, (BATCH, 4))
  for k in range(3):
    assert int(next(arrays)[0, 0]) == k
    assert asked == [*range(k + 2)]
