"""Rows are read back unchanged; damaged rows raise errors."""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import pickle
import resource
import shutil
import time
import tracemalloc

import numpy as np
import pytest

from maskdiff.data import records, row_reader
from maskdiff.errors import UserError
from maskdiff.files import paths

ROW_LENGTH = 64
VOCAB = 70_000  # needs uint32


def write(directory, seed=0, sizes=(300, 200), vocab_size=VOCAB):
  """Writes a directory of random rows; returns the train rows."""
  rng = np.random.default_rng(seed)
  dtype = records.token_dtype(vocab_size)
  directory.mkdir()
  splits, train = {}, []
  for name in records.SPLITS:
    shards = []
    for n, size in enumerate(sizes):
      rows = rng.integers(0, vocab_size, (size, ROW_LENGTH)).astype(dtype)
      path = directory / f'{name}-{n:05d}.array_record'
      shards.append(records.write_shard(path, [rows]))
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
    settings={'row_length': ROW_LENGTH, 'heldout_fraction': 0.5},
    tokenizer_fingerprint='none',
    vocab_size=vocab_size,
    eos_id=0,
    row_length=ROW_LENGTH,
    dtype=dtype,
    skipped={'empty': 3},
    splits=splits,
  )
  records.write_manifest(directory, manifest)
  return np.concatenate(train)


@pytest.fixture
def data(tmp_path):
  write(tmp_path / 'data')
  return tmp_path / 'data'


def source(directory, split='train'):
  return row_reader.RowSource(
    directory, records.read_manifest(directory), split
  )


def read_all(directory, split='train'):
  rows = source(directory, split)
  return np.stack([rows[i] for i in range(len(rows))])


def verify(directory, **options):
  row_reader.verify(directory, records.read_manifest(directory), **options)


def unreadable(directory, split='train'):
  """Returns the numbers of the rows that raise, and their errors."""
  rows, errors = source(directory, split), {}
  for i in range(len(rows)):
    try:
      rows[i]
    except UserError as e:
      errors[i] = e
  return errors


def flip_bit(path, content, at, bit=0):
  path.write_bytes(
    content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]
  )


def damage(directory, row):
  """Flips one bit of a row of the first shard of train."""
  path = directory / 'train-00000.array_record'
  content = path.read_bytes()
  rows = read_all(directory)[:300].copy()
  rows[row] += 1
  # The first byte of the file that depends on the row.
  other = directory.with_name('other')
  records.write_shard(other, [rows])
  pairs = zip(content, other.read_bytes(), strict=False)
  flip_bit(path, content, next(at for at, (a, b) in enumerate(pairs) if a != b))


def check_one_line(error):
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('vocab_size', [1 << 16, VOCAB])
def test_rows_come_back_as_written(tmp_path, vocab_size):
  rows = write(tmp_path / 'data', vocab_size=vocab_size)
  got = read_all(tmp_path / 'data')
  assert got.dtype == rows.dtype
  np.testing.assert_array_equal(got, rows)
  verify(tmp_path / 'data', rows='all')


def test_rows_are_little_endian_on_disk(tmp_path):
  rows = np.arange(8, dtype='>u2').reshape(2, 4)
  shard = records.write_shard(tmp_path / 'a', [rows])
  digest = hashlib.blake2b(rows.astype('<u2').tobytes(), digest_size=8)
  assert shard.digest == digest.hexdigest()


def test_dtype_is_the_smallest_that_fits():
  assert records.token_dtype(1 << 16) == 'uint16'
  assert records.token_dtype((1 << 16) + 1) == 'uint32'


