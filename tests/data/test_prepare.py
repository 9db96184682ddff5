"""Preparation keeps every token, is deterministic, and is all or nothing."""

import concurrent.futures
import pathlib
import sysconfig
import time

import numpy as np
import pytest

from maskdiff.data import prepare, records, sources, tokenizer
from maskdiff.errors import UserError

MODEL = pathlib.Path(__file__).parents[2] / 'tokenizer' / 'stdlib_4k.model'
LIBRARY = pathlib.Path(sysconfig.get_paths()['stdlib'])

SETTINGS = dict(
  row_length=64, heldout_fraction=0.2, rows_per_shard=500, source='asyncio'
)


@pytest.fixture(scope='module')
def tok():
  return tokenizer.load(MODEL)


@pytest.fixture(scope='module')
def documents():
  return list(sources.text_files(LIBRARY / 'asyncio'))


@pytest.fixture(scope='module')
def prepared(tok, documents, tmp_path_factory):
  directory = tmp_path_factory.mktemp('prepare') / 'data'
  prepare.prepare(documents, tok, directory, **SETTINGS)
  return directory


def tokens(directory, split):
  source = records.RowSource(directory, records.read_manifest(directory), split)
  return np.concatenate([source[i] for i in range(len(source))])


def pieces(directory, split, eos_id):
  """The token lists between eos; the last one may be cut off."""
  ids = tokens(directory, split)
  return [tuple(p) for p in np.split(ids, np.flatnonzero(ids == eos_id) + 1)]


def test_rows_are_the_documents_joined_with_eos(prepared, tok, documents):
  manifest = records.read_manifest(prepared)
  whole = {(*tok.encode(t), tok.eos_id): name for name, t in documents}
  seen = []
  for split in records.SPLITS:
    *complete, last = pieces(prepared, split, tok.eos_id)
    names = [whole[p] for p in complete]  # a KeyError is a broken document
    # Less than a row is missing at the end.
    unseen = [
      p for p, name in whole.items()
      if name not in names and p[: len(last)] == last
    ]  # fmt: skip
    if last:
      assert unseen
    assert manifest.splits[split].documents - len(names) in (0, 1)
    seen += names
  assert len(seen) == len(set(seen)) >= len(documents) - 2


def test_splits_share_no_document(prepared, tok):
  train = set(pieces(prepared, 'train', tok.eos_id))
  heldout = set(pieces(prepared, 'heldout', tok.eos_id))
  assert len(train) > 10 and len(heldout) > 2
  assert train.isdisjoint(heldout)


def test_split_is_by_name_alone(prepared, tok, documents, tmp_path):
  """More documents never move one from held-out to train."""
  json = sources.text_files(LIBRARY / 'json')
  more = [*documents, *((f'json/{name}', text) for name, text in json)]
  prepare.prepare(more, tok, tmp_path / 'more', **SETTINGS)
  before = set(pieces(prepared, 'heldout', tok.eos_id)[:-1])
  after = set(pieces(tmp_path / 'more', 'train', tok.eos_id))
  assert before.isdisjoint(after)


def test_manifest_counts(prepared, tok):
  manifest = records.read_manifest(prepared)
  assert manifest.tokenizer_fingerprint == tok.fingerprint
  assert manifest.dtype == 'uint16'
  assert len(manifest.splits['train'].shards) > 1
  for name, split in manifest.splits.items():
    ids = tokens(prepared, name)
    assert split.tokens == len(ids) == split.rows * 64
    assert split.rows == sum(shard.rows for shard in split.shards)
    assert split.text_bytes == sum(len(tok.pieces[i]) for i in ids)
    text = tok.decode(ids)
    assert abs(split.text_bytes - len(text.encode())) < 4  # a cut character
    frequencies = np.bincount(ids) / len(ids)
    entropy = -sum(p * np.log(p) for p in frequencies if p)
    assert split.unigram_entropy_nats == pytest.approx(entropy, rel=1e-12)


def test_result_does_not_depend_on_arrival_order_or_batches(
  prepared, tok, documents, tmp_path, monkeypatch
):
  monkeypatch.setattr(prepare, '_DOCUMENTS_PER_BATCH', 3)
  reverse = iter(documents[::-1])
  again = prepare.prepare(reverse, tok, tmp_path / 'again', **SETTINGS)
  assert again == records.read_manifest(prepared)


def test_shard_size_does_not_change_the_rows(
  prepared, tok, documents, tmp_path
):
  small = SETTINGS | {'rows_per_shard': 7}
  prepare.prepare(documents[:20], tok, tmp_path / 'small', **small)
  prepare.prepare(documents[:20], tok, tmp_path / 'large', **SETTINGS)
  for split in records.SPLITS:
    np.testing.assert_array_equal(
      tokens(tmp_path / 'small', split), tokens(tmp_path / 'large', split)
    )


