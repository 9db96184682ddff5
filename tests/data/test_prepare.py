"""Preparation writes every document once, and always the same files."""

import collections
import concurrent.futures
import dataclasses
import errno
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import sysconfig
import time

import numpy as np
import pytest

from maskdiff.data import (
  documents,
  leftovers,
  packing,
  prepare,
  records,
  row_reader,
  shards,
  sources,
)
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError

LIBRARY = pathlib.Path(sysconfig.get_paths()['stdlib'])
EOS = 2

SETTINGS = dict(row_length=32, heldout_fraction=0.2, workers=0)


def quiet(line):
  """Replaces print."""


def plan_of(path, part_bytes=1 << 20):
  """Returns sources.plan with parts of another size."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sources, 'MIN_PART_BYTES', part_bytes)
    patch.setattr(sources, 'MAX_PART_BYTES', part_bytes)
    return sources.plan([str(path)])


def prepared(plan, tokenizer, directory, log=quiet, **changes):
  settings = SETTINGS | changes
  return prepare.prepare(plan, tokenizer, directory, log=log, **settings)


def write_jsonl(path, texts):
  lines = [json.dumps({'text': text}) for text in texts]
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(lines))
  return path


def contents(directory):
  """Returns a dict from each name in a directory to bytes; None: a folder."""
  return {
    str(path.relative_to(directory)): None
    if path.is_dir()
    else path.read_bytes()
    for path in sorted(directory.rglob('*'))
  }


def tokens(directory, split, shard=slice(None)):
  """Returns the tokens of a split, or of some of its shards."""
  manifest = records.read_manifest(directory)
  part = manifest.splits[split]
  part = dataclasses.replace(part, shards=part.shards[shard])
  manifest = dataclasses.replace(
    manifest, splits=manifest.splits | {split: part}
  )
  rows = list(row_reader.RowSource(directory, manifest, split))
  return np.concatenate([np.zeros(0, int), *rows])


def pieces(ids):
  """Returns documents that end with eos, and the rest after the last eos."""
  *whole, rest = np.split(ids, np.flatnonzero(ids == EOS) + 1)
  return [tuple(p.tolist()) for p in whole], tuple(rest.tolist())


def held_out(text, fraction=SETTINGS['heldout_fraction']):
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, 'big') < fraction * 2**64


def document(tokenizer, text):
  return (*tokenizer.encode(text), EOS)


@pytest.fixture(scope='module')
def texts():
  """Returns pieces of a library, shorter and longer than a row, with copies.

  The first is longer than a part.
  """
  rng = random.Random(0)
  code = ''.join(
    path.read_text(encoding='utf-8')
    for path in sorted((LIBRARY / 'asyncio').glob('*.py'))[:12]
  )
  stops = sorted(rng.sample(range(20_000, len(code)), 240))
  found = [code[a:b] for a, b in zip([0, *stops], stops, strict=False)]
  copies = rng.sample(found[1:], 20)
  for text in copies:
    found.insert(rng.randrange(1, len(found)), text)
  return found


@pytest.fixture(scope='module')
def plan(texts, tmp_path_factory):
  """Returns a plan of twelve parts in two formats; some lines are not text."""
  folder = tmp_path_factory.mktemp('corpus')
  path = write_jsonl(folder / 'a.jsonl', texts)
  lines = path.read_bytes().split(b'\n')
  lines[40:40] = [b'{"text": "latin \xe9"}', b'', b'{', b'{"text": ""}']
  path.write_bytes(b'\n'.join(lines))
  # More copies, with another format's line ends.
  for n in (3, 30, 31):
    (folder / f'b{n}.txt').write_text(texts[n], newline='')
  (folder / 'b99.txt').write_bytes(b'latin \xe9')
  plan = plan_of(folder, path.stat().st_size // 11 + 1)
  assert len(plan.parts) == 12
  return plan


@pytest.fixture(scope='module')
def all_texts(texts):
  return [*texts, texts[3], texts[30], texts[31]]


@pytest.fixture(scope='module')
def once(plan, tokenizer, tmp_path_factory):
  """Returns the directory of a preparation without interruption."""
  directory = tmp_path_factory.mktemp('once') / 'rows'
  prepared(plan, tokenizer, directory)
  return directory


def test_rows_are_those_of_the_parts_then_their_tails(plan, tokenizer, once):
  assert tokenizer.eos_id == EOS
  rows, tails, heldout = [], [], []
  for part in plan.parts:
    ids = []
    for text in sources.read(part):
      if isinstance(text, str):
        split = heldout if held_out(text) else ids
        split += document(tokenizer, text)
    whole = len(ids) // 32 * 32
    rows += ids[:whole]
    tails += ids[whole:]
  rows += tails
  assert 32 < len(tails) and 32 < len(heldout)
  for split, wanted in (('train', rows), ('heldout', heldout)):
    ids = tokens(once, split)
    np.testing.assert_array_equal(ids, wanted[: len(wanted) // 32 * 32])


def test_every_document_is_there_once(all_texts, tokenizer, once):
  for split in records.SPLITS:
    wanted = collections.Counter(
      document(tokenizer, text)
      for text in all_texts
      if held_out(text) == (split == 'heldout')
    )
    # Where a part ends in the middle of a document, its tail has the rest.
    shards = range(len(records.read_manifest(once).splits[split].shards))
    *starts, (last, end) = (
      pieces(tokens(once, split, slice(n, n + 1))) for n in shards
    )
    found = [p for whole, _ in starts for p in whole]
    beginnings = collections.deque(rest for _, rest in starts if rest)
    for piece in last:
      if beginnings and beginnings[0] + piece in wanted:
        piece = beginnings.popleft() + piece
      found.append(piece)
    count = sum(map(len, found)) + sum(map(len, beginnings)) + len(end)
    assert collections.Counter(found) <= wanted
    missing = sum(len(p) * n for p, n in wanted.items()) - count
    assert 0 <= missing < 32


def test_splits_share_no_document_and_copies_stay_together(
  all_texts, tokenizer, once
):
  train = collections.Counter(pieces(tokens(once, 'train'))[0])
  heldout = collections.Counter(pieces(tokens(once, 'heldout'))[0])
  assert len(train) > 100 and len(heldout) > 20
  assert not train.keys() & heldout.keys()
  copies = {t for t, n in collections.Counter(all_texts).items() if n > 1}
  counts = [
    (train[d], heldout[d]) for d in (document(tokenizer, t) for t in copies)
  ]
  assert (2, 0) in counts and (0, 2) in counts
  assert all(0 in count for count in counts)


def test_split_does_not_depend_on_the_other_documents(
  texts, tokenizer, once, tmp_path
):
  fewer = write_jsonl(tmp_path / 'fewer.jsonl', texts[100:])
  prepared(plan_of(fewer), tokenizer, tmp_path / 'rows')
  for split, other in (records.SPLITS, records.SPLITS[::-1]):
    before = set(pieces(tokens(once, split))[0])
    after = set(pieces(tokens(tmp_path / 'rows', other))[0])
    assert len(before) > 20 and len(after) > 20
    assert not before & after


def test_manifest_counts(plan, all_texts, tokenizer, once):
  manifest = records.read_manifest(once)
  assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
  assert manifest.source == plan.description
  assert (manifest.eos_id, manifest.row_length) == (EOS, 32)
  assert manifest.dtype == 'uint16'
  assert manifest.skipped == {'not UTF-8': 2, 'not JSON': 1, 'empty': 1}
  documents = {name: s.documents for name, s in manifest.splits.items()}
  heldout = sum(map(held_out, all_texts))
  assert documents == {'train': len(all_texts) - heldout, 'heldout': heldout}
  for name, split in manifest.splits.items():
    ids = tokens(once, name)
    assert split.tokens == len(ids) == split.rows * 32
    assert split.rows == sum(shard.rows for shard in split.shards)
    assert split.text_bytes == sum(len(tokenizer.pieces[i]) for i in ids)
    frequencies = np.unique(ids, return_counts=True)[1] / len(ids)
    entropy = -sum(p * np.log(p) for p in frequencies)
    assert split.unigram_entropy_nats == pytest.approx(entropy, rel=1e-12)
  assert len(manifest.splits['train'].shards) == 13
  assert len(manifest.splits['heldout'].shards) == 1
  row_reader.verify(once, manifest, rows='all')


def test_directory_holds_rows_manifest_and_tokenizer_only(tokenizer, once):
  assert tokenizer_lib.load(once) == tokenizer
  names = {shard.name for shard in once.glob('*.array_record')}
  assert names == {
    'heldout-00000.array_record',
    *(f'train-{n:05d}.array_record' for n in range(13)),
  }
  assert contents(once).keys() - names == {'manifest.json', 'tokenizer.model'}


def test_summary_counts_rows_tokens_and_documents(all_texts, once):
  manifest = records.read_manifest(once)
  train, heldout = manifest.splits.values()
  text = prepare.summary(manifest)
  assert '\n' not in text
  for shown in (
    f'{train.rows:,} + {heldout.rows:,} held-out rows of 32',
    f'{train.documents:,} + {heldout.documents:,} documents',
    f'{train.tokens + heldout.tokens:,} tokens',
    'skipped: 2 not UTF-8, 1 not JSON, 1 empty',
  ):
    assert shown in text


def test_a_large_vocabulary_takes_four_bytes(plan, tokenizer, once, tmp_path):
  """An eos id set by `with_ids` is used in the rows, also by workers."""
  size = 70_000
  absent = (b'',) * (size - tokenizer.vocab_size)
  wide = dataclasses.replace(
    tokenizer, vocab_size=size, pieces=tokenizer.pieces + absent
  )
  wide = tokenizer_lib.with_ids(wide, eos_id=size - 1)
  for workers in (0, 1):
    directory = tmp_path / str(workers)
    manifest = prepared(plan, wide, directory, workers=workers)
    assert manifest.dtype == 'uint32' and manifest.eos_id == size - 1
    row_reader.verify(directory, manifest, rows='all')
    for split in records.SPLITS:
      narrow = tokens(once, split).astype(int)
      narrow[narrow == EOS] = size - 1
      np.testing.assert_array_equal(tokens(directory, split), narrow)
  assert contents(tmp_path / '0') == contents(tmp_path / '1')


# The files do not depend on workers, order or interruptions.


@pytest.mark.parametrize('workers', [1, 2, 3])
def test_files_do_not_depend_on_the_number_of_workers(
  plan, tokenizer, once, tmp_path, workers
):
  prepared(plan, tokenizer, tmp_path / 'rows', workers=workers)
  assert contents(tmp_path / 'rows') == contents(once)


def test_aligned_documents_start_at_multiples(tokenizer, tmp_path):
  texts = [f'text {n} ' * (n % 9 + 1) for n in range(60)]
  plan = plan_of(write_jsonl(tmp_path / 'x.jsonl', texts), 400)
  assert len(plan.parts) > 5
  layout = packing.Layout('cut', align=8)
  out = tmp_path / 'rows'
  manifest = prepared(plan, tokenizer, out, layout=layout)
  assert manifest.columns == {'doc': 'int16'}
  found = []
  for split in records.SPLITS:
    rows = row_reader.RowSource(out, manifest, split)
    rows = rows.read(list(range(len(rows))))
    starts = np.diff(rows.doc, axis=1, prepend=-1) > 0
    assert (np.nonzero(starts)[1] % 8 == 0).all()
    stream = rows.tokens[rows.doc >= 0]
    ends = np.flatnonzero(stream == EOS) + 1
    found += map(tokenizer.decode, np.split(stream, ends)[:-1])
    assert manifest.splits[split].tokens == len(stream)
  assert sorted(found) == sorted(texts)
  with pytest.raises(UserError, match='was prepared with align=8'):
    prepared(plan, tokenizer, out)


def test_how_much_is_done_at_once_does_not_show(
  plan, tokenizer, once, tmp_path, monkeypatch
):
  monkeypatch.setattr(documents, '_TEXT_CHARS', 500)
  monkeypatch.setattr(shards, '_BLOCK_TOKENS', 100)
  prepared(plan, tokenizer, tmp_path / 'rows')
  assert contents(tmp_path / 'rows') == contents(once)


def test_files_do_not_depend_on_the_order_of_the_parts(
  plan, tokenizer, once, tmp_path
):
  """The parts done before an interruption need not be the first."""
  directory = tmp_path / 'rows'
  assert interrupt(plan, tokenizer, directory, after=30)
  for n in (0, 3, 4):
    (directory / '.prepare' / f'{n:05d}.npz').unlink()
  lines = []
  prepared(plan, tokenizer, directory, lines.append)
  assert 'parts are done' in lines[0]
  assert contents(directory) == contents(once)


class Interrupts:
  """Raises at the n-th call that would change a directory."""

  CALLS = ('mkdir', 'rename', 'replace', 'rmdir', 'unlink')

  def __init__(self, patch, n):
    self.left = n
    for name in self.CALLS:
      patch.setattr(os, name, self.counted(getattr(os, name)))

  def counted(self, call):
    def wrapped(*args, **kwargs):
      self.left -= 1
      if self.left == 0:
        raise KeyboardInterrupt
      return call(*args, **kwargs)

    return wrapped


def interrupt(plan, tokenizer, directory, after):
  """Prepares until the n-th such call; returns whether it was reached."""
  with pytest.MonkeyPatch.context() as patch:
    Interrupts(patch, after)
    try:
      prepared(plan, tokenizer, directory)
    except KeyboardInterrupt:
      return True
  return False


@pytest.fixture(scope='module')
def small(texts, tokenizer, tmp_path_factory):
  """Returns a plan of three parts and its prepared directory."""
  folder = tmp_path_factory.mktemp('small')
  path = write_jsonl(folder / 'small.jsonl', texts[1:60])
  plan = plan_of(path, path.stat().st_size // 3 + 1)
  assert len(plan.parts) == 3
  prepared(plan, tokenizer, folder / 'rows')
  return plan, folder / 'rows'


def test_interruption_at_any_moment_changes_no_file(small, tokenizer, tmp_path):
  """Interrupts before every change of the directory."""
  plan, rows = small
  for n in range(1, 100):
    directory = tmp_path / str(n)
    if not interrupt(plan, tokenizer, directory, after=n):
      break
    prepared(plan, tokenizer, directory)
    assert contents(directory) == contents(rows)
    shutil.rmtree(directory)
  assert 20 < n < 100


def test_repeated_interruptions_change_no_file(small, tokenizer, tmp_path):
  plan, rows = small
  rng = random.Random(0)
  for n in range(20):
    directory = tmp_path / str(n)
    while interrupt(plan, tokenizer, directory, after=rng.randint(1, 12)):
      pass
    assert contents(directory) == contents(rows)


def test_directory_without_manifest_is_refused(small, tokenizer, tmp_path):
  plan, _ = small
  assert interrupt(plan, tokenizer, tmp_path / 'rows', after=10)
  assert list((tmp_path / 'rows').glob('*.array_record'))
  with pytest.raises(UserError, match='manifest.json.*launch/prepare.py'):
    records.read_manifest(tmp_path / 'rows')


def test_finished_parts_are_not_done_again(
  small, tokenizer, tmp_path, monkeypatch
):
  plan, _ = small
  directory, lines = tmp_path / 'rows', []
  make_shard, numbers = shards.make_shard, []

  def recorded(job, tokenizer, number, part):
    numbers.append(number)
    if len(numbers) == 3:
      raise KeyboardInterrupt
    return make_shard(job, tokenizer, number, part)

  monkeypatch.setattr(shards, 'make_shard', recorded)
  with pytest.raises(KeyboardInterrupt):
    prepared(plan, tokenizer, directory)
  prepared(plan, tokenizer, directory, lines.append)
  assert numbers == [0, 1, 2, 2]
  assert lines == ['resuming: 2 of 3 parts are done']
  prepared(plan, tokenizer, directory, lines.append)
  assert numbers == [0, 1, 2, 2] and len(lines) == 1


def test_finished_data_is_returned_at_once(once, plan, tokenizer):
  before = {p: p.stat().st_mtime_ns for p in once.iterdir()}
  lines = []
  manifest = prepared(plan, tokenizer, once, lines.append, workers=2)
  assert manifest == records.read_manifest(once)
  assert before == {p: p.stat().st_mtime_ns for p in once.iterdir()}
  assert not lines


@pytest.mark.parametrize('parts_done', [0, 1])
def test_a_killed_worker_is_named(texts, tokenizer, tmp_path, parts_done):
  path = write_jsonl(tmp_path / 'corpus.jsonl', texts * 6)
  plan = plan_of(path, path.stat().st_size // 12)
  directory = tmp_path / 'rows'
  others = multiprocessing.active_children()
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    work = thread.submit(prepared, plan, tokenizer, directory, workers=2)
    while not work.done():
      children = [
        p for p in multiprocessing.active_children() if p not in others
      ]
      done = list((directory / '.prepare').glob('0*.npz'))
      if children and len(done) >= parts_done:
        os.kill(children[0].pid, signal.SIGKILL)
        break
      time.sleep(0.005)
    with pytest.raises(UserError, match='worker was killed.*run again') as e:
      work.result(timeout=30)
  assert '\n' not in str(e.value)
  lines = []
  prepared(plan, tokenizer, directory, lines.append)
  assert parts_done == 0 or 'resuming' in lines[0]
  prepared(plan, tokenizer, tmp_path / 'undisturbed')
  assert contents(directory) == contents(tmp_path / 'undisturbed')


@pytest.mark.parametrize(
  'error', [OSError('handle is closed'), ValueError('bad fds_to_keep')]
)
def test_a_worker_killed_while_others_start_is_named(
  small, tokenizer, tmp_path, monkeypatch, error
):
  """The user does not see the error from starting the next worker."""
  pool = concurrent.futures.ProcessPoolExecutor
  submit, calls = pool.submit, []

  def broken(*args):
    calls.append(args)
    if len(calls) == 2:
      raise error
    return submit(*args)

  monkeypatch.setattr(pool, 'submit', broken)
  message = refused(small[0], tokenizer, tmp_path / 'rows', workers=2)
  assert 'worker was killed' in message
  prepared(small[0], tokenizer, tmp_path / 'rows')
  assert contents(tmp_path / 'rows') == contents(small[1])


# Errors of one line, and inputs that are accepted


def refused(plan, tokenizer, directory, **changes):
  with pytest.raises(UserError) as e:
    prepared(plan, tokenizer, directory, **changes)
  assert '\n' not in str(e.value)
  return str(e.value)


@pytest.fixture(params=['half finished', 'finished'])
def directory(request, small, tokenizer, tmp_path):
  plan, rows = small
  if request.param == 'finished':
    shutil.copytree(rows, tmp_path / 'rows')
  else:
    assert interrupt(plan, tokenizer, tmp_path / 'rows', after=10)
  return tmp_path / 'rows'


@pytest.mark.parametrize(
  'name, value', [('row_length', 64), ('heldout_fraction', 0.25)]
)
def test_other_settings_are_refused(small, tokenizer, directory, name, value):
  before = contents(directory)
  message = refused(small[0], tokenizer, directory, **{name: value})
  assert f'{name}={SETTINGS[name]}, not {value}' in message
  assert str(directory) in message and 'another directory' in message
  assert contents(directory) == before


def test_another_tokenizer_is_refused(small, tokenizer, directory):
  other = dataclasses.replace(tokenizer, fingerprint='0123456789abcdef')
  message = refused(small[0], other, directory)
  assert f'tokenizer={tokenizer.fingerprint}, not 0123456789abc' in message


def test_another_eos_is_refused(small, tokenizer, directory):
  other = tokenizer_lib.with_ids(tokenizer, eos_id=tokenizer.bos_id)
  message = refused(small[0], other, directory)
  assert f'eos_id={EOS}, not {tokenizer.bos_id}' in message


@pytest.mark.parametrize('change', ['longer', 'one more', 'renamed', 'parts'])
def test_other_input_is_refused(
  small, texts, tokenizer, directory, tmp_path, change
):
  plan, _ = small
  folder = tmp_path / 'input'
  original = pathlib.Path(plan.parts[0].paths[0])
  size = original.stat().st_size
  name = 'other.jsonl' if change == 'renamed' else original.name
  more = {'longer': '\n{"text": "more"}'}.get(change, '')
  folder.mkdir()
  (folder / name).write_text(original.read_text() + more)
  if change == 'one more':
    write_jsonl(folder / 'more.jsonl', ['one more'])
  other = plan_of(folder, size // (2 if change == 'parts' else 3) + 1)
  message = refused(other, tokenizer, directory)
  assert f'input={plan.fingerprint}, not {other.fingerprint}' in message


def test_input_may_be_a_copy_elsewhere(small, tokenizer, directory, tmp_path):
  plan, rows = small
  original = pathlib.Path(plan.parts[0].paths[0])
  copy = tmp_path / 'elsewhere' / original.name
  copy.parent.mkdir()
  shutil.copyfile(original, copy)
  moved = plan_of(copy, copy.stat().st_size // 3 + 1)
  prepared(moved, tokenizer, directory)
  found, wanted = contents(directory), contents(rows)
  found.pop('manifest.json'), wanted.pop('manifest.json')  # it names the path
  assert found == wanted


@pytest.mark.parametrize('name', ['notes.txt', 'folder'])
def test_a_directory_with_something_else_is_refused(
  small, tokenizer, tmp_path, name
):
  if name == 'folder':
    (tmp_path / name).mkdir()
  else:
    (tmp_path / name).write_text('mine')
  before = contents(tmp_path)
  message = refused(small[0], tokenizer, tmp_path)
  assert 'not prepared data' in message and name in message
  assert contents(tmp_path) == before


def test_hidden_files_are_ignored(small, tokenizer, tmp_path):
  (tmp_path / '.gitignore').write_text('mine')
  prepared(small[0], tokenizer, tmp_path)
  assert (tmp_path / '.gitignore').read_text() == 'mine'


def interrupted(*_):
  raise KeyboardInterrupt


@pytest.mark.parametrize('what', ['shard', 'leftovers'])
@pytest.mark.parametrize('content', [None, b'', b'half'])
def test_part_lost_in_a_power_cut_is_done_again(
  small, tokenizer, tmp_path, monkeypatch, what, content
):
  directory = tmp_path / 'rows'
  with monkeypatch.context() as patch:
    patch.setattr(shards, 'conclude', interrupted)
    with pytest.raises(KeyboardInterrupt):
      prepared(small[0], tokenizer, directory)
  path = directory / (
    'train-00001.array_record' if what == 'shard' else '.prepare/00001.npz'
  )
  path.unlink()
  if content is not None:
    path.write_bytes(content)
  prepared(small[0], tokenizer, directory)
  assert contents(directory) == contents(small[1])


def test_damaged_finished_rows_are_refused(small, tokenizer, tmp_path):
  prepared(small[0], tokenizer, tmp_path / 'rows')
  (tmp_path / 'rows' / 'train-00000.array_record').write_bytes(b'')
  message = refused(small[0], tokenizer, tmp_path / 'rows')
  assert 'train-00000' in message and 'delete the directory' in message


def test_an_empty_directory_is_fine(small, tokenizer, tmp_path):
  plan, rows = small
  prepared(plan, tokenizer, tmp_path)
  assert contents(tmp_path) == contents(rows)


def test_input_that_changes_on_the_way_is_refused(small, tokenizer, tmp_path):
  original = pathlib.Path(small[0].parts[0].paths[0])
  path = tmp_path / 'corpus.jsonl'
  shutil.copyfile(original, path)
  plan = plan_of(path)
  with open(path, 'a') as f:
    f.write('\n{"text": "late"}')
  assert str(path) in refused(plan, tokenizer, tmp_path / 'rows')


def test_unwritable_directory_is_named(small, tokenizer, tmp_path):
  (tmp_path / 'file').write_text('not a directory')
  place = tmp_path / 'file' / 'rows'
  message = refused(small[0], tokenizer, place)
  assert f'cannot write prepared data to {place}' in message


@pytest.mark.parametrize('fails_at', [1, 3, 4, 5])
def test_a_full_disk_costs_no_finished_part(
  small, tokenizer, tmp_path, monkeypatch, fails_at
):
  plan, rows = small
  write_shard, calls = records.write_shard, []

  def full(*args):
    calls.append(args)
    if len(calls) == fails_at:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write_shard(*args)

  monkeypatch.setattr(records, 'write_shard', full)
  message = refused(plan, tokenizer, tmp_path / 'rows')
  assert 'No space left on device' in message and 'run again' in message
  prepared(plan, tokenizer, tmp_path / 'rows')
  done = min(fails_at - 1, 3)
  assert len(calls) == fails_at + 3 - done + 2
  assert contents(tmp_path / 'rows') == contents(rows)


@pytest.mark.parametrize('out', ['rows', 'a/b/rows'])
def test_output_inside_the_input_resumes(
  texts, tokenizer, tmp_path, monkeypatch, out
):
  """The rows, their manifest, lock and leftovers are no input."""
  folder = tmp_path / 'in'
  write_jsonl(folder / 'a.jsonl', texts[:60])
  (folder / 'a').mkdir()
  (tmp_path / 'link').symlink_to(folder)
  expected = prepared(plan_of(folder), tokenizer, tmp_path / 'outside')
  plan = lambda source: sources.plan([str(source)], output=folder / out)
  with monkeypatch.context() as patch:
    patch.setattr(shards, 'conclude', interrupted)
    with pytest.raises(KeyboardInterrupt):
      prepared(plan(folder), tokenizer, folder / out)
  # Interrupted, finished, and through a link.
  for source in (folder, folder, tmp_path / 'link'):
    manifest = prepared(plan(source), tokenizer, folder / out)
    assert manifest.splits == expected.splits
    row_reader.verify(folder / out, manifest, rows='all')
  others = prepared(plan_of(folder), tokenizer, tmp_path / 'later')
  assert others.splits == expected.splits


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1.0, 1.5])
def test_heldout_fraction_out_of_bounds_is_refused(
  small, tokenizer, tmp_path, value
):
  message = refused(
    small[0], tokenizer, tmp_path / 'rows', heldout_fraction=value
  )
  assert message.startswith(f'--heldout_fraction={value}: must be from 0 to 1')
  assert not (tmp_path / 'rows').exists()


@pytest.mark.parametrize('content', ['[]', 'null', '[' * 100_000, '\0', '{}'])
def test_damaged_state_is_refused(small, tokenizer, tmp_path, content):
  (tmp_path / '.prepare').mkdir()
  (tmp_path / '.prepare' / 'settings.json').write_text(content)
  message = refused(small[0], tokenizer, tmp_path)
  assert 'settings.json' in message or 'was prepared with' in message


@pytest.mark.parametrize('kind', ['link', 'fifo'])
def test_lock_is_no_link_and_no_fifo(small, tokenizer, tmp_path, kind):
  path = tmp_path / 'rows' / '.prepare.lock'
  path.parent.mkdir()
  if kind == 'link':
    path.symlink_to(tmp_path / 'planted')
    assert 'cannot write' in refused(small[0], tokenizer, path.parent)
    assert not (tmp_path / 'planted').exists()
  else:
    os.mkfifo(path)
    prepared(small[0], tokenizer, path.parent)  # does not wait for a reader


def test_leftovers_of_another_form_are_not_used(
  small, tokenizer, tmp_path, monkeypatch
):
  plan, rows = small
  with monkeypatch.context() as patch:
    patch.setattr(shards, 'conclude', interrupted)
    with pytest.raises(KeyboardInterrupt):
      prepared(plan, tokenizer, tmp_path)
  path = tmp_path / '.prepare' / '00000.npz'
  with np.load(path) as file:
    arrays = dict(file)
  about = json.loads(str(arrays['about']))
  outside = about | {'shard': (about['shard'] or {}) | {'file': '/etc/passwd'}}
  job = shards.Job(tmp_path, 32, 0.2, 1)
  assert leftovers.is_done(job, 0, tokenizer.vocab_size)
  for changes in (
    {'about': np.array(json.dumps(outside))},
    {'about': np.array('[' * 100_000)},
    {'about': np.array(json.dumps(about | {'skipped': {'empty': -1}}))},
    {'tail': arrays['tail'].astype(float)},
    {'tail': np.full(3, 60_000, np.uint16)},
    {'heldout': arrays['heldout'][:, None]},
    {'counts': arrays['counts'][:-1]},
  ):
    np.savez(path, **(arrays | changes))
    assert not leftovers.is_done(job, 0, tokenizer.vocab_size)
  prepared(plan, tokenizer, tmp_path)
  assert contents(tmp_path) == contents(rows)


def test_less_than_a_row_is_refused(tokenizer, tmp_path):
  path = write_jsonl(tmp_path / 'few.jsonl', ['x = 1\n', 'y = 2\n'])
  message = refused(plan_of(path), tokenizer, tmp_path / 'rows')
  assert '2 documents do not fill one row of 32 tokens' in message
  assert contents(tmp_path / 'rows') == {}
  # The message names a length that works in the same directory.
  length = int(message.partition('--row_length=')[2])
  manifest = prepared(
    plan_of(path), tokenizer, tmp_path / 'rows', row_length=length
  )
  assert manifest.splits['train'].rows


def test_empty_documents_alone_are_refused(tokenizer, tmp_path):
  path = write_jsonl(tmp_path / 'none.jsonl', [''] * 300)
  message = refused(plan_of(path), tokenizer, tmp_path / 'rows')
  assert '0 documents do not fill one row' in message


def test_an_empty_file_among_others_is_fine(texts, tokenizer, tmp_path):
  write_jsonl(tmp_path / 'in' / 'b.jsonl', texts[:50])
  for name in ('a.jsonl', 'c.jsonl', 'd.txt'):
    (tmp_path / 'in' / name).touch()
  manifest = prepared(plan_of(tmp_path / 'in'), tokenizer, tmp_path / 'rows')
  assert sum(s.documents for s in manifest.splits.values()) == 50


@pytest.mark.parametrize('workers', [0, 1])
def test_mostly_unreadable_input_is_refused(tokenizer, tmp_path, workers):
  path = tmp_path / 'latin.jsonl'
  path.write_bytes(b'{"text": "\xe9"}\n' * 200)
  plan = plan_of(path)
  message = refused(plan, tokenizer, tmp_path / 'rows', workers=workers)
  assert 'more than half' in message and str(path) in message


@pytest.mark.parametrize(
  'fraction, absent', [(0, 'heldout'), (1e-9, 'heldout'), (1, 'train')]
)
def test_a_split_without_documents_is_empty(
  small, tokenizer, tmp_path, fraction, absent
):
  plan, rows = small
  directory = tmp_path / 'rows'
  manifest = prepared(plan, tokenizer, directory, heldout_fraction=fraction)
  (other,) = set(records.SPLITS) - {absent}
  assert manifest.splits[absent] == records.Split((), 0, 0, 0, 0, 0.0)
  assert not list(directory.glob(f'{absent}-*'))
  assert not len(row_reader.RowSource(directory, manifest, absent))
  assert manifest.splits[other].documents == 59
  row_reader.verify(directory, manifest, rows='all')
  assert prepare.summary(manifest)


def test_a_corpus_that_is_held_out_by_chance_has_no_train_rows(
  tokenizer, tmp_path
):
  text = next(t for t in map(str, range(100)) if held_out(t))
  path = write_jsonl(tmp_path / 'one.jsonl', [text] * 50)
  manifest = prepared(plan_of(path), tokenizer, tmp_path / 'rows')
  assert manifest.splits['train'].rows == 0
  assert manifest.splits['heldout'].documents == 50


# The embedded corpus.


def test_embedded_is_prepared_once(small, tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(sources, 'plan', lambda specs: small[0])
  lines = []
  directory = prepare.embedded(tokenizer, tmp_path / 'cache', 128, lines.append)
  version = '.'.join(map(str, sys.version_info[:3]))
  assert directory.parent == tmp_path / 'cache'
  assert directory.name == f'embedded-py{version}-{tokenizer.fingerprint}-128'
  manifest = records.read_manifest(directory)
  assert manifest.row_length == 128
  row_reader.verify(directory, manifest, rows='all')
  assert manifest.settings['heldout_fraction'] == 0.05
  first, last = lines
  assert str(directory) in first and prepare.summary(manifest) in last

  def plan_again(specs):
    raise AssertionError('planned again')

  monkeypatch.setattr(sources, 'plan', plan_again)
  start = time.perf_counter()
  assert prepare.embedded(tokenizer, tmp_path / 'cache', 128, lines.append)
  assert time.perf_counter() - start < 0.1
  assert len(lines) == 2


def test_embedded_is_prepared_for_each_row_length(
  small, tokenizer, tmp_path, monkeypatch
):
  monkeypatch.setattr(sources, 'plan', lambda specs: small[0])
  found = {prepare.embedded(tokenizer, tmp_path, n, quiet) for n in (16, 32)}
  assert {records.read_manifest(d).row_length for d in found} == {16, 32}


def test_embedded_names_the_key_of_an_unwritable_directory(
  small, tokenizer, tmp_path, monkeypatch
):
  monkeypatch.setattr(sources, 'plan', lambda specs: small[0])
  (tmp_path / 'file').write_text('not a directory')
  with pytest.raises(UserError, match='cannot write.*--config.data.cache_dir'):
    prepare.embedded(tokenizer, tmp_path / 'file', 16, quiet)


def test_embedded_resumes_after_an_interruption(
  small, tokenizer, tmp_path, monkeypatch
):
  monkeypatch.setattr(sources, 'plan', lambda specs: small[0])
  lines = []
  with pytest.MonkeyPatch.context() as patch:
    Interrupts(patch, 11)
    with pytest.raises(KeyboardInterrupt):
      prepare.embedded(tokenizer, tmp_path / 'cache', 32, lines.append)
  directory = prepare.embedded(tokenizer, tmp_path / 'cache', 32, lines.append)
  assert any('resuming' in line for line in lines)
  assert records.read_manifest(directory)