@pytest.mark.parametrize('sizes', [[1] * 60, [7, 53], [0, 59, 0, 1, 0]])
def test_shard_does_not_depend_on_block_sizes(tmp_path, sizes):
  rng = np.random.default_rng(0)
  rows = rng.integers(0, 1 << 16, (60, 32)).astype(np.uint16)
  whole = records.write_shard(tmp_path / 'whole', [rows])
  blocks = np.split(rows, np.cumsum(sizes)[:-1])
  parts = records.write_shard(tmp_path / 'parts', iter(blocks))
  assert parts == dataclasses.replace(whole, file='parts')
  written = [(tmp_path / name).read_bytes() for name in ('whole', 'parts')]
  assert written[0] == written[1]


@pytest.mark.parametrize('blocks', [[], [np.zeros((0, 4), np.uint16)] * 2])
def test_no_rows_make_no_shard(tmp_path, blocks):
  assert records.write_shard(tmp_path / 'a', blocks) is None
  assert not list(tmp_path.iterdir())


def test_a_shard_may_be_larger_than_memory(tmp_path):
  blocks = (np.full((64, 8192), n, np.uint16) for n in range(32))  # 1 MiB each
  tracemalloc.start()
  shard = records.write_shard(tmp_path / 'a', blocks)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert shard.rows == 32 * 64
  assert peak < 4 << 20


