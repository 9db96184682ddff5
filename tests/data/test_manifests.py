"""Manifests of strangers: every bad one is refused in one line."""

import dataclasses
import json
import os
import random

import mutations
import numpy as np
import pytest

from maskdiff.data import pipeline, prepare, records, row_reader
from maskdiff.errors import UserError
from maskdiff.files import reading

ROW_LENGTH = 8


def write(directory):
  """Writes a directory with two training shards and one held-out shard."""
  directory.mkdir()
  rows = np.arange(80).reshape(10, ROW_LENGTH).astype('uint16')
  shard = lambda name: records.write_shard(
    directory / f'{name}.array_record', [rows]
  )
  split = lambda *names: records.Split(
    shards=tuple(map(shard, names)),
    rows=10 * len(names),
    tokens=80 * len(names),
    text_bytes=80,
    documents=3,
    unigram_entropy_nats=1.5,
  )
  records.write_manifest(
    directory,
    records.Manifest(
      format_version=records.FORMAT_VERSION,
      source='numbers',
      settings={'row_length': ROW_LENGTH, 'heldout_fraction': 0.5},
      tokenizer_fingerprint='none',
      vocab_size=100,
      eos_id=0,
      row_length=ROW_LENGTH,
      dtype='uint16',
      skipped={'empty': 3},
      splits={'train': split('a', 'b'), 'heldout': split('c')},
    ),
  )
  return directory


@pytest.fixture
def data(tmp_path):
  return write(tmp_path / 'data')


def use(directory):
  """Reads a directory as a run does: manifest, shards, order, one row."""
  manifest = records.read_manifest(directory)
  row_reader.verify(directory, manifest, threads=2)
  prepare.summary(manifest)
  dataset = pipeline.Dataset('data', str(directory), 1.0, manifest)
  pipeline.fingerprint([dataset], seed=0, length=ROW_LENGTH)
  for split in records.SPLITS:
    rows = row_reader.RowSource(directory, manifest, split)
    if len(rows):
      rows.read([0, len(rows) - 1])


def refused(directory):
  with pytest.raises(UserError) as e:
    use(directory)
  message = str(e.value)
  assert '\n' not in message and len(message) < 600
  return message


def change(directory, *place, value):
  path = directory / 'manifest.json'
  fields = json.loads(path.read_text())
  *before, last = place
  holder = fields
  for name in before:
    holder = holder[name]
  holder[last] = value
  path.write_text(json.dumps(fields))


def test_an_intact_manifest_is_read(data):
  use(data)


SHARD = ('splits', 'train', 'shards', 0)
HUGE = 10**18


@pytest.mark.parametrize(
  'place, values',
  [
    (
      (*SHARD, 'file'),
      ['/etc/passwd', '../x', 'x/y', '..', '', 7, None, 'a\0'],
    ),
    ((*SHARD, 'file'), ['b.array_record', '\x1b[2J', ['a.array_record']]),
    ((*SHARD, 'rows'), [-1, 0, HUGE, 10.0, True, '10', float('nan'), None]),
    ((*SHARD, 'bytes'), [-1, 10**19, float('inf'), False]),
    ((*SHARD, 'digest'), ['', 'x' * 16, 3, [], 'A' * 16]),
    (('splits', 'train', 'rows'), [-1, 19, 21, HUGE, True, '20']),
    (('splits', 'train', 'tokens'), [-1, 10**19, 1.5, None]),
    (('splits', 'train', 'shards'), [{}, None, 'ab', [[]], [None] * 3]),
    (
      ('splits', 'train', 'unigram_entropy_nats'),
      [float('nan'), -1, '1', True],
    ),
    (('splits', 'train'), [None, [], 'x']),
    (('splits',), [[], None, {'train': {}}]),
    (('row_length',), [-1, 0, HUGE, True, 8.0, '8', None]),
    (('vocab_size',), [-1, 0, HUGE, 1.0, '100']),
    (('eos_id',), [-1, 100, 1.0, None]),
    (('dtype',), ['float64', 'object', 'O', 3, None, ['uint16']]),
    (('skipped',), [[], {'empty': -1}, {'empty': 'x'}]),
    (('columns',), [{'doc': 'object'}, [], 'doc', {'doc': []}]),
    (('settings',), [[], {'a': []}, None]),
    (('source',), [3, None, []]),
    (('format_version',), [2.0, True, None, '2', [], {}]),
    (('unknown',), [1]),
  ],
)
def test_bad_value_is_named(data, place, values):
  for value in values:
    change(data, *place, value=value)
    message = refused(data)
    assert 'manifest.json' in message
    assert str(place[-1]) in message


