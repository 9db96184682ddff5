"""Rows with columns are written completely, or not at all."""

import errno
import itertools
import json
import os
import pathlib
import re

import numpy as np
import pytest

from maskdiff.data import pipeline, records, row_reader, row_writer
from maskdiff.data import rows as rows_lib
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError

LENGTH, FIRST_ID = 12, 10  # ids below FIRST_ID are special


def make_rows(rows, columns=rows_lib.COLUMNS, seed=0):
  """Returns Rows of random text; with `doc`, some documents and padding."""
  rng = np.random.default_rng(seed)
  shape = rows, LENGTH
  doc = np.cumsum(rng.random(shape) < 0.2, axis=1)
  doc[:, LENGTH - 3 :][rng.random(rows) < 0.5] = -1
  return Rows(
    rng.integers(FIRST_ID, 4000, shape),
    doc if 'doc' in columns else None,
    rng.random(shape) < 0.6 if 'answer' in columns else None,
  )


def cut(rows, at):
  """Returns blocks of rows that start at these rows."""
  parts = [np.split(x, at) for x in rows if x is not None]
  columns = ('tokens', *rows.columns)
  return [
    Rows(**dict(zip(columns, block, strict=True)))
    for block in zip(*parts, strict=True)
  ]


def write(directory, blocks, tokenizer, **options):
  options = dict(source='a test') | options
  return row_writer.write_rows(
    directory, {'train': blocks}, tokenizer, **options
  )


def read(directory, split='train'):
  manifest = records.read_manifest(directory)
  source = row_reader.RowSource(directory, manifest, split)
  return source.read(range(len(source)))


def assert_same_values(rows, expected):
  assert rows.columns == expected.columns
  for column, other in zip(rows, expected, strict=True):
    if other is not None:
      np.testing.assert_array_equal(column, other)


def flip_bit(path, other):
  """Flips a bit of the first byte in which a file differs from `other`."""
  content = bytearray(path.read_bytes())
  pairs = enumerate(zip(content, other, strict=False))
  content[next(at for at, (a, b) in pairs if a != b)] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  'columns',
  [c for n in range(3) for c in itertools.combinations(rows_lib.COLUMNS, n)],
  ids='-'.join,
)
def test_all_columns_come_back_as_written(columns, tokenizer, tmp_path):
  train, heldout = make_rows(40, columns), make_rows(7, columns, seed=1)
  manifest = row_writer.write_rows(
    tmp_path / 'new' / 'rows',
    {'heldout': iter([heldout]), 'train': cut(train, [3, 3, 20])},
    tokenizer,
    source='a test',
    settings={'template': 'chat'},
    shard_rows=15,
  )
  directory = tmp_path / 'new' / 'rows'
  assert records.read_manifest(directory) == manifest
  assert [s.rows for s in manifest.splits['train'].shards] == [15, 15, 10]
  assert manifest.source == 'a test' and manifest.settings['template'] == 'chat'
  assert manifest.eos_id == tokenizer.eos_id
  assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
  assert tokenizer_lib.load(directory).fingerprint == tokenizer.fingerprint
  row_reader.verify(directory, manifest, rows='all')
  assert_same_values(read(directory), train)
  assert_same_values(read(directory, 'heldout'), heldout)
  names = {path.name for path in directory.iterdir()}
  shards = [s.file for x in manifest.splits.values() for s in x.shards]
  assert names == {'manifest.json', 'tokenizer.model', *shards}


def test_rows_of_tokens_only_have_the_format_of_earlier_code(
  tokenizer, tmp_path
):
  rows = make_rows(5, ())
  write(tmp_path / 'rows', [rows], tokenizer)
  fields = json.loads((tmp_path / 'rows' / 'manifest.json').read_text())
  assert fields['format_version'] == 2 and 'columns' not in fields
  (shard,) = fields['splits']['train']['shards']
  tokens = rows.tokens.astype(np.uint16)
  expected = records.write_shard(tmp_path / 'train', [tokens])
  assert shard['digest'] == expected.digest
  other = tmp_path / 'rows' / shard['file']
  assert other.read_bytes() == (tmp_path / 'train').read_bytes()


