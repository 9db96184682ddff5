"""Source folders of strangers: odd files neither hang nor fill the memory."""

import bz2
import gzip
import json
import os
import socket
import subprocess
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from maskdiff.data import readers, sources, unpack
from maskdiff.errors import UserError


def read(*specs, **options):
  found = sources.plan(list(map(str, specs)), **options)
  return found, [d for part in found.parts for d in sources.read(part)]


def refused(*specs, **options):
  with pytest.raises(UserError) as e:
    read(*specs, **options)
  message = str(e.value)
  assert '\n' not in message and len(message) < 1000
  return message


@pytest.fixture
def folder(tmp_path):
  """Returns a folder with one text file."""
  (tmp_path / 'in').mkdir()
  (tmp_path / 'in' / 'a.txt').write_text('a')
  return tmp_path / 'in'


def test_files_that_are_not_regular_are_counted(folder):
  os.mkfifo(folder / 'b.txt')
  os.mkfifo(folder / 'c.jsonl.gz')
  with socket.socket(socket.AF_UNIX) as s:
    s.bind(str(folder / 'd.txt'))
    os.symlink('b.txt', folder / 'e.txt')
    for spec in (folder, folder / '*'):
      found, documents = read(spec)
      assert documents == ['a']
      assert found.ignored == {'not regular files': 4}
  assert 'not a regular file' in refused(folder / 'b.txt')
  os.symlink('/dev/zero', folder.parent / 'z.txt')
  assert 'not a regular file' in refused(folder.parent / 'z.txt')


def test_fifo_that_appears_after_planning_is_refused(folder):
  found, _ = read(folder)
  (folder / 'a.txt').unlink()
  os.mkfifo(folder / 'a.txt')
  with pytest.raises(UserError, match='a.txt.*not a regular file'):
    list(sources.read(found.parts[0]))


def test_links_that_leave_the_folder_are_counted(folder):
  (folder.parent / 'private.txt').write_text('secret')
  (folder.parent / 'more').mkdir()
  (folder.parent / 'more' / 'x.txt').write_text('secret')
  (folder / 'sub').mkdir()
  (folder / 'sub' / 'b.txt').symlink_to('../../private.txt')
  (folder / 'c.txt').symlink_to('/etc/passwd')
  (folder / 'd.txt').symlink_to('/proc/self/environ')
  (folder / 'more').symlink_to(folder.parent / 'more')
  for spec in (folder, folder / '**' / '*'):
    found, documents = read(spec)
    assert documents == ['a']
    assert found.ignored['links that leave the folder'] >= 3
  # The user names this file.
  assert read(folder / 'sub' / 'b.txt')[1] == ['secret']


def test_links_within_the_folder_and_of_the_hub_cache_are_read(tmp_path):
  blobs, snapshot = tmp_path / 'd' / 'blobs', tmp_path / 'd' / 'snapshots' / '1'
  blobs.mkdir(parents=True)
  snapshot.mkdir(parents=True)
  (blobs / 'f00').write_text('hub')
  (snapshot / 'x.txt').symlink_to('../../blobs/f00')
  assert read(snapshot)[1] == ['hub']
  (tmp_path / 'e').mkdir()
  (tmp_path / 'e' / 'data').write_text('own')
  (tmp_path / 'e' / 'x.txt').symlink_to('data')
  assert read(tmp_path / 'e')[1] == ['own']


def test_link_loops_are_named(folder):
  (folder / 'b.txt').symlink_to('b.txt')
  assert 'b.txt' in refused(folder)
  (folder / 'b.txt').unlink()
  (folder / 'sub').symlink_to(folder)
  assert read(folder)[1] == ['a']


def test_folders_nested_deep_are_read(folder, monkeypatch):
  monkeypatch.chdir(folder)
  for _ in range(1500):
    os.mkdir('d')
    os.chdir('d')
  with open('b.txt', 'w') as f:
    f.write('deep')
  os.chdir(folder)
  try:
    assert sorted(read(folder)[1]) == ['a', 'deep']
    assert 'name the folder itself' in refused(folder / '**' / '*.txt')
  finally:  # shutil.rmtree, which pytest calls later, is recursive
    subprocess.run(['rm', '-r', folder / 'd'], check=True)


def test_names_that_are_not_utf8_are_read(folder):
  name = os.fsencode(folder) + b'/\xff\x1b[2J\n.txt'
  with open(name, 'w') as f:
    f.write('odd')
  found, documents = read(folder)
  assert sorted(documents) == ['a', 'odd']
  json.dumps(found.fingerprint).encode()
  odd = os.fsdecode(os.fsencode(folder.parent) + b'/\xff')
  os.rename(folder, odd)
  assert read(odd)[0].description.isprintable()
  read(odd)[0].description.encode()


