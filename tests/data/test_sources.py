"""Parts yield every document of the input once, or a clear error."""

import gzip
import itertools
import json
import os
import pathlib
import pickle
import random
import shutil
import sys
import sysconfig
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
import zstandard

from maskdiff.data import readers, sources
from maskdiff.errors import UserError

CHARACTERS = 'ab cd\t"\\\u00e9\u4e16\U0001f600'


@pytest.fixture
def part_bytes(monkeypatch):
  """Sets the size of all parts."""

  def set_both(size):
    monkeypatch.setattr(sources, 'MIN_PART_BYTES', size)
    monkeypatch.setattr(sources, 'MAX_PART_BYTES', size)

  return set_both


def text_of(rng, longest=60):
  # Most are short; a few are very long.
  length = rng.choice([1, 3, longest, 20 * longest])
  return 'x' + ''.join(rng.choices(CHARACTERS, k=rng.randrange(length)))


def write(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data.encode() if isinstance(data, str) else data)
  return str(path)


def write_jsonl(path, texts, newline='\n'):
  lines = [json.dumps({'id': 7, 'text': t}, ensure_ascii=False) for t in texts]
  return write(path, newline.join([*lines, '']))


def write_parquet(path, columns, row_group_size=None):
  pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
  return str(path)


def documents(plan):
  return [d for part in plan.parts for d in sources.read(part)]


def planned(*specs, **how):
  return sources.plan([str(spec) for spec in specs], **how)


# Formats, compared with a plain reading of the files


@pytest.mark.parametrize('by_line', [False, True])
def test_directory_is_read_in_the_order_of_its_paths(tmp_path, by_line):
  write(tmp_path / 'b' / 'x.md', 'caf\u00e9\r\n')
  write(tmp_path / 'b.txt', 'one\ntwo\n')
  write_jsonl(tmp_path / 'c.jsonl', ['three', 'four'])
  write_parquet(tmp_path / 'd.parquet', {'text': ['five']})
  write(tmp_path / 'e.PY', 'six')
  write(tmp_path / 'c.bin', b'\0')
  write(tmp_path / 'b' / 'site-packages' / 'other.py', 'also ours')
  lines = ['one', 'two'] if by_line else ['one\ntwo\n']
  assert documents(planned(tmp_path, by_line=by_line)) == [
    *lines, 'also ours', 'caf\u00e9\r\n', 'three', 'four', 'five', 'six'
  ]  # fmt: skip


def test_files_are_read_as_they_are(tmp_path):
  text = '\ufeffa\r\nb\rc\u2028\n\n'
  assert documents(planned(write(tmp_path / 'a.txt', text))) == [text]


def test_glob_is_sorted_and_takes_known_files(tmp_path):
  for name in ('c.txt', 'a.txt', 'b/z.txt', 'b.txt', 'd.bin'):
    write(tmp_path / name, name)
  (tmp_path / 'folder.txt').mkdir()
  assert documents(planned(tmp_path / '*')) == ['a.txt', 'b.txt', 'c.txt']
  assert documents(planned(tmp_path / '**' / '**' / '[bz].txt')) == [
    'b.txt', 'b/z.txt'
  ]  # fmt: skip


def test_brackets_in_the_name_of_a_file_are_no_glob(tmp_path):
  path = write(tmp_path / 'a[1].txt', 'x')
  assert documents(planned(path)) == ['x']


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  write(tmp_path / 'a.txt', 'x')
  assert documents(planned('~/a.txt')) == ['x']


@pytest.mark.parametrize('newline', ['\n', '\r\n'])
@pytest.mark.parametrize('end', [True, False])
def test_every_line_is_in_one_part(tmp_path, part_bytes, newline, end):
  rng = random.Random(0)
  for case in range(20):
    lines = [rng.choice(['', ' ', text_of(rng)]) for _ in range(40)] + ['end']
    text = newline.join(lines) + newline * end
    path = write(tmp_path / f'{case}.txt', text)
    part_bytes(rng.choice([1, 2, 7, 64, 300, 10**6]))
    plan = planned(path, by_line=True)
    assert documents(plan) == [line for line in lines if line.strip()]


