"""Shards: one part of the input becomes rows and a file of leftovers."""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

from maskdiff.data import (
  documents,
  leftovers,
  records,
  row_reader,
  shards,
  sources,
)
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ROOT / 'tokenizer' / 'stdlib_4k.model'
WORDS = ['def', 'return', ' = ', '(x)', '\n', '  ', 'caf\u00e9', '\u4e16', '1']


def texts_of(seed, count, longest=200):
  rng = random.Random(seed)
  sizes = [rng.choice([1, 3, longest]) for _ in range(count)]
  return [f'{n} ' + ''.join(rng.choices(WORDS, k=n)) for n in sizes]


def plan_of(path, lines):
  """Returns a plan of one part: documents, or raw lines given as bytes."""
  raw = [
    x if isinstance(x, bytes) else json.dumps({'text': x}).encode()
    for x in lines
  ]
  path.write_bytes(b'\n'.join(raw))
  return sources.plan([str(path)])


@dataclasses.dataclass
class Made:
  """The shard and the leftovers of a part."""

  job: shards.Job
  shard: records.Shard | None
  train: list[int]  # of the shard and the tail
  heldout: list[int]
  about: dict


def make(folder, lines, tokenizer, fraction=0.0, row_length=16):
  folder.mkdir(parents=True, exist_ok=True)
  (part,) = plan_of(folder / 'input.jsonl', lines).parts
  job = shards.Job(folder / 'rows', row_length, fraction, num_threads=1)
  job.state.mkdir(parents=True)
  shards.make_shard(job, tokenizer, 7, part)
  with np.load(job.leftovers(7)) as leftovers:
    about = json.loads(str(leftovers['about']))
    tail, heldout = leftovers['tail'], leftovers['heldout']
  shard = about['shard'] and records.Shard(**about['shard'])
  train = tail.tolist()
  if shard:
    assert job.shard('train', 7).name == shard.file
    manifest = manifest_of(job, tokenizer, shard)
    rows = row_reader.RowSource(job.directory, manifest, 'train')
    train = np.concatenate([*rows, tail]).tolist()
  return Made(job, shard, train, heldout.tolist(), about)


def manifest_of(job, tokenizer, shard):
  splits = {
    'train': records.Split((shard,), shard.rows, 0, 0, 0, 0.0),
    'heldout': records.Split((), 0, 0, 0, 0, 0.0),
  }
  return records.Manifest(
    format_version=records.FORMAT_VERSION,
    source='',
    settings={},
    tokenizer_fingerprint=tokenizer.fingerprint,
    vocab_size=tokenizer.vocab_size,
    eos_id=tokenizer.eos_id,
    row_length=job.row_length,
    dtype=records.token_dtype(tokenizer.vocab_size),
    skipped={},
    splits=splits,
  )


def joined(texts, tokenizer):
  return [i for text in texts for i in (*tokenizer.encode(text), 2)]


def held_out(text, fraction):
  digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
  return int(digest, 16) < fraction * 2**64


def test_documents_are_joined_with_eos_and_cut(tokenizer, tmp_path):
  assert tokenizer.eos_id == 2
  texts = texts_of(5, 120)
  made = make(tmp_path, texts, tokenizer, fraction=0.3)
  train = [t for t in texts if not held_out(t, 0.3)]
  heldout = [t for t in texts if held_out(t, 0.3)]
  assert len(train) > 40 and len(heldout) > 20
  assert made.train == joined(train, tokenizer)
  assert made.heldout == joined(heldout, tokenizer)
  assert made.about['documents'] == {
    'train': len(train),
    'heldout': len(heldout),
  }
  assert made.shard.rows == len(made.train) // 16
  assert len(made.train) % 16, 'there should be a tail here'


def test_number_of_tokens_is_returned(tokenizer, tmp_path):
  texts = texts_of(1, 50)
  plan = plan_of(tmp_path / 'input.jsonl', texts)
  job = shards.Job(tmp_path, 16, 0.3, num_threads=2)
  job.state.mkdir()
  tokens = shards.make_shard(job, tokenizer, 0, plan.parts[0])
  assert tokens == len(joined(texts, tokenizer))


@pytest.mark.parametrize('chars', [1, 300, 10_000])
@pytest.mark.parametrize('tokens', [1, 100, 3000])
def test_how_much_is_done_at_once_does_not_show(
  tokenizer, tmp_path, monkeypatch, chars, tokens
):
  texts = texts_of(2, 60)
  whole = make(tmp_path / 'whole', texts, tokenizer, 0.3)
  monkeypatch.setattr(documents, '_TEXT_CHARS', chars)
  monkeypatch.setattr(shards, '_BLOCK_TOKENS', tokens)
  pieces = make(tmp_path / 'pieces', texts, tokenizer, 0.3)
  assert pieces.about == whole.about
  for path in sorted(whole.job.directory.rglob('*')):
    same = pieces.job.directory / path.relative_to(whole.job.directory)
    if path.suffix != '.npz' and path.is_file():
      assert same.read_bytes() == path.read_bytes()
  assert pieces.heldout == whole.heldout
  assert pieces.train == whole.train