BOMBS = {
  'txt.gz': lambda n: gzip.compress(bytes(n)),
  'jsonl.gz': lambda n: gzip.compress(bytes(n)),
  'txt.zst': lambda n: zstandard.compress(bytes(n)),
  'jsonl.zst': lambda n: zstandard.compress(bytes(n)),
}


@pytest.mark.parametrize('suffix', BOMBS)
@pytest.mark.parametrize('by_line', [False, True])
def test_file_that_expands_without_end_is_refused(
  folder, monkeypatch, suffix, by_line
):
  monkeypatch.setattr(readers, 'MAX_DOCUMENT_BYTES', 1 << 20)
  monkeypatch.setattr(readers, 'MAX_LINE_BYTES', 1 << 20)
  (folder / f'b.{suffix}').write_bytes(BOMBS[suffix](8 << 20))
  message = refused(folder, by_line=by_line)
  assert f'b.{suffix}' in message and '1,048,576 bytes' in message


@pytest.mark.parametrize('compress', [gzip.compress, zstandard.compress])
def test_file_of_endless_empty_lines_is_refused(folder, monkeypatch, compress):
  """Documents of any size: the total is limited too."""
  monkeypatch.setattr(unpack, 'MIN_LIMIT_BYTES', 1 << 20)
  suffix = {gzip.compress: 'gz'}.get(compress, 'zst')
  # Deflate expands by 1,032 at most.
  monkeypatch.setattr(unpack, 'MAX_EXPANSION', 500)
  (folder / f'b.jsonl.{suffix}').write_bytes(compress(b'\n' * (4 << 20)))
  message = refused(folder)
  assert f'b.jsonl.{suffix} unpacks to more than' in message


def test_zstandard_bomb_takes_little_memory(tmp_path):
  """64 KiB of this file stand for 2 GiB."""
  packed = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 30))
  path = tmp_path / 'a.jsonl.zst'
  path.write_bytes(packed)
  tracemalloc.start()
  assert '67,108,864 bytes' in refused(path)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 300 << 20  # the line and a piece of output


def test_sparse_file_is_refused_before_it_fills_memory(folder, monkeypatch):
  monkeypatch.setattr(readers, 'MAX_DOCUMENT_BYTES', 1 << 20)
  monkeypatch.setattr(readers, 'MAX_LINE_BYTES', 1 << 20)
  with open(folder / 'b.txt', 'wb') as f:
    f.truncate(1 << 40)
  # The part is small: a plan of the real size has thousands.
  found = sources.plan([str(folder / 'b.txt')])
  with pytest.raises(UserError, match='b.txt holds a document of more than'):
    list(sources.read(found.parts[0]))
  found = sources.plan([str(folder / 'b.txt')], by_line=True)
  with pytest.raises(UserError, match='b.txt byte 0 has more than 1,048,576'):
    list(sources.read(found.parts[0]))


def test_long_line_within_the_limits_is_read(folder):
  text = 'x' * (5 << 20)
  (folder / 'b.jsonl').write_text(json.dumps({'text': text}))
  assert read(folder)[1] == ['a', text]


@pytest.mark.parametrize(
  'line',
  [
    '[' * 100_000,
    '{"text":' * 100_000,
    '{"text": ' + '[' * 100_000,
    '{"text": "\\ud800"}',
    '{"text": 1e999}',
    '{"text": ' + '9' * 10_000 + '}',
    '{"text": {"text": "x"}}',
    '{"text": null}',
    '{"text": ["x"]}',
    '{"text": true}',
    '"text"',
    'NaN',
    '\0',
    '{"text": "x"}\x00',
  ],
)
def test_odd_json_lines_are_skipped(folder, line):
  (folder / 'b.jsonl').write_text('{"text": "b"}\n' + line + '\n')
  _, documents = read(folder)
  assert documents[:2] == ['a', 'b']
  (skipped,) = documents[2:]
  assert skipped.reason in readers.REASONS and 'line 2' in skipped.where


def test_error_about_fields_is_short(folder):
  fields = {f'{"long" * 1000}\x1b[2J{n}': n for n in range(1000)}
  (folder / 'b.jsonl').write_text(json.dumps(fields))
  assert '\x1b' not in refused(folder)


def test_other_compressions_are_counted(folder):
  (folder / 'b.txt.bz2').write_bytes(bz2.compress(b'x'))
  found, documents = read(folder)
  assert documents == ['a'] and found.ignored == {'.bz2': 1}