@pytest.mark.parametrize('sizes', [[1] * 30, [29, 1], [0, 7, 0, 23]])
def test_files_do_not_depend_on_block_sizes(sizes, tokenizer, tmp_path):
  rows = make_rows(30)
  blocks = cut(rows, np.cumsum(sizes)[:-1])
  write(tmp_path / 'whole', [rows], tokenizer, shard_rows=8)
  write(tmp_path / 'parts', blocks, tokenizer, shard_rows=8)
  for path in (tmp_path / 'whole').iterdir():
    assert path.read_bytes() == (tmp_path / 'parts' / path.name).read_bytes()


@pytest.mark.parametrize(
  'columns', [(), ('doc',), ('answer',), ('doc', 'answer')]
)
def test_statistics_count_tokens_with_a_loss(columns, tokenizer, tmp_path):
  rows = make_rows(6, columns)
  rows.tokens[:, 4] = tokenizer.eos_id
  split = write(tmp_path / 'rows', [rows], tokenizer).splits['train']
  learned, documents = [], 0
  for r in range(6):
    doc = [0] * LENGTH if rows.doc is None else rows.doc[r].tolist()
    answer = [True] * LENGTH if rows.answer is None else rows.answer[r].tolist()
    learned += [
      int(t)
      for t, d, a in zip(rows.tokens[r], doc, answer, strict=True)
      if d >= 0 and a
    ]
    documents += 1 if rows.doc is None else len(set(doc) - {-1})
  assert (split.rows, split.tokens) == (6, len(learned))
  assert split.documents == documents  # without doc, one eos in each row
  assert split.text_bytes == sum(len(tokenizer.piece(t)) for t in learned)
  counts = np.unique(learned, return_counts=True)[1]
  p = counts / counts.sum()
  assert split.unigram_entropy_nats == pytest.approx(-(p * np.log(p)).sum())