def test_order_of_sizes_near_the_bounds_is_computed(data):
  """Numbers within the bounds do not overflow or take memory."""
  change(data, *SHARD, 'rows', value=1 << 39)
  change(data, 'splits', 'train', 'rows', value=(1 << 39) + 10)
  manifest = records.read_manifest(data)
  dataset = pipeline.Dataset('data', str(data), 1.0, manifest)
  pipeline.fingerprint([dataset], seed=0, length=1)
  assert 'its manifest says' in refused(data)


@pytest.mark.parametrize('target', ['file', 'fifo', 'folder', 'loop', 'none'])
def test_shard_that_is_not_a_file_of_the_directory_is_refused(
  data, tmp_path, target
):
  shard, outside = data / 'a.array_record', tmp_path / 'outside'
  if target == 'file':
    shard.rename(outside)
    shard.symlink_to(outside)
  else:
    shard.unlink()
  if target == 'fifo':
    os.mkfifo(shard)  # opening it for reading would wait for a writer
  elif target == 'folder':
    shard.mkdir()
  elif target == 'loop':
    shard.symlink_to(shard)
  assert 'a.array_record' in refused(data)


@pytest.mark.parametrize('kind', ['fifo', 'folder', 'large', 'deep', 'half'])
def test_manifest_of_another_kind_is_refused(data, monkeypatch, kind):
  path = data / 'manifest.json'
  content = path.read_text()
  path.unlink()
  if kind == 'fifo':
    os.mkfifo(path)
  elif kind == 'folder':
    path.mkdir()
  elif kind == 'large':
    with open(path, 'w') as f:
      f.truncate(1 << 40)  # sparse
  elif kind == 'deep':
    path.write_text('[' * 100_000)
  else:
    path.write_text(content.replace('numbers', '\\ud800'))
  assert 'manifest.json' in refused(data)


def test_any_damage_to_a_manifest_is_one_line_or_harmless(data, monkeypatch):
  """A seeded fuzz test: no traceback, no file outside the directory."""
  opened, open_regular = [], reading.open_regular

  def spy(path, *buffering):
    opened.append(os.path.realpath(path))
    return open_regular(path, *buffering)

  monkeypatch.setattr(reading, 'open_regular', spy)
  path = data / 'manifest.json'
  intact = path.read_bytes()
  value = json.loads(intact)
  messages = set()
  for seed in range(400):
    rng = random.Random(seed)
    if seed % 2:
      content = json.dumps(mutations.mutated_json(rng, value)).encode()
    else:
      content = mutations.mutated_bytes(rng, intact)
    path.write_bytes(content)
    try:
      use(data)
    except UserError as e:
      messages.add(str(e).replace(str(data), '')[:60])
      assert '\n' not in str(e), seed
  assert len(messages) > 30
  assert all(p.startswith(os.path.realpath(data) + '/') for p in opened)


def test_manifest_that_could_not_be_read_is_not_written(data):
  manifest = records.read_manifest(data)
  before = (data / 'manifest.json').read_bytes()
  for changes in ({'settings': {'a': [1]}}, {'source': '\ud800'}):
    with pytest.raises(UserError, match='cannot write .*manifest.json'):
      records.write_manifest(data, dataclasses.replace(manifest, **changes))
  assert (data / 'manifest.json').read_bytes() == before


def test_a_path_that_is_not_utf8_is_one_line(tmp_path):
  directory = str(tmp_path) + '/b\udcff'
  with pytest.raises(UserError, match='is not UTF-8: rename the folder'):
    records.read_manifest(directory)