def parquet(folder, column):
  """Returns the documents of a Parquet file with one column."""
  pq.write_table(pa.table({'text': column}), folder / 'b.parquet')
  return read(folder)[1][1:]


def test_texts_of_every_arrow_type_are_read(folder):
  texts = ['x', None, 'yy']
  for type in (pa.utf8(), pa.large_utf8(), pa.binary(), pa.string_view()):
    column = pa.array(texts, pa.utf8()).cast(type)
    found = parquet(folder, column)
    assert [found[0], found[2]] == ['x', 'yy']
    assert found[1].reason == readers.NO_TEXT
  assert parquet(folder, pa.array(['x', 'x']).dictionary_encode()) == ['x', 'x']


BAD_TEXT = pa.Array.from_buffers(
  pa.utf8(), 2, pa.array([b'\xff', b'x'], pa.binary()).buffers()
)


@pytest.mark.parametrize(
  'column',
  [
    pa.array([1, 2]),
    pa.array([['x'], ['y']]),
    pa.array([{'a': 'x'}, {'a': 'y'}]),
    pa.array([[('x', 1)]] * 2, pa.map_(pa.utf8(), pa.int64())),
    pa.nulls(2),
    pa.array([2**62] * 2, pa.timestamp('us')),  # no Python date is that late
    pa.ListArray.from_arrays(pa.array([0, 1, 2]), BAD_TEXT),
    pa.array([b'ab'] * 2, pa.binary(2)),
  ],
  ids=lambda column: str(column.type),
)
def test_columns_without_text_are_skipped(folder, column):
  found = parquet(folder, column)
  assert [skipped.reason for skipped in found] == [readers.NO_TEXT] * 2


def test_text_in_parquet_that_is_not_utf8_is_skipped(folder):
  bad, good = parquet(folder, BAD_TEXT)
  assert bad.reason == readers.NOT_UTF8 and good == 'x'


def test_two_columns_of_one_name_are_refused(folder):
  table = pa.Table.from_arrays([pa.array(['x'])] * 2, ['text', 'text'])
  pq.write_table(table, folder / 'b.parquet')
  assert "several columns 'text'" in refused(folder)


def test_repeated_text_in_parquet_takes_little_memory(folder, monkeypatch):
  """A file of 2 KB would unpack to 40 GB."""
  monkeypatch.setattr(unpack, 'MIN_LIMIT_BYTES', 64 << 20)
  repeated = pa.DictionaryArray.from_arrays(
    pa.array([0] * 5000, pa.int32()), pa.array(['x' * (8 << 20)])
  )
  path = folder / 'b.parquet'
  table = pa.table({'text': repeated})
  pq.write_table(table, path, compression='zstd', store_schema=False)
  del table, repeated
  before = pa.total_allocated_bytes()
  (part,) = sources.plan([str(path)]).parts
  with pytest.raises(UserError, match='b.parquet unpacks to more than'):
    for _ in sources.read(part):
      assert pa.total_allocated_bytes() - before < 256 << 20


def test_output_inside_the_source_is_no_input(folder):
  out = folder / 'rows'
  out.mkdir()
  (out / 'manifest.json').write_text('{}')
  (out / 'x.txt').write_text('leftover')
  (folder.parent / 'link').symlink_to(folder)
  for spec in (folder, folder.parent / 'link', folder / '**' / '*.txt'):
    for spelled in (
      out,
      f'{folder}/../in/./rows/',
      folder.parent / 'link' / 'rows',
    ):
      assert read(spec, output=spelled)[1] == ['a']


def test_other_prepared_rows_are_no_input(folder):
  for name in ('train-00000.array_record', '.prepare', '.prepare.lock'):
    rows = folder / f'of {len(name)}'
    rows.mkdir()
    (rows / name).write_text('')
    (rows / 'manifest.json').write_text('{}')
  found, documents = read(folder)
  assert documents == ['a']
  assert found.ignored == {'folders of prepared rows': 3}
  assert read(folder / '**' / '*.[tj]*')[1] == ['a']
  assert 'no text files' in refused(folder / 'of 8')


def test_source_within_the_output_is_refused(folder):
  for output in (folder, folder.parent):
    message = refused(folder, output=output)
    assert '--out' in message and 'inside the source' in message


def test_plan_of_a_sparse_file_is_short(folder):
  with open(folder / 'b.jsonl', 'wb') as f:
    f.truncate((1 << 43) - 1)  # close to the largest file of ext4
  found = sources.plan([str(folder / 'b.jsonl')])
  assert len(found.parts) <= sources.MAX_PARTS
  assert found.parts[-1].stop == (1 << 43) - 1