def test_damaged_row_is_replaced_in_all_columns(tokenizer, tmp_path, capsys):
  rows = make_rows(8)
  write(tmp_path / 'rows', [rows], tokenizer)
  path = tmp_path / 'rows' / 'train-00000.array_record'
  tokens = rows.tokens.copy()
  tokens[5] += 1
  other = rows._replace(tokens=tokens)
  write(tmp_path / 'other', [other], tokenizer)
  flip_bit(path, (tmp_path / 'other' / path.name).read_bytes())
  with pytest.raises(UserError, match='row 5 of shard'):
    read(tmp_path / 'rows')
  replaced = rows_lib.map_columns(lambda x: x[[0, 1, 2, 3, 4, 6, 6, 7]], rows)
  manifest = records.read_manifest(tmp_path / 'rows')
  source = row_reader.RowSource(tmp_path / 'rows', manifest, 'train')
  for length in (LENGTH, 2 * LENGTH, LENGTH // 2):
    samples = pipeline.Samples(source, length, max_damaged=1)
    joined = rows_lib.join(replaced, max(1, length // LENGTH))
    expected = rows_lib.map_columns(
      lambda x, n=length: x.reshape(-1, n), joined
    )
    assert_same_values(samples.read(np.arange(len(samples))), expected)
  assert 'replaced by the next row' in capsys.readouterr().err


def test_columns_are_part_of_the_fingerprint(tokenizer, tmp_path):
  found = {}
  for columns in ((), ('doc',), ('doc', 'answer')):
    directory = tmp_path / '-'.join(('rows', *columns))
    manifest = write(directory, [make_rows(9, columns)], tokenizer)
    dataset = pipeline.Dataset('rows', str(directory), 1.0, manifest)
    found[columns] = pipeline.fingerprint([dataset], seed=0, length=LENGTH)
  assert 'columns' not in found[()]
  assert found['doc',]['columns'] == [['doc']]
  assert found['doc', 'answer']['columns'] == [['doc', 'answer']]
  assert len({json.dumps(f['rows']) for f in found.values()}) == 3


# Bad input


def changed(**columns):
  return make_rows(4)._replace(**columns)


def with_value(name, value):
  """Returns rows in which one column has this value at row 2, position 7."""
  column = getattr(make_rows(4), name).copy()
  column[2, 7] = value
  return changed(**{name: column})


BAD = {
  'bare array': (lambda: make_rows(4).tokens, 'a block is ndarray, not Rows'),
  'one row': (lambda: Rows(np.arange(12)), r'shape \(12,\), not \[R, L\]'),
  'no tokens': (lambda: Rows(np.zeros((3, 0), int)), r'shape \(3, 0\)'),
  'tokens none': (lambda: changed(tokens=None), r'shape \(\)'),
  'ragged tokens': (
    lambda: Rows([[20, 21], [22]]),
    'tokens is not an array .*inhomogeneous',
  ),
  'float tokens': (
    lambda: changed(tokens=np.ones((4, LENGTH))),
    'tokens has the dtype float64, not integers',
  ),
  'short doc': (
    lambda: changed(doc=np.zeros((4, 5), int)),
    r'doc has the shape \(4, 5\), tokens have \(4, 12\)',
  ),
  'fewer answers': (
    lambda: changed(answer=np.ones((3, LENGTH), bool)),
    r'answer has the shape \(3, 12\)',
  ),
  'answer of integers': (
    lambda: changed(answer=np.ones((4, LENGTH), int)),
    'answer has the dtype int64, not bool',
  ),
  'negative token': (
    lambda: with_value('tokens', -1),
    'tokens is -1 at position 7 of row 2 .* at least 0 and below 4096',
  ),
  'token outside the vocabulary': (
    lambda: with_value('tokens', 4096),
    'tokens is 4096 at position 7 of row 2',
  ),
  'huge token': (lambda: with_value('tokens', 1 << 40), f'tokens is {1 << 40}'),
  'mask token': (lambda: with_value('tokens', 4), 'the mask token 4'),
  'negative doc': (
    lambda: with_value('doc', -2),
    'doc is -2 at position 7 of row 2 .* at least -1 and below 12',
  ),
  'large doc': (lambda: with_value('doc', 12), 'doc is 12 at position 7'),
  'nothing to learn': (
    lambda: changed(answer=np.zeros((4, LENGTH), bool)),
    "split 'train' has no text to learn",
  ),
  'all padding': (
    lambda: changed(doc=np.full((4, LENGTH), -1)),
    "split 'train' has no text to learn",
  ),
}


def check_refused(error, directory):
  assert '\n' not in str(error.value)
  assert str(directory) in str(error.value)
  assert not directory.exists()


@pytest.mark.parametrize('name', BAD)
def test_bad_block_is_refused_and_nothing_remains(name, tokenizer, tmp_path):
  assert tokenizer.mask_id == 4 and tokenizer.vocab_size == 4096
  make, message = BAD[name]
  with pytest.raises(UserError, match=message) as e:
    write(tmp_path / 'rows', [make()], tokenizer)
  check_refused(e, tmp_path / 'rows')


@pytest.mark.parametrize(
  'second, message',
  [
    (Rows(np.full((2, 8), 20)), '8 tokens, but earlier rows have 12'),
    (make_rows(2, ('doc',)), 'tokens, doc, but earlier rows have .* answer;'),
    (with_value('doc', 99), r'train rows from 5: doc is 99 .* of the block'),
  ],
)
def test_bad_later_block_is_refused(second, message, tokenizer, tmp_path):
  with pytest.raises(UserError, match=message) as e:
    write(tmp_path / 'rows', [make_rows(5), second], tokenizer)
  check_refused(e, tmp_path / 'rows')


def test_splits_have_the_same_columns(tokenizer, tmp_path):
  splits = {'train': [make_rows(3)], 'heldout': [make_rows(3, ('doc',))]}
  with pytest.raises(UserError, match='heldout rows from 0: the columns') as e:
    row_writer.write_rows(tmp_path / 'rows', splits, tokenizer, source='')
  check_refused(e, tmp_path / 'rows')


@pytest.mark.parametrize('blocks', [[], [make_rows(0)]])
def test_empty_input_is_refused(blocks, tokenizer, tmp_path):
  with pytest.raises(UserError, match='there is no row to write') as e:
    write(tmp_path / 'rows', blocks, tokenizer)
  check_refused(e, tmp_path / 'rows')


def test_unknown_split_is_refused(tokenizer, tmp_path):
  with pytest.raises(UserError, match="'test' is not a split") as e:
    row_writer.write_rows(
      tmp_path / 'rows', {'test': [make_rows(2)]}, tokenizer, source=''
    )
  check_refused(e, tmp_path / 'rows')


def test_directory_is_complete_at_once_or_not_at_all(tokenizer, tmp_path):
  directory = tmp_path / 'rows'
  directory.mkdir()

  def blocks(error=None):
    yield make_rows(20)
    assert [path.name for path in directory.iterdir()] == ['.unfinished']
    if error:
      raise error
    yield make_rows(20)

  for error in (IndexError('list index'), KeyboardInterrupt()):
    with pytest.raises(type(error)):
      write(directory, blocks(error), tokenizer, shard_rows=8)
    assert not list(directory.iterdir())
  write(directory, blocks(), tokenizer, shard_rows=8)
  assert len(read(directory).tokens) == 40


@pytest.mark.parametrize('moved', range(3))
def test_failed_move_leaves_nothing(tokenizer, tmp_path, monkeypatch, moved):
  """Also if the last move, that of the manifest, fails after the rename."""
  replace, calls = records.replace, []

  def fails(unfinished, path):
    if '.unfinished' in str(path):  # a write, before the moves
      return replace(unfinished, path)
    calls.append(path)
    if len(calls) <= moved:
      return replace(unfinished, path)
    os.replace(unfinished, path)
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  monkeypatch.setattr(records, 'replace', fails)
  folder = tmp_path / 'rows'
  folder.mkdir()
  with pytest.raises(UserError, match='Input/output error'):
    write(folder, [make_rows(3)], tokenizer)
  assert len(calls) == moved + 1
  assert list(folder.iterdir()) == []


def test_directory_that_is_not_empty_is_refused(tokenizer, tmp_path):
  directory = tmp_path / 'rows'
  write(directory, [make_rows(3)], tokenizer)
  before = (directory / 'manifest.json').read_bytes()
  with pytest.raises(UserError, match=r'rows holds files \(manifest.json'):
    write(directory, [make_rows(4)], tokenizer)
  assert (directory / 'manifest.json').read_bytes() == before
  killed = tmp_path / 'killed'
  (killed / '.unfinished').mkdir(parents=True)
  with pytest.raises(UserError, match='an unfinished write .*delete') as e:
    write(killed, [make_rows(4)], tokenizer)
  assert '\n' not in str(e.value)


def test_write_to_a_file_is_a_user_error(tokenizer, tmp_path):
  (tmp_path / 'rows').write_text('')
  with pytest.raises(UserError, match='cannot write rows to .*/rows') as e:
    write(tmp_path / 'rows', [make_rows(4)], tokenizer)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'changes',
  [
    {'columns': {'doc': 'int64', 'answer': 'bits'}},
    {'columns': {'answer': 'bits', 'color': 'int16'}},
    {'columns': {}},
    {'columns': None},
    {'format_version': 2},
  ],
)
def test_manifest_with_other_columns_is_damaged(changes, tokenizer, tmp_path):
  write(tmp_path / 'rows', [make_rows(3)], tokenizer)
  path = tmp_path / 'rows' / 'manifest.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(UserError, match='manifest.json is damaged') as e:
    records.read_manifest(tmp_path / 'rows')
  assert '\n' not in str(e.value)


def test_example_of_the_page(tokenizer, tmp_path, monkeypatch):
  root = pathlib.Path(__file__).parents[2]
  (code,) = re.findall(
    r'```python\n(.*?)```', (root / 'docs' / 'data.md').read_text(), re.DOTALL
  )
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'tokenizer').symlink_to(root / 'tokenizer')
  exec(code, {})
  rows = read(tmp_path / 'data' / 'answers')
  assert tokenizer.decode(rows.tokens[rows.answer]) == 'a + b\n'
  assert tokenizer.decode(rows.tokens[rows.doc >= 0]) == '# add\na + b\n'


def test_a_directory_that_is_not_utf8_is_refused(tokenizer, tmp_path):
  with pytest.raises(UserError, match='is not UTF-8: rename the folder'):
    write(f'{tmp_path}/a\udcff', [make_rows(2)], tokenizer)
  assert not os.listdir(tmp_path)