def test_long_document_continues_in_the_next_rows(tokenizer, tmp_path):
  text = 'x = [' + ', '.join(map(str, range(500))) + ']\n'
  made = make(tmp_path, ['first', text, 'last'], tokenizer)
  assert made.shard.rows > 50
  assert made.train == joined(['first', text, 'last'], tokenizer)


def test_less_than_a_row_makes_no_shard(tokenizer, tmp_path):
  made = make(tmp_path, ['x'], tokenizer)
  assert made.shard is None
  assert not made.job.shard('train', 7).exists()
  assert made.train == joined(['x'], tokenizer)


def test_no_document_at_all_is_fine(tokenizer, tmp_path):
  made = make(tmp_path, ['', b' ', b''], tokenizer)
  assert (made.shard, made.train, made.heldout) == (None, [], [])
  assert made.about['skipped'] == {'empty': 1}


@pytest.mark.parametrize('fraction', [0, 0.1, 0.5, 1])
def test_share_held_out(tokenizer, tmp_path, fraction):
  texts = [f'document {n}' for n in range(2000)]
  documents = make(tmp_path, texts, tokenizer, fraction).about['documents']
  assert documents['heldout'] == sum(held_out(t, fraction) for t in texts)
  assert abs(documents['heldout'] - 2000 * fraction) < 100
  assert sum(documents.values()) == 2000


def test_a_larger_share_holds_out_the_same_documents_and_more(
  tokenizer, tmp_path
):
  texts = [f'{n};' for n in range(300)]
  documents = {}
  for fraction in (0.1, 0.3):
    made = make(tmp_path / str(fraction), texts, tokenizer, fraction)
    documents[fraction] = set(tokenizer.decode(made.heldout).split(';'))
  assert documents[0.1] < documents[0.3]