def test_a_line_end_is_one_line_end(tmp_path):
  path = write(tmp_path / 'a.txt', 'a\r\r\n\rb\rc\u2028\r\n\r\n\n \nd ')
  assert documents(planned(path, by_line=True)) == ['a\r', '\rb\rc\u2028', 'd ']


def test_lines_that_begin_at_the_boundary_are_in_one_part(tmp_path, part_bytes):
  lines = [f'{n:07d}' for n in range(64)]
  path = write(tmp_path / 'a.txt', '\n'.join([*lines, '']))
  for size in (7, 8, 9, 15, 16, 17, 64, 128):
    part_bytes(size)
    plan = planned(path, by_line=True)
    assert len(plan.parts) == -(-512 // size)
    assert documents(plan) == lines


def test_every_json_line_is_in_one_part(tmp_path, part_bytes):
  rng = random.Random(1)
  for case in range(20):
    texts = [text_of(rng) + '\r\n' for _ in range(rng.randrange(1, 40))]
    newline = rng.choice(['\n', '\r\n', '\n\n', '\n \r\n'])
    path = write_jsonl(tmp_path / f'{case}.jsonl', texts, newline)
    part_bytes(rng.choice([1, 2, 30, 64, 300, 10**6]))
    assert documents(planned(path)) == texts


def test_large_file_is_cut_into_equal_parts(tmp_path, part_bytes):
  part_bytes(1000)
  plan = planned(write_jsonl(tmp_path / 'a.jsonl', ['x' * 40] * 200))
  sizes = [part.size for part in plan.parts]
  assert sum(sizes) == os.path.getsize(tmp_path / 'a.jsonl')
  assert max(sizes) - min(sizes) <= 1 and 900 < max(sizes) <= 1000


def in_pieces(data, compress, rng):
  """Returns data compressed in several frames, as parallel tools do."""
  cuts = sorted(rng.choices(range(len(data)), k=3))
  pieces = zip([0, *cuts], [*cuts, len(data)], strict=True)
  return b''.join(compress(data[a:b]) for a, b in pieces)


@pytest.mark.parametrize(
  'suffix, compress', [('gz', gzip.compress), ('zst', zstandard.compress)]
)
@pytest.mark.parametrize('multiple', [False, True])
def test_compressed_files_are_read_whole(
  tmp_path, part_bytes, suffix, compress, multiple
):
  part_bytes(50)
  rng = random.Random(2)
  texts = [text_of(rng, 1000) for _ in range(300)]
  data = pathlib.Path(write_jsonl(tmp_path / 'x', texts)).read_bytes()
  packed = in_pieces(data, compress, rng) if multiple else compress(data)
  for name in (f'a.jsonl.{suffix}', f'b.json.{suffix}'):
    plan = planned(write(tmp_path / name, packed))
    assert len(plan.parts) == 1
    assert documents(plan) == texts
  lines = [f'line {n}' for n in range(10_000)]
  data = '\r\n'.join(lines).encode()
  packed = in_pieces(data, compress, rng) if multiple else compress(data)
  path = write(tmp_path / f'c.txt.{suffix}', packed)
  assert documents(planned(path, by_line=True)) == lines


def test_parquet_is_cut_between_row_groups(tmp_path, part_bytes):
  rng = random.Random(3)
  texts = [text_of(rng) for _ in range(1000)]
  path = write_parquet(
    tmp_path / 'a.parquet', {'id': range(1000), 'body': texts}, 90
  )
  for size, parts in [(1, 12), (os.path.getsize(path) // 3, 4), (10**6, 1)]:
    part_bytes(size)
    plan = planned(path, text_key='body')
    assert len(plan.parts) == parts
    assert documents(plan) == texts
    total = sum(part.size for part in plan.parts)
    assert total == os.path.getsize(path)


@pytest.mark.parametrize('kind', [pa.large_string(), pa.binary()])
def test_parquet_columns_that_hold_text(tmp_path, kind):
  column = pa.array(['a', None, '\u00e9']).cast(kind)
  for text in (column, column.dictionary_encode()):
    path = write_parquet(tmp_path / 'a.parquet', {'text': text})
    skipped = readers.Skipped(readers.NO_TEXT, f'{path} row 1')
    assert documents(planned(path)) == ['a', skipped, '\u00e9']


class MaskdiffTiny(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict({'text': text, 'url': text})
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, _):
    return {'train': self._generate_examples(500)}

  def _generate_examples(self, count):
    for n in range(count):
      text = {7: b'caf\xe9', 8: ''}.get(n, f'{n} caf\u00e9\0')
      yield n, {'text': text, 'url': str(n)}


@pytest.fixture(scope='module')
def tfds_folder(tmp_path_factory):
  """Returns a prepared dataset of 500 shuffled records in 3 shards."""
  tfds.disable_progress_bar()
  builder = MaskdiffTiny(
    data_dir=tmp_path_factory.mktemp('tfds'), file_format='array_record'
  )
  three = tfds.download.DownloadConfig(num_shards=3)
  builder.download_and_prepare(download_config=three)
  return pathlib.Path(builder.data_dir)


@pytest.mark.slow
def test_tfds_is_cut_into_ranges_of_records(tfds_folder, part_bytes):
  expected = tfds.builder_from_directory(tfds_folder).as_data_source('train')
  expected = [record['text'] for record in expected]
  assert len(expected) == 500
  for size, least in [(100, 400), (10_000, 6), (10**9, 3)]:
    part_bytes(size)
    plan = planned(f'tfds:{tfds_folder}:train')
    assert len(plan.parts) >= least
    found = documents(plan)
    reasons = [d.reason for d in found if isinstance(d, readers.Skipped)]
    assert sorted(reasons) == [readers.EMPTY, readers.NOT_UTF8]
    assert [d for d in found if isinstance(d, str)] == [
      text.decode() for text in expected if text and text != b'caf\xe9'
    ]
    total = sum(path.stat().st_size for path in tfds_folder.glob('*train*'))
    assert sum(part.size for part in plan.parts) == total


# Parts: sizes, memory and dependencies


@pytest.mark.parametrize(
  'input_bytes, target',
  [(10**6, 4 << 20), (256 * 10**8, 10**8), (10**13, 1 << 30)],
)
def test_size_of_a_part_follows_from_the_size_of_the_input(
  tmp_path, input_bytes, target
):
  for name in 'ab':
    with open(tmp_path / f'{name}.jsonl', 'wb') as file:
      file.truncate(input_bytes // 2)  # takes no space on disk
  sizes = [part.size for part in planned(tmp_path).parts]
  assert sum(sizes) == input_bytes
  assert max(sizes) <= target
  assert min(sizes) > 0.9 * min(target, input_bytes)


@pytest.mark.parametrize('suffix', ['txt', 'jsonl', 'jsonl.gz', 'parquet'])
def test_small_files_are_grouped(tmp_path, part_bytes, suffix):
  rng = random.Random(4)
  for n in range(200):
    # The packed ones cannot be cut, so what is in them does not matter here.
    data = rng.randbytes(rng.choice([0, 10, 100, 1500]))
    if suffix == 'parquet':
      write_parquet(tmp_path / f'{n:03d}.{suffix}', {'text': [data]})
    else:
      write(tmp_path / f'{n:03d}.{suffix}', data)
  part_bytes(10_000)
  parts = planned(tmp_path).parts
  paths = [path for part in parts for path in part.paths]
  assert paths == sorted(map(str, tmp_path.iterdir()))
  sizes = [part.size for part in parts]
  assert sizes == [sum(map(os.path.getsize, part.paths)) for part in parts]
  assert max(sizes) <= 10_000
  assert all(a + b > 10_000 for a, b in itertools.pairwise(sizes))


def test_sizes_add_up_over_formats(tmp_path, part_bytes):
  part_bytes(100)
  write(tmp_path / 'a.md', 'x' * 1000)
  write(tmp_path / 'b.txt', 'x\n' * 1000)
  write_jsonl(tmp_path / 'c.jsonl', ['x'] * 100)
  write_parquet(tmp_path / 'd.parquet', {'text': ['x'] * 100}, 10)
  parts = planned(tmp_path, by_line=True).parts
  total = sum(map(os.path.getsize, tmp_path.iterdir()))
  assert sum(part.size for part in parts) == total


def test_parts_travel_to_other_processes(tmp_path):
  plan = planned(write(tmp_path / 'a.txt', 'x'))
  assert pickle.loads(pickle.dumps(plan)) == plan
  assert hash(plan.parts[0])


def test_planning_opens_no_text(tmp_path, monkeypatch):
  write(tmp_path / 'a.txt', 'x')
  write(tmp_path / 'b.jsonl', 'x')
  write(tmp_path / 'c.jsonl.zst', 'x')

  def opened(*_):
    raise AssertionError

  with monkeypatch.context() as patch:
    patch.setattr('builtins.open', opened)
    patch.setitem(sys.modules, 'zstandard', None)
    assert len(planned(tmp_path, by_line=True).parts) == 2


@pytest.mark.slow
def test_reading_holds_little_of_a_file(tmp_path):
  rng = random.Random(6)
  texts = [rng.randbytes(500).hex() for _ in range(15_000)]
  path = pathlib.Path(write_jsonl(tmp_path / 'a.jsonl', texts))
  write(tmp_path / 'b.jsonl.gz', gzip.compress(path.read_bytes(), 1))
  write(tmp_path / 'c.jsonl.zst', zstandard.compress(path.read_bytes()))
  write_parquet(tmp_path / 'd.parquet', {'text': texts})
  size = path.stat().st_size
  for file in sorted(tmp_path.iterdir()):
    plan = planned(file)
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    for part in plan.parts:
      for _ in sources.read(part):
        arrow_peak = pa.total_allocated_bytes() - arrow
        assert arrow_peak < size / 2, file
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 2, file


def fingerprint(*specs, **how):
  return planned(*specs, **how).fingerprint


def test_plan_depends_on_the_input_alone(tmp_path, monkeypatch):
  write(tmp_path / 'a' / 'x.txt', 'x' * 100)
  write_jsonl(tmp_path / 'a' / 'b' / 'y.jsonl', ['y'])
  shutil.copytree(tmp_path / 'a', tmp_path / 'copy')
  plan = planned(tmp_path / 'a')
  monkeypatch.chdir(tmp_path)
  relative = planned('a')
  assert relative.parts == plan.parts
  assert len(plan.fingerprint) == 16 and int(plan.fingerprint, 16)
  same = {plan.fingerprint, relative.fingerprint, fingerprint('copy')}
  assert len(same) == 1
  monkeypatch.chdir(tmp_path / 'a')
  assert fingerprint('.') == plan.fingerprint
  assert fingerprint('x.txt') == fingerprint('../copy/x.txt')
  assert fingerprint('b/*.jsonl') == fingerprint('../copy/b/*.jsonl')


def test_fingerprint_changes_with_the_input(tmp_path, part_bytes):
  write(tmp_path / 'x.txt', 'x' * 100)
  write_jsonl(tmp_path / 'y.jsonl', ['y'])
  seen = [fingerprint(tmp_path)]

  seen.append(fingerprint(tmp_path, by_line=True))
  seen.append(fingerprint(tmp_path, text_key='body'))
  seen.append(fingerprint(tmp_path / 'x.txt'))
  seen.append(fingerprint(tmp_path / 'x.txt', tmp_path / 'y.jsonl'))
  seen.append(fingerprint(tmp_path / 'y.jsonl', tmp_path / 'x.txt'))
  part_bytes(10)
  seen.append(fingerprint(tmp_path))
  write(tmp_path / 'x.txt', 'x' * 101)
  seen.append(fingerprint(tmp_path))
  write(tmp_path / 'z.txt', '')
  seen.append(fingerprint(tmp_path))
  (tmp_path / 'z.txt').rename(tmp_path / 'w.txt')
  seen.append(fingerprint(tmp_path))
  # The directory, and its files one by one, are the same input.
  assert seen.pop(4) == seen[0]
  assert len(set(seen)) == len(seen)


def test_text_key_does_not_matter_to_text(tmp_path):
  path = write(tmp_path / 'x.txt', 'x')
  assert fingerprint(path) == fingerprint(path, text_key='body')


def test_description_names_the_sources(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write(tmp_path / 'a.txt', 'x')
  version = f'{sys.version_info.major}.{sys.version_info.minor}'
  assert planned('embedded', 'a.txt').description == (
    f'Python {version} standard library + a.txt'
  )


def test_embedded_corpus_is_the_library_without_packages():
  pairs = list(sources.embedded())
  names = [name for name, _ in pairs]
  assert names == sorted(names) and len(names) > 500
  assert 'json/decoder.py' in names
  assert not any('site-packages' in name for name in names)
  plan = planned('embedded')
  found = [d for d in documents(plan) if isinstance(d, str)]
  assert found == [text for _, text in pairs]
  assert 1 < len(plan.parts) < 20


def test_embedded_corpus_may_be_anywhere(tmp_path, monkeypatch):
  library = pathlib.Path(sysconfig.get_paths()['stdlib'])
  seen = set()
  for place in ('here', 'there'):
    shutil.copytree(library / 'json', tmp_path / place / 'json')
    paths = {'stdlib': str(tmp_path / place)}
    monkeypatch.setattr(sysconfig, 'get_paths', lambda paths=paths: paths)
    seen.add(fingerprint('embedded'))
  assert len(seen) == 1

  paths['stdlib'] = str(tmp_path / 'python.zip')
  for call in (sources.embedded, lambda: planned('embedded')):
    with pytest.raises(UserError, match='python.zip: use a Python'):
      call()


# Unusable documents are skipped and reported.


def test_unusable_lines_are_skipped(tmp_path):
  bad = [
    (b'{"text": "caf\xe9"}', readers.NOT_UTF8),
    (b'{"text": "\xed\xa0\x80"}', readers.NOT_UTF8),
    (b'{"text": "x"', readers.NOT_JSON),
    (b'{"text": "x"} {}', readers.NOT_JSON),
    (b'[' * 100_000, readers.NOT_JSON),
    (b'{"text": ' + b'1' * 10_000 + b'}', readers.NOT_JSON),
    (b'{"text": null}', readers.NO_TEXT),
    (b'{"text": ["x"]}', readers.NO_TEXT),
    (b'"text"', readers.NO_TEXT),
    (b'{"text": ""}', readers.EMPTY),
    (b'{"text": "\\ud800"}', readers.NOT_UNICODE),
  ]
  lines = [b'\xef\xbb\xbf{"text": "first"}']
  for line, _ in bad:
    lines += [b'', line]
  lines.append(b'{"text": "\\ud83d\\ude00 \\u2028\\n\\u0000"}')
  path = write(tmp_path / 'a.jsonl', b'\n'.join(lines))
  first, *skipped, last = documents(planned(path))
  assert (first, last) == ('first', '\U0001f600 \u2028\n\0')
  assert skipped == [
    readers.Skipped(reason, f'{path} line {3 + 2 * n}')
    for n, (_, reason) in enumerate(bad)
  ]
  assert {reason for _, reason in bad} == set(readers.REASONS)


def test_unusable_files_are_skipped(tmp_path):
  latin = write(tmp_path / 'a.txt', b'latin \xe9')
  empty = write(tmp_path / 'b.txt', '')
  write(tmp_path / 'c.txt', 'x')
  assert documents(planned(tmp_path)) == [
    readers.Skipped(readers.NOT_UTF8, latin),
    readers.Skipped(readers.EMPTY, empty),
    'x',
  ]
  assert documents(planned(tmp_path, by_line=True)) == [
    readers.Skipped(readers.NOT_UTF8, f'{latin} line 1'),
    'x',
  ]


@pytest.mark.parametrize('size', [1, 10**6])
def test_unusable_rows_are_skipped(tmp_path, part_bytes, size):
  part_bytes(size)
  latin = pa.array([b'a', b'\xe9', b'', b'b'])
  strings = pa.Array.from_buffers(pa.string(), 4, latin.buffers())
  path = write_parquet(tmp_path / 'a.parquet', {'text': strings}, 2)
  assert documents(planned(path)) == [
    'a',
    readers.Skipped(readers.NOT_UTF8, f'{path} row 1'),
    readers.Skipped(readers.EMPTY, f'{path} row 2'),
    'b',
  ]


def test_places_in_a_file_that_was_cut_are_bytes(tmp_path, part_bytes):
  part_bytes(20)
  lines = [b'good', b'bad \xe9', b'\xe9 bad', b'good', b'\xe9'] * 20
  path = write(tmp_path / 'a.txt', b'\n'.join(lines))
  data = pathlib.Path(path).read_bytes()
  found = documents(planned(path, by_line=True))
  for line, document in zip(lines, found, strict=True):
    if line != b'good':
      file, unit, at = document.where.rsplit(' ', 2)
      assert (file, unit) == (path, 'byte')
      assert data[int(at) :].split(b'\n')[0] == line


# User errors


def refuses(match, *specs, **how):
  with pytest.raises(UserError, match=match) as caught:
    documents(planned(*specs, **how))
  assert '\n' not in str(caught.value)


def test_missing_source_is_named(tmp_path):
  refuses('no file or directory .*absent: correct', tmp_path / 'absent')
  refuses(r'no text files in .*/\*.txt: give', tmp_path / '*.txt')
  refuses('no text files in .*: give .* .txt, .md', tmp_path)
  refuses('no text in : give', *[])


def test_unknown_suffixes_are_refused(tmp_path):
  path = write(tmp_path / 'a.warc', 'x')
  refuses(
    r'a.warc: .* end in .txt, .md, .py, .json, .ndjson, .jsonl, .parquet', path
  )
  refuses('give files that end in .txt', tmp_path)


def test_ignored_files_are_counted(tmp_path):
  write(tmp_path / 'a' / 'b.txt', 'text')
  for name in ('c.bin', 'd.bin', 'README'):
    write(tmp_path / 'a' / name, 'x')
  write(tmp_path / 'elsewhere' / 'e.txt', 'text')
  (tmp_path / 'a' / 'link').symlink_to(tmp_path / 'elsewhere')
  found = sources.plan([str(tmp_path / 'a')])
  assert documents(found) == ['text']
  assert found.ignored == {'.bin': 2, 'no suffix': 1, 'linked folders': 1}


def test_compressed_text_is_read_whole_or_by_line(tmp_path):
  write(tmp_path / 'a.txt.gz', gzip.compress(b'a\nb'))
  assert documents(planned(tmp_path)) == ['a\nb']
  assert documents(planned(tmp_path, by_line=True)) == ['a', 'b']


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.jsonl.gz'])
def test_nothing_but_empty_files_is_refused(tmp_path, name):
  empty = write(tmp_path / name, '')
  refuses('no text in .*: give files with text', empty)
  more = write_jsonl(tmp_path / 'b.jsonl', ['x'])
  found = documents(planned(empty, more))
  assert [d for d in found if isinstance(d, str)] == ['x']


def test_buckets_are_to_be_mounted():
  refuses(
    'gs://bucket/c4 is not a local path: mount .* gcsfuse', 'gs://bucket/c4'
  )
  refuses('not a local path', 'tfds:gs://bucket/c4/en/3.1.0:train')


def test_an_input_counts_once(tmp_path):
  path = pathlib.Path(write(tmp_path / 'a' / 'x.txt', 'x'))
  refuses('x.txt is named twice .* name it once', path, path)
  refuses('named twice', path.parent, path)
  refuses('named twice', path.parent, tmp_path / '*' / '*.txt')
  os.symlink(path.parent, tmp_path / 'folder')
  refuses('named twice', path, tmp_path / 'folder')
  os.symlink(path, tmp_path / 'y.txt')
  refuses('named twice', path, tmp_path / 'y.txt')
  refuses('named twice', 'embedded', 'embedded')


def test_link_to_a_file_of_the_same_folder_counts_once(tmp_path, monkeypatch):
  """As in the standard library of Debian."""
  write(tmp_path / 'b' / 'x.py', 'x = 1')
  (tmp_path / 'a.py').symlink_to('b/x.py')
  for spec in (str(tmp_path), 'embedded'):
    monkeypatch.setattr(
      sources.sysconfig, 'get_paths', lambda: {'stdlib': str(tmp_path)}
    )
    paths = [p for part in sources.plan([spec]).parts for p in part.paths]
    assert paths == [str(tmp_path / 'b' / 'x.py')]


def test_link_to_nothing_is_named(tmp_path):
  write(tmp_path / 'a.txt', 'x')
  os.symlink(tmp_path / 'absent', tmp_path / 'b.txt')
  refuses('cannot read .*b.txt .No such file.*: replace it', tmp_path)


def test_wrong_text_key_lists_the_fields(tmp_path, tfds_folder):
  path = write_jsonl(tmp_path / 'a.jsonl', ['x'])
  keys = "'id', 'text'.*--text_key"
  refuses(f"a.jsonl line 1 .*'body'.*{keys}", path, text_key='body')
  path = write_parquet(tmp_path / 'a.parquet', {'id': ['x'], 'text': ['x']})
  refuses(f"a.parquet .*'body'.*{keys}", path, text_key='body')
  spec = f'tfds:{tfds_folder}:train'
  refuses("1.0.0 .*'body'.*'text', 'url'.*--text_key", spec, text_key='body')


@pytest.mark.parametrize(
  'suffix, compress',
  [
    ('gz', gzip.compress),
    ('zst', zstandard.ZstdCompressor(write_checksum=True).compress),
  ],
)
def test_damaged_compressed_files_are_named(tmp_path, suffix, compress):
  rng = random.Random(5)
  texts = [rng.randbytes(50).hex() for _ in range(2000)]
  data = pathlib.Path(write_jsonl(tmp_path / 'x', texts)).read_bytes()
  packed = compress(data)
  middle = len(packed) // 2
  flipped = packed[:middle] + bytes(64) + packed[middle + 64 :]
  two = packed + packed[:middle]
  for bad in (packed[:-1], packed[:middle], flipped, two, b'plain text'):
    path = write(tmp_path / f'a.jsonl.{suffix}', bad)
    refuses(f'cannot read .*a.jsonl.{suffix} .*: replace it', path)


def test_damaged_parquet_is_named(tmp_path):
  texts = [str(n) * 50 for n in range(2000)]
  path = write_parquet(tmp_path / 'a.parquet', {'text': texts})
  data = pathlib.Path(path).read_bytes()
  header = b'PAR1' + b'\xff' * 200 + data[204:]
  for bad in (b'', b'plain text', data[:-1], data[: len(data) // 2], header):
    write(tmp_path / 'a.parquet', bad)
    refuses('cannot read .*a.parquet .*: replace it', path, 'embedded')


def test_damaged_tfds_is_named(tmp_path, tfds_folder):
  folder = tmp_path / 'tiny' / '1.0.0'
  shutil.copytree(tfds_folder, folder)
  spec = f'tfds:{folder}:train'
  shard = sorted(folder.glob('*train*'))[1]
  data = shard.read_bytes()
  flipped = data[:100] + bytes(64) + data[164:]
  for bad in (b'', data[:-100], data[: len(data) // 2], flipped):
    shard.write_bytes(bad)
    refuses(f'cannot read .*{shard.name} .*: replace it', spec)
  shard.unlink()
  refuses(f'cannot read .*{shard.name}.* .No such file', spec)


def test_tfds_of_another_kind_is_refused(tmp_path, tfds_folder):
  refuses('no prepared dataset in .*: write tfds:DIR:SPLIT', 'tfds:train')
  refuses('no prepared dataset in /absent: write', 'tfds:/absent:train')
  refuses('choose one of train', f'tfds:{tfds_folder}:training')
  shutil.copytree(tfds_folder, tmp_path / 'tfrecord')
  info = tmp_path / 'tfrecord' / 'dataset_info.json'
  write(info, info.read_text().replace('"array_record"', '"tfrecord"'))
  spec = f'tfds:{info.parent}:train'
  refuses("format tfrecord: .* file_format='array_record'", spec)


@pytest.mark.parametrize(
  'name', ['txt', 'jsonl', 'jsonl.gz', 'parquet', 'tfds']
)
def test_change_after_planning_is_noticed(tmp_path, tfds_folder, name):
  spec = path = tmp_path / f'a.{name}'
  if name == 'tfds':
    shutil.copytree(tfds_folder, path)
    spec, path = f'tfds:{path}:train', sorted(path.glob('*train*'))[0]
  elif name == 'parquet':
    write_parquet(path, {'text': ['x']})
  else:
    text = json.dumps({'text': 'x'}).encode()
    write(path, gzip.compress(text) if name.endswith('gz') else text)
  plan = planned(spec)
  assert documents(plan)
  size = path.stat().st_size
  with open(path, 'ab') as file:
    file.write(b'more')
  changed = f'{path.name} changed from {size} to {size + 4} bytes'
  with pytest.raises(UserError, match=changed):
    documents(plan)
  path.unlink()
  with pytest.raises(UserError, match=f'cannot read .*{path.name}.* .No such'):
    documents(plan)


@pytest.mark.parametrize(
  'package, module',
  [
    ('pyarrow', 'pyarrow.parquet'),
    ('zstandard', 'zstandard'),
    ('tensorflow_datasets', 'tensorflow_datasets'),
  ],
)
def test_missing_packages_are_named(
  tmp_path, tfds_folder, monkeypatch, package, module
):
  spec = {
    'pyarrow': write_parquet(tmp_path / 'a.parquet', {'text': ['x']}),
    'zstandard': write(tmp_path / 'a.jsonl.zst', zstandard.compress(b'{}')),
    'tensorflow_datasets': f'tfds:{tfds_folder}:train',
  }[package]
  monkeypatch.setitem(sys.modules, module, None)
  refuses(f'{package} is not installed .*-r requirements-data.txt', spec)


def test_one_object_without_the_field_is_a_bad_document(tmp_path):
  path = write(tmp_path / 'a.jsonl', '{"text": "x"}\n{"error": 1}\n')
  (part,) = planned(path).parts
  assert list(sources.read(part)) == [
    'x',
    readers.Skipped(readers.NO_TEXT, f'{path} line 2'),
  ]