@pytest.mark.parametrize('rows', [1, 2, 3, 8, 9])
def test_digests_are_of_all_rows_and_of_three(tmp_path, rows):
  block = np.arange(4 * rows, dtype=np.uint16).reshape(rows, 4)
  shard = records.write_shard(tmp_path / 'a', [block])
  digest = lambda x: hashlib.blake2b(x.tobytes(), digest_size=8).hexdigest()
  assert shard.rows == rows
  assert shard.bytes == (tmp_path / 'a').stat().st_size
  assert shard.digest == digest(block)
  assert shard.sample_digest == digest(block[[0, rows // 2, rows - 1]])


def test_unfinished_shards_are_in_the_temporary_directory(tmp_path):
  (tmp_path / 'unfinished').mkdir()
  (tmp_path / 'rows').mkdir()

  def blocks():
    yield np.zeros((2, 4), np.uint16)
    assert len(list((tmp_path / 'unfinished').iterdir())) == 1
    assert not list((tmp_path / 'rows').iterdir())

  path = tmp_path / 'rows' / 'a'
  records.write_shard(path, blocks(), tmp_path / 'unfinished')
  assert not list((tmp_path / 'unfinished').iterdir())
  assert list((tmp_path / 'rows').iterdir()) == [path]


def test_shard_replaces_an_older_one(tmp_path):
  records.write_shard(tmp_path / 'a', [np.zeros((9, 4), np.uint16)])
  shard = records.write_shard(tmp_path / 'a', [np.ones((2, 4), np.uint16)])
  again = records.write_shard(tmp_path / 'b', [np.ones((2, 4), np.uint16)])
  assert shard == dataclasses.replace(again, file='a')
  assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes()


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
  class FullDisk:
    def __init__(self, path, options):
      open(path, 'w').close()

    def write(self, record):
      pass

    def is_open(self):
      return True

    def close(self):
      raise RuntimeError('No space left on device; writing a; at byte 7')

  monkeypatch.setattr(
    records.array_record_module, 'ArrayRecordWriter', FullDisk
  )
  with pytest.raises(OSError, match='^No space left on device$'):
    records.write_shard(tmp_path / 'a', [np.zeros((2, 4), np.uint16)])
  assert not list(tmp_path.iterdir())


def test_failing_input_leaves_nothing(tmp_path):
  def blocks():
    yield np.zeros((2, 4), np.uint16)
    raise UserError('cannot read input')

  with pytest.raises(UserError, match='cannot read input'):
    records.write_shard(tmp_path / 'a', blocks())
  assert not list(tmp_path.iterdir())


def test_write_to_a_missing_directory_is_an_os_error(tmp_path):
  with pytest.raises(OSError, match='No such file'):
    records.write_shard(tmp_path / 'no' / 'a', [np.zeros((2, 4), np.uint16)])


def test_manifest_comes_back_as_written(data):
  manifest = records.read_manifest(data)
  assert [s.rows for s in manifest.splits['train'].shards] == [300, 200]
  assert manifest.settings == {'row_length': 64, 'heldout_fraction': 0.5}
  records.write_manifest(data, manifest)
  assert records.read_manifest(data) == manifest


def test_only_finished_files_are_visible(data):
  names = {path.name for path in data.iterdir()}
  shards = {f'{s}-0000{n}.array_record' for s in records.SPLITS for n in (0, 1)}
  assert names == shards | {'manifest.json'}


def test_rows_read_by_many_threads_and_after_pickling(data):
  rows = source(data, 'heldout')
  expected = [rows[i] for i in range(len(rows))]
  copy = pickle.loads(pickle.dumps(rows))
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    got = list(pool.map(copy.__getitem__, [*range(len(rows))] * 4))
  np.testing.assert_array_equal(got, expected * 4)
  assert repr(copy) == repr(rows)
  assert 'heldout' in repr(rows)


def test_threads_that_start_together_open_a_shard_once(data, monkeypatch):
  opened = []
  reader = records.array_record_module.ArrayRecordReader

  def open_one(path, **options):
    opened.append(pathlib.Path(path).name)
    time.sleep(0.05)  # for the others to ask as well
    return reader(path, **options)

  monkeypatch.setattr(
    records.array_record_module, 'ArrayRecordReader', open_one
  )
  rows = source(data)
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    list(pool.map(rows.__getitem__, [0, 499] * 40))
  assert sorted(opened) == [f'train-0000{n}.array_record' for n in (0, 1)]


def test_rows_outside_the_split_are_refused(data):
  rows = source(data)
  for i in (-1, len(rows)):
    with pytest.raises(IndexError):
      rows[i]


def test_a_split_may_be_empty(data):
  manifest = records.read_manifest(data)
  empty = dataclasses.replace(manifest.splits['heldout'], shards=(), rows=0)
  manifest = dataclasses.replace(
    manifest, splits=manifest.splits | {'heldout': empty}
  )
  records.write_manifest(data, manifest)
  verify(data)
  rows = source(data, 'heldout')
  assert len(rows) == 0
  with pytest.raises(IndexError):
    rows[0]


def test_missing_directory_is_named(tmp_path):
  with pytest.raises(UserError, match='absent/manifest.json.*data.path') as e:
    records.read_manifest(tmp_path / 'absent')
  check_one_line(e)


def test_missing_manifest_is_named(data):
  (data / 'manifest.json').unlink()
  with pytest.raises(UserError, match='cannot read .*manifest.json') as e:
    records.read_manifest(data)
  assert 'No such file' in str(e.value) and 'launch/prepare.py' in str(e.value)
  check_one_line(e)


def test_manifest_that_is_not_text_is_named(data):
  (data / 'manifest.json').write_bytes(b'\xff\xfe{"format_version": 2}')
  with pytest.raises(UserError, match='manifest.json is damaged .*utf-8') as e:
    records.read_manifest(data)
  check_one_line(e)


@pytest.mark.parametrize(
  'text', ['', '[]', '{}', 'null', '7', '{"format_version": 2}', '{"a": 1,\n}']
)
def test_damaged_manifest_is_named(data, text):
  (data / 'manifest.json').write_text(text)
  with pytest.raises(UserError, match='manifest.json is damaged') as e:
    records.read_manifest(data)
  check_one_line(e)


@pytest.mark.parametrize('part', ['splits', 'shards', 'digest'])
def test_manifest_without_a_part_is_damaged(data, part):
  path = data / 'manifest.json'
  fields = json.loads(path.read_text())
  train = fields['splits']['train']
  {'splits': fields, 'shards': train, 'digest': train['shards'][0]}[part].pop(
    part
  )
  path.write_text(json.dumps(fields))
  with pytest.raises(UserError, match=f'manifest.json is damaged.*{part}'):
    records.read_manifest(data)


@pytest.mark.parametrize('version', [1, 99])
def test_other_format_version_is_refused(data, version):
  path = data / 'manifest.json'
  fields = json.loads(path.read_text()) | {'format_version': version}
  path.write_text(json.dumps(fields))
  message = (
    f'format version {version}, this code reads 2 and 3: .*prepare it again'
  )
  with pytest.raises(UserError, match=message):
    records.read_manifest(data)


def test_intact_data_pass_verification(data):
  verify(data)
  verify(data, rows='all')
  verify(data, threads=1)


def test_missing_shard_is_named(data):
  (data / 'heldout-00001.array_record').unlink()
  records.read_manifest(data)
  with pytest.raises(
    UserError, match='heldout-00001.array_record is missing: .*data.path'
  ) as e:
    verify(data)
  check_one_line(e)


def test_truncated_shard_is_named(data):
  path = data / 'train-00001.array_record'
  path.write_bytes(path.read_bytes()[:-1000])
  with pytest.raises(UserError, match='train-00001.array_record has .* bytes'):
    verify(data)


@pytest.mark.parametrize('row', [0, 150, 299])
def test_damage_of_a_sampled_row_is_found(data, row):
  damage(data, row)
  with pytest.raises(
    UserError, match='train-00000.array_record is damaged .*: delete'
  ) as e:
    verify(data)
  check_one_line(e)


@pytest.mark.parametrize('row', [1, 149, 298])
def test_damage_of_another_row_is_found_when_all_are_read(data, row):
  damage(data, row)
  verify(data)
  with pytest.raises(UserError, match='train-00000.array_record is damaged'):
    verify(data, rows='all')


def test_shards_of_equal_size_are_told_apart(tmp_path):
  write(tmp_path / 'data', sizes=(100, 100))
  a, b = (tmp_path / 'data' / f'train-0000{n}.array_record' for n in (0, 1))
  assert a.stat().st_size == b.stat().st_size
  a.rename(tmp_path / 'c')
  b.rename(a)
  (tmp_path / 'c').rename(b)
  with pytest.raises(
    UserError, match=r'train-00000.* does not match its checksum.*\(and 1 more'
  ):
    verify(tmp_path / 'data')


def test_shard_that_differs_in_rows_not_sampled_is_found(data):
  """Each row is intact, but it is not the row of the manifest."""
  path = data / 'train-00000.array_record'
  rows = read_all(data)[:300].copy()
  rows[[7, 8]] = rows[[8, 7]]
  size = path.stat().st_size
  assert records.write_shard(path, [rows]).bytes == size
  verify(data)
  with pytest.raises(
    UserError, match='train-00000.array_record does not match its checksum'
  ):
    verify(data, rows='all')


@pytest.mark.parametrize('size', [1 << 16, None])
def test_shard_without_its_footer_is_named(data, size):
  """The footer is in the last 64 KiB; None overwrites the whole file."""
  path = data / 'train-00001.array_record'
  content = path.read_bytes()
  kept = content[: -(size or len(content))]
  path.write_bytes(kept.ljust(len(content), b'\0'))
  message = 'train-00001.array_record has 0 rows, its manifest says 200'
  with pytest.raises(UserError, match=message):
    verify(data)
  with pytest.raises(UserError, match=message):
    source(data)[300]


def test_bad_shards_are_counted(data):
  (data / 'train-00000.array_record').unlink()
  with pytest.raises(UserError, match='train-00000') as e:
    verify(data)
  assert 'more shards' not in str(e.value)
  (data / 'heldout-00000.array_record').write_bytes(b'')
  path = data / 'heldout-00001.array_record'
  path.write_bytes(bytes(path.stat().st_size))
  with pytest.raises(
    UserError, match=r'train-00000.*missing.* \(and 2 more shards\)$'
  ) as e:
    verify(data)
  check_one_line(e)


def test_manifest_from_elsewhere_is_refused(data, tmp_path):
  write(tmp_path / 'other', seed=1, sizes=(200, 300))
  shutil.copy(tmp_path / 'other' / 'manifest.json', data)
  with pytest.raises(UserError, match='train-00000.array_record.*3 more'):
    verify(data)


def test_manifest_with_another_row_length_is_refused(data):
  manifest = records.read_manifest(data)
  other = dataclasses.replace(manifest, row_length=32)
  with pytest.raises(UserError, match='train-00000.*256 bytes, not 128'):
    row_reader.RowSource(data, other, 'train')[0]
  with pytest.raises(UserError, match='train-00000.*row 0 has 256 bytes'):
    row_reader.verify(data, other)


def test_shards_are_opened_when_read(data):
  expected = read_all(data)
  (data / 'train-00001.array_record').unlink()
  rows = source(data)
  assert len(rows) == 500
  np.testing.assert_array_equal(rows[299], expected[299])
  for _ in range(2):
    with pytest.raises(UserError, match='train-00001.*missing') as e:
      rows[300]
    assert not isinstance(e.value, row_reader.DamagedRow)
  np.testing.assert_array_equal(rows[0], expected[0])


def test_shard_that_lost_its_end_is_not_one_damaged_row(data):
  path = data / 'train-00000.array_record'
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(UserError, match='train-00000.array_record has') as e:
    source(data)[0]
  assert not isinstance(e.value, row_reader.DamagedRow)


@pytest.mark.parametrize('row', [0, 117, 299])
def test_one_flipped_bit_damages_one_row(data, row):
  expected = read_all(data)
  damage(data, row)
  (error,) = unreadable(data).values()
  assert isinstance(error, row_reader.DamagedRow)
  assert f'row {row} of shard {data}/train-00000' in str(error)
  assert '\n' not in str(error)
  rows = source(data)
  for i in set(range(len(rows))) - {row}:
    np.testing.assert_array_equal(rows[i], expected[i])


def test_flipped_bits_anywhere_are_never_read(data):
  """Every row is read unchanged or raises an error."""
  expected = read_all(data)
  path = data / 'train-00001.array_record'
  content = path.read_bytes()
  rng = np.random.default_rng(0)
  for at in rng.integers(0, len(content) * 2 // 3, 30):
    flip_bit(path, content, at, rng.integers(8))
    rows, errors = source(data), unreadable(data)
    assert len(errors) <= 1
    for i in set(range(300, 500)) - set(errors):
      np.testing.assert_array_equal(rows[i], expected[i])


def test_local_paths_stay_as_they_are(tmp_path):
  for path in ('data/web', '/data/web', 'a:b', tmp_path):
    assert paths.local_path(path) == pathlib.Path(path)


def test_tilde_is_the_home_directory(monkeypatch):
  monkeypatch.setenv('HOME', '/home/somebody')
  assert paths.local_path('~/x') == pathlib.Path('/home/somebody/x')
  unknown = '~no-such-user-here/x'
  assert paths.local_path(unknown) == pathlib.Path(unknown)


def test_a_mounted_bucket_is_read_like_a_directory(tmp_path, monkeypatch):
  monkeypatch.setattr(paths, 'BUCKETS', tmp_path)
  (tmp_path / 'bucket').mkdir()
  rows = write(tmp_path / 'bucket' / 'data')
  assert paths.local_path('gs://bucket') == tmp_path / 'bucket'
  np.testing.assert_array_equal(read_all('gs://bucket/data'), rows)
  verify('gs://bucket/data')


def test_a_bucket_that_is_not_mounted_names_the_command(tmp_path, monkeypatch):
  monkeypatch.setattr(paths, 'BUCKETS', tmp_path)
  with pytest.raises(UserError, match='gs://bucket/data is not a local') as e:
    records.read_manifest('gs://bucket/data')
  command = f'gcsfuse --implicit-dirs bucket {tmp_path}/bucket'
  assert f'mkdir -p {tmp_path}/bucket && {command}' in str(e.value)
  check_one_line(e)


def test_other_remote_paths_are_refused():
  with pytest.raises(UserError, match='s3://bucket/x .*mount point') as e:
    paths.local_path('s3://bucket/x')
  assert 'gcsfuse' not in str(e.value)


@pytest.fixture
def limits(monkeypatch):
  """Replaces the file limits of the process: [soft, hard]."""
  limits = [2000, 5000]

  def set_limit(kind, new):
    assert kind == resource.RLIMIT_NOFILE
    assert new[0] <= new[1] or new[1] == resource.RLIM_INFINITY
    limits[:] = new

  monkeypatch.setattr(resource, 'getrlimit', lambda kind: tuple(limits))
  monkeypatch.setattr(resource, 'setrlimit', set_limit)
  return limits


def many_shards(directory, number):
  """Returns a RowSource that lists one shard many times."""
  manifest = records.read_manifest(directory)
  split = dataclasses.replace(
    manifest.splits['train'],
    shards=manifest.splits['train'].shards[:1] * number,
  )
  manifest = dataclasses.replace(
    manifest, splits=manifest.splits | {'train': split}
  )
  return row_reader.RowSource(directory, manifest, 'train')


def test_more_shards_than_files_may_be_open_are_refused(data, limits):
  with pytest.raises(UserError, match=r'4500 shards .*\(5000\).*ulimit') as e:
    many_shards(data, 4500)
  assert limits == [2000, 5000]
  check_one_line(e)


def test_the_file_limit_is_raised_as_far_as_needed(data, limits):
  many_shards(data, 1500)
  assert limits == [3500, 5000]


def test_every_source_gets_files_of_its_own(data, limits):
  """A mixture has several sources, each with all its shards open."""
  for _ in range(2):
    many_shards(data, 1000)
  assert limits == [4000, 5000]
  many_shards(data, 3000)
  assert limits == [5000, 5000]
  many_shards(data, 3000)
  assert limits == [5000, 5000]


def test_a_process_without_a_file_limit_has_room(data, limits):
  limits[:] = 256, resource.RLIM_INFINITY
  many_shards(data, 4500)
  assert limits == [5524, resource.RLIM_INFINITY]
  limits[:] = resource.RLIM_INFINITY, resource.RLIM_INFINITY
  many_shards(data, 4500)
  assert limits == [resource.RLIM_INFINITY] * 2


def test_a_read_that_fails_for_a_moment_is_tried_again(data, monkeypatch):
  """Network file systems may fail for a moment; bad checksums stay bad."""
  monkeypatch.setattr(row_reader, '_RETRY_S', (0.0, 0.0))
  expected, rows = read_all(data), source(data)
  reader, failures = row_reader.open_shard, []

  class Failing:
    def __init__(self, *args):
      self.sound = reader(*args)

    def read(self, start, stop):
      if len(failures) % 3 < 2:
        failures.append(start)
        raise RuntimeError('UNAVAILABLE: Input/output error')
      return self.sound.read(start, stop)

  monkeypatch.setattr(row_reader, 'open_shard', Failing)
  np.testing.assert_array_equal(rows[3], expected[3])
  assert failures == [3, 3]
  failures.append(None)
  monkeypatch.setattr(row_reader, '_RETRY_S', (0.0,))
  with pytest.raises(row_reader.DamagedRow, match='UNAVAILABLE'):
    rows[4]


def test_hosts_divide_the_check_of_the_shards(data):
  (data / 'train-00001.array_record').unlink()
  manifest = records.read_manifest(data)
  number = [
    shard.file for split in manifest.splits.values() for shard in split.shards
  ].index('train-00001.array_record')
  for host in range(2):
    if host == number % 2:
      with pytest.raises(UserError, match='train-00001'):
        row_reader.verify(data, manifest, share=(host, 2))
    else:
      row_reader.verify(data, manifest, share=(host, 2))