def test_a_part_is_done_only_when_its_shard_is(
  tokenizer, tmp_path, monkeypatch
):
  def killed(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(records, 'write_file', killed)
  with pytest.raises(KeyboardInterrupt):
    make(tmp_path, texts_of(3, 50), tokenizer)
  rows = tmp_path / 'rows'
  assert (rows / 'train-00007.array_record').exists()
  assert [p.name for p in rows.iterdir() if p.is_dir()] == ['.prepare']
  assert not list((rows / '.prepare').iterdir())


def test_damaged_leftovers_are_never_used(tokenizer, tmp_path):
  job = make(tmp_path, texts_of(3, 50), tokenizer, 0.3).job
  path = job.leftovers(7)
  content = path.read_bytes()
  with np.load(path) as file:
    arrays = dict(file)
  assert leftovers.is_done(job, 7, tokenizer.vocab_size)
  rng = random.Random(0)
  for n in range(300):
    damaged = bytearray(content)
    damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(damaged[: rng.randrange(len(content)) if n % 3 else None])
    if leftovers.is_done(
      job, 7, tokenizer.vocab_size
    ):  # the damage is to a date, say
      with np.load(path) as file:
        assert all(np.array_equal(file[k], v) for k, v in arrays.items())


def test_text_that_names_special_tokens_stays_text(tokenizer, tmp_path):
  names = ['<mask>', '<eos>', '<pad>', '<bos>', '<unk>', '</s>', '<0x00>']
  texts = [*names, ''.join(names * 3), ' <eos> <mask>\n<pad>']
  made = make(tmp_path, texts, tokenizer)
  count = collections.Counter(made.train)
  assert count[tokenizer.eos_id] == len(texts)
  for i in (tokenizer.mask_id, tokenizer.pad_id, tokenizer.bos_id):
    assert i != tokenizer.eos_id and not count[i]
  assert tokenizer.decode(made.train) == ''.join(texts)


@pytest.mark.parametrize(
  'text',
  [
    'a\0b',
    '\0',
    'a\rb\r\rc',
    '\r\n',
    '\n',
    ' ',
    '\u2581a \u2581\u2581 b\u2581',
    '\ufeffx',
    '\u2028\u2029\x85\x0b\x0c\x1c',
    '\U0001f468\u200d\U0001f469',
    'e\u0301 \u00e9',
    '\U0010ffff\ufffe\ufffd',
    ' ' * 5000,
  ],
  ids=ascii,
)
def test_odd_text_comes_back_as_it_was(tokenizer, tmp_path, text):
  made = make(tmp_path, [text, 'next', text], tokenizer)
  ids = np.array(made.train)
  *documents, rest = np.split(ids, np.flatnonzero(ids == 2) + 1)
  assert not len(rest)
  assert [tokenizer.decode(d) for d in documents] == [text, 'next', text]


def test_unreadable_documents_are_counted_and_skipped(tokenizer, tmp_path):
  lines = [
    'good',
    b'{"text": "latin \xe9"}',
    b'{"text": "cut',
    b'{"text": null}',
    b'[]',
    b'{"text": "\\ud800"}',
    b'{"text": ""}',
    b'{"text": ""}',
    'too',
  ]
  made = make(tmp_path, lines, tokenizer)
  assert made.train == joined(['good', 'too'], tokenizer)
  assert made.about['skipped'] == {
    'not UTF-8': 1,
    'not JSON': 1,
    'no text': 2,
    'not Unicode': 1,
    'empty': 2,
  }


@pytest.mark.parametrize('line', [b'{"text": "\xe9"}', b'{"text": null}', b'x'])
def test_mostly_unreadable_input_is_refused(tokenizer, tmp_path, line):
  lines = [line if n % 5 else 'good' for n in range(400)]
  with pytest.raises(UserError, match='more than half.*input.jsonl.*format'):
    make(tmp_path, lines, tokenizer)
  assert not [p for p in (tmp_path / 'rows').rglob('*') if p.is_file()]


def test_half_unreadable_input_is_not_refused(tokenizer, tmp_path):
  lines = [b'x' if n % 2 else 'good' for n in range(400)]
  assert make(tmp_path, lines, tokenizer).about['skipped'] == {'not JSON': 200}


def test_few_unreadable_documents_are_not_refused(tokenizer, tmp_path):
  assert make(tmp_path, [b'x'] * 99, tokenizer).about['skipped'] == {
    'not JSON': 99
  }


def test_mostly_empty_documents_are_fine(tokenizer, tmp_path):
  lines = ['' if n % 10 else f'line {n}' for n in range(1000)]
  made = make(tmp_path, lines, tokenizer)
  assert made.about['skipped'] == {'empty': 900}
  assert made.about['documents']['train'] == 100


def test_empty_documents_do_not_hide_unreadable_ones(tokenizer, tmp_path):
  lines = [[b'x', b'x', 'good', '', '', '', ''][n % 7] for n in range(1400)]
  with pytest.raises(UserError, match='more than half'):
    make(tmp_path, lines, tokenizer)


def test_large_vocabularies_take_four_bytes(tokenizer, tmp_path):
  size = 70_000
  wide = dataclasses.replace(
    tokenizer,
    vocab_size=size,
    pieces=tokenizer.pieces + (b'',) * (size - tokenizer.vocab_size),
  )
  wide = tokenizer_lib.with_ids(wide, eos_id=size - 1)
  texts = texts_of(4, 40)
  made = make(tmp_path, texts, wide)
  narrow = make(tmp_path / 'narrow', texts, tokenizer)
  assert made.train == [size - 1 if i == 2 else i for i in narrow.train]
  with np.load(made.job.leftovers(7)) as leftovers:
    assert leftovers['tail'].dtype == np.uint32


@pytest.mark.slow
def test_a_document_of_20_megabytes_in_one_line(tmp_path):
  """Peak memory is proportional to the document, and its text is unchanged."""
  program = """
import json, pathlib, random, resource, sys
import numpy as np
from maskdiff.data import prepare, records, row_reader, sources, tokenizer

def peak():  # bytes, on macOS; else KiB
  size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return size if sys.platform == 'darwin' else size << 10

folder = pathlib.Path(sys.argv[1])
tok = tokenizer.load(sys.argv[2])
words = ['return ', 'value ', 'self.assertEqual(', '    ', 'caf\u00e9 ']
text = ''.join(random.Random(0).choices(words, k=2_600_000))
path = folder / 'long.jsonl'
path.write_text(json.dumps({'text': text}), encoding='utf-8')
before = peak()
prepare.prepare(
  sources.plan([str(path)]), tok, folder / 'rows',
  row_length=4096, heldout_fraction=0, workers=0, log=lambda line: None,
)
taken = (peak() - before) / len(text)
rows = row_reader.RowSource(
  folder / 'rows', records.read_manifest(folder / 'rows'), 'train'
)
back = tok.decode(np.concatenate(list(rows)))
print(json.dumps({
  'chars': len(text),
  'bytes_per_char': taken,
  'missing': len(text) - len(back),
  'same': text.startswith(back),
}))
"""
  done = subprocess.run(
    [sys.executable, '-c', program, tmp_path, MODEL],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
    check=True,
  )
  found = json.loads(done.stdout)
  assert found['chars'] > 20e6
  assert found['same'] and found['missing'] < 4096 * 8
  assert found['bytes_per_char'] < 40
