"""Rows come back as written, and damage is named, never read."""

import concurrent.futures
import dataclasses
import json
import pickle
import shutil

import numpy as np
import pytest

from maskdiff.data import records
from maskdiff.errors import UserError

ROW_LENGTH = 64
VOCAB = 70_000  # needs uint32


def write(directory, seed=0, sizes=(300, 200), vocab_size=VOCAB):
  """A directory with random rows; returns the train rows."""
  rng = np.random.default_rng(seed)
  dtype = records.token_dtype(vocab_size)
  directory.mkdir()
  splits, train = {}, []
  for name in records.SPLITS:
    shards = []
    for n, size in enumerate(sizes):
      rows = rng.integers(0, vocab_size, (size, ROW_LENGTH)).astype(dtype)
      path = directory / f'{name}-{n:05d}.array_record'
      shards.append(records.write_shard(path, rows))
      if name == 'train':
        train.append(rows)
    splits[name] = records.Split(
      shards=tuple(shards),
      rows=sum(sizes),
      tokens=sum(sizes) * ROW_LENGTH,
      text_bytes=1,
      documents=1,
      unigram_entropy_nats=1.0,
    )
  manifest = records.Manifest(
    format_version=records.FORMAT_VERSION,
    source='random',
    tokenizer_fingerprint='none',
    vocab_size=vocab_size,
    row_length=ROW_LENGTH,
    dtype=dtype,
    splits=splits,
  )
  records.write_manifest(directory, manifest)
  return np.concatenate(train)


@pytest.fixture
def data(tmp_path):
  write(tmp_path / 'data')
  return tmp_path / 'data'


def read_all(directory, split='train'):
  source = records.RowSource(directory, records.read_manifest(directory), split)
  return np.stack([source[i] for i in range(len(source))])


@pytest.mark.parametrize('vocab_size', [1 << 16, VOCAB])
def test_rows_come_back_as_written(tmp_path, vocab_size):
  rows = write(tmp_path / 'data', vocab_size=vocab_size)
  got = read_all(tmp_path / 'data')
  assert got.dtype == np.int32
  np.testing.assert_array_equal(got, rows)


def test_dtype_is_the_smallest_that_fits():
  assert records.token_dtype(1 << 16) == 'uint16'
  assert records.token_dtype((1 << 16) + 1) == 'uint32'


def test_manifest_comes_back_as_written(data):
  manifest = records.read_manifest(data)
  assert [s.rows for s in manifest.splits['train'].shards] == [300, 200]
  records.write_manifest(data, manifest)
  assert records.read_manifest(data) == manifest


def test_only_finished_files_are_visible(data):
  names = {path.name for path in data.iterdir()}
  shards = {f'{s}-0000{n}.array_record' for s in records.SPLITS for n in (0, 1)}
  assert names == shards | {'manifest.json'}


def test_rows_read_by_many_threads_and_after_pickling(data):
  source = records.RowSource(data, records.read_manifest(data), 'heldout')
  expected = [source[i] for i in range(len(source))]
  copy = pickle.loads(pickle.dumps(source))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    got = list(pool.map(copy.__getitem__, [*range(len(source))] * 4))
  np.testing.assert_array_equal(got, expected * 4)
  assert repr(copy) == repr(source)
  assert 'heldout' in repr(source)


def test_rows_outside_the_split_are_refused(data):
  source = records.RowSource(data, records.read_manifest(data), 'train')
  for i in (-1, len(source)):
    with pytest.raises(IndexError):
      source[i]


def test_missing_directory_is_named(tmp_path):
  with pytest.raises(UserError, match='absent/manifest.json.*data.path'):
    records.read_manifest(tmp_path / 'absent')


def test_missing_manifest_is_named(data):
  (data / 'manifest.json').unlink()
  with pytest.raises(UserError, match='cannot read .*manifest.json'):
    records.read_manifest(data)


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"format_version": 1}'])
def test_damaged_manifest_is_named(data, text):
  (data / 'manifest.json').write_text(text)
  with pytest.raises(UserError, match='manifest.json is damaged'):
    records.read_manifest(data)


def test_other_format_version_is_refused(data):
  path = data / 'manifest.json'
  fields = json.loads(path.read_text()) | {'format_version': 99}
  path.write_text(json.dumps(fields))
  with pytest.raises(UserError, match='format version 99, this code reads 1'):
    records.read_manifest(data)


def test_missing_shard_is_named(data):
  (data / 'heldout-00001.array_record').unlink()
  with pytest.raises(UserError, match='heldout-00001.array_record is missing'):
    records.read_manifest(data)


def test_truncated_shard_is_named(data):
  path = data / 'train-00001.array_record'
  path.write_bytes(path.read_bytes()[:-1000])
  with pytest.raises(UserError, match='train-00001.array_record has .* bytes'):
    records.read_manifest(data)


def test_shard_overwritten_at_equal_size_is_named(data):
  path = data / 'train-00001.array_record'
  manifest = records.read_manifest(data)
  path.write_bytes(bytes(path.stat().st_size))
  with pytest.raises(UserError, match='train-00001.array_record has 0 rows'):
    records.RowSource(data, manifest, 'train')


def test_one_flipped_bit_is_found_where_it_is(data):
  expected = read_all(data)
  path = data / 'train-00001.array_record'
  content = bytearray(path.read_bytes())
  content[len(content) // 4] ^= 1
  path.write_bytes(content)
  source = records.RowSource(data, records.read_manifest(data), 'train')
  damaged = 0
  for i in range(len(source)):
    try:
      np.testing.assert_array_equal(source[i], expected[i])
    except UserError as e:
      damaged += 1
      assert 'train-00001.array_record is damaged' in str(e)
  assert damaged == 1


def test_manifest_from_elsewhere_is_refused(data, tmp_path):
  write(tmp_path / 'other', seed=1, sizes=(200, 300))
  shutil.copy(tmp_path / 'other' / 'manifest.json', data)
  with pytest.raises(UserError, match='train-00000.array_record'):
    records.read_manifest(data)


def test_manifest_with_another_row_length_is_refused(data):
  manifest = records.read_manifest(data)
  other = dataclasses.replace(manifest, row_length=32)
  with pytest.raises(UserError, match='train-00000.array_record has 64 tokens'):
    records.RowSource(data, other, 'train')[0]


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
  class FullDisk:
    def __init__(self, path, options):
      open(path, 'w').close()

    def write(self, record):
      pass

    def close(self):
      raise RuntimeError('No space left on device')

  monkeypatch.setattr(
    records.array_record_module, 'ArrayRecordWriter', FullDisk
  )
  with pytest.raises(OSError, match='No space left'):
    records.write_shard(tmp_path / 'a', np.zeros((2, 4), np.uint16))
  assert not list(tmp_path.iterdir())