def test_killed_preparation_leaves_nothing_usable(
  tok, documents, tmp_path, monkeypatch
):
  directory = tmp_path / 'data'
  write_shard = records.write_shard
  calls = []

  def killed(*args):
    if calls:
      raise KeyboardInterrupt
    calls.append(args)
    return write_shard(*args)

  with monkeypatch.context() as patch:
    patch.setattr(records, 'write_shard', killed)
    with pytest.raises(KeyboardInterrupt):
      prepare.prepare(documents, tok, directory, **SETTINGS)
  assert not directory.exists()
  with pytest.raises(UserError):
    records.read_manifest(directory)

  prepare.prepare(documents, tok, directory, **SETTINGS)
  assert len(tokens(directory, 'train'))


def test_leftovers_of_a_killed_process_do_no_harm(tok, documents, tmp_path):
  (tmp_path / '.data.0123').mkdir()
  (tmp_path / '.data.0123' / 'train-00000.array_record').write_bytes(b'half')
  prepare.prepare(documents, tok, tmp_path / 'data', **SETTINGS)
  records.read_manifest(tmp_path / 'data')


def test_two_at_once_agree(tok, documents, tmp_path):
  def work(_):
    return prepare.prepare(documents, tok, tmp_path / 'data', **SETTINGS)

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    first, second = pool.map(work, range(2))
  assert first == second == records.read_manifest(tmp_path / 'data')
  assert [path.name for path in tmp_path.iterdir()] == ['data']


def test_the_slower_one_keeps_the_result_of_the_faster(
  tok, documents, tmp_path, monkeypatch
):
  directory = tmp_path / 'data'
  publish = prepare._publish

  def late(temporary, target):
    monkeypatch.setattr(prepare, '_publish', publish)
    prepare.prepare(documents, tok, directory, **SETTINGS)
    stamp.append((directory / 'manifest.json').stat().st_mtime_ns)
    publish(temporary, target)

  stamp = []
  monkeypatch.setattr(prepare, '_publish', late)
  prepare.prepare(documents, tok, directory, **SETTINGS)
  assert (directory / 'manifest.json').stat().st_mtime_ns == stamp[0]
  assert [path.name for path in tmp_path.iterdir()] == ['data']


def test_other_data_in_the_directory_is_refused(prepared, tok, documents):
  other = SETTINGS | {'row_length': 32}
  with pytest.raises(UserError, match='holds rows of another source'):
    prepare.prepare(documents, tok, prepared, **other)


def test_place_that_cannot_be_written_is_named(tok, documents, tmp_path):
  (tmp_path / 'file').write_text('not a directory')
  with pytest.raises(UserError, match='file/data.*--config.data.cache_dir'):
    prepare.prepare(documents, tok, tmp_path / 'file' / 'data', **SETTINGS)


def test_full_disk_is_named(tok, documents, tmp_path, monkeypatch):
  def full(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(records, 'write_shard', full)
  with pytest.raises(UserError, match='No space left.*config.data.cache_dir'):
    prepare.prepare(documents, tok, tmp_path / 'data', **SETTINGS)
  assert not list(tmp_path.iterdir())


def test_too_little_text_is_refused(tok, tmp_path):
  few = [('a.py', 'x = 1\n'), ('b.py', 'y = 2\n')]
  with pytest.raises(UserError, match='not one row of 64 tokens'):
    prepare.prepare(few, tok, tmp_path / 'data', **SETTINGS)
  assert not list(tmp_path.iterdir())


def test_equal_names_are_refused(tok, tmp_path):
  with pytest.raises(UserError, match="named 'a.py'"):
    prepare.prepare([('a.py', 'x'), ('a.py', 'y')], tok, tmp_path, **SETTINGS)


def test_embedded_is_prepared_once(tok, documents, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'embedded', lambda: iter(documents))
  lines = []
  directory = prepare.embedded(tok, tmp_path / 'cache', 128, lines.append)
  assert directory.parent == tmp_path / 'cache'
  assert tok.fingerprint in directory.name and directory.name.endswith('-128')
  assert len(lines) == 2 and 'bytes per token' in lines[1]

  start = time.perf_counter()
  assert prepare.embedded(tok, tmp_path / 'cache', 128, lines.append)
  assert time.perf_counter() - start < 0.5
  assert len(lines) == 2

  shard = directory / 'train-00000.array_record'
  shard.write_bytes(shard.read_bytes()[:1000])
  with pytest.raises(UserError, match='train-00000.*delete the directory'):
    prepare.embedded(tok, tmp_path / 'cache', 128, lines.append)


def test_embedded_corpus_is_the_library_without_packages():
  names = [name for name, _ in sources.embedded()]
  assert names == sorted(names) and len(names) > 500
  assert 'json/decoder.py' in names
  assert not any('site-packages' in name for name in names)


def test_text_files_skip_what_is_not_text(tmp_path):
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'x.md').write_bytes('caf\u00e9\r\n'.encode())
  (tmp_path / 'a.txt').write_bytes(b'latin \xe9')
  (tmp_path / 'c.bin').write_bytes(b'\0')
  (tmp_path / 'z.py').write_text('')
  found = list(sources.text_files(tmp_path))
  assert found == [('b/x.md', 'caf\u00e9\r\n'), ('z.py', '')]


@pytest.mark.parametrize('name', ['absent', 'empty'])
def test_directory_without_text_is_named(tmp_path, name):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match=f'no .*files in .*{name}: give'):
    sources.text_files(tmp_path / name)
