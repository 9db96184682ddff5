"""tokenizer/train.py on a user's text, run as a script."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import sentencepiece

from maskdiff.data import tokenizer, tokenizer_training
from maskdiff.errors import UserError

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'tokenizer' / 'train.py'

TEXTS = [
  '',
  '  two  spaces   three ',
  '\n\n\n\n\n    x\n\n  \n',
  '\tif x:\n\t\treturn\t1\r\n',
  'a \U0001f600\U0001f468\u200d\U0001f469 \u4f60\u597d e\u0301 \ufb01',
  'a\0b\ufeff\u2581\u2581 b',
  '<mask><pad> <bos><eos><unk><user><0x41>',
]


def script(*arguments):
  """Runs the script; returns its exit status, output and error output."""
  done = subprocess.run(
    [sys.executable, SCRIPT, *map(str, arguments)],
    capture_output=True,
    text=True,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope='module')
def module():
  spec = importlib.util.spec_from_file_location('train_tokenizer', SCRIPT)
  loaded = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(loaded)
  return loaded


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """Returns a folder with a JSON lines file and a text file, 240 KB."""
  folder = tmp_path_factory.mktemp('corpus')
  library = pathlib.Path(json.__file__).parents[1]
  texts = [
    (library / name).read_text('utf-8')
    for name in ('textwrap.py', 'random.py', 'ast.py', 'tarfile.py')
  ]
  lines = [{'content': text, 'id': i} for i, text in enumerate(texts)]
  lines.append({'content': None})
  (folder / 'a.jsonl').write_text('\n'.join(map(json.dumps, lines)))
  (folder / 'b.txt').write_text('Text of another kind.\n' * 200)
  return folder


def train(corpus, out, *arguments):
  return script(
    '--input', corpus, '--text_key', 'content', '--out', out, *arguments
  )


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_model_is_lossless_and_reproducible(corpus, tmp_path, kind):
  paths = tmp_path / 'new' / 'a.model', tmp_path / 'b.model'
  paths[1].write_text('old')
  for path in paths:
    status, out, err = train(
      corpus, path, '--vocab_size', 600, '--model_type', kind
    )
    assert (status, err) == (0, '')
    assert out.count('\n') == 1
    assert f'{path}: 600 pieces, fingerprint ' in out
    assert 'bytes per token on held-out text' in out
    assert '1 documents skipped: 1 no text' in out
  assert paths[0].read_bytes() == paths[1].read_bytes()
  assert len(list(tmp_path.iterdir())) == 2

  tok = tokenizer.load(paths[0])
  assert tok.vocab_size == 600 and tok.fingerprint in out
  for text in TEXTS:
    assert tok.decode(tok.encode(text)) == text
  assert {tok.mask_id, tok.pad_id}.isdisjoint(tok.encode('<mask><pad>'))
  assert (tok.pad_id, tok.bos_id, tok.eos_id, tok.mask_id) == (0, 1, 2, 4)
  names = [tok.processor.id_to_piece(i) for i in range(5, 9)]
  assert names == ['<system>', '<user>', '<assistant>', '<end_of_turn>']
  assert [tok.pieces[i] for i in tok.encode('x\n    12')] == [
    b'x', b'\n    ', b'1', b'2'
  ]  # fmt: skip


@pytest.mark.parametrize('kind', ['bpe', 'unigram'])
def test_too_large_vocabulary_names_the_largest_possible_size(tmp_path, kind):
  text, out = tmp_path / 'a.txt', tmp_path / 'a.model'
  text.write_text('the quick brown fox jumps over the lazy dog ' * 9)
  command = '--input', text, '--out', out, '--model_type', kind
  status, _, err = script(*command, '--vocab_size', 5000)
  assert status == 2
  start = 'error: --vocab_size 5000 is too large for this text: set it to '
  assert err.startswith(start) and err.endswith(' or less\n')
  assert err.count('\n') == 1
  assert not out.exists()
  largest = err.removeprefix(start).split()[0]
  status, line, _ = script(*command, '--vocab_size', largest)
  assert status == 0 and f': {largest} pieces' in line


def test_too_small_vocabulary_names_the_smallest_possible_size(tmp_path):
  text, out = tmp_path / 'a.txt', tmp_path / 'a.model'
  text.write_text('the quick brown fox jumps over the lazy dog ' * 9)
  command = '--input', text, '--out', out
  status, _, err = script(*command, '--vocab_size', 50)
  start = 'error: --vocab_size 50 is too small for the characters of this '
  start += 'text: set it to '
  assert status == 2 and err.startswith(start)
  status, _, _ = script(
    *command, '--vocab_size', err.removeprefix(start).split()[0]
  )
  assert status == 0


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--input', 'absent', '--out', 'a.model'], 'error: no file .*absent'),
    (
      ['--input', 'null.jsonl', '--out', 'a.model'],
      'no text to train on in .*1 no text',
    ),
    (['--input', 'null.jsonl'], '--input needs --out'),
    (['--input', 'a.txt', '--out', '.'], 'cannot write --out .*Is a directory'),
    (['--input', 'a.txt', '--out', 'a.txt/b'], 'cannot write --out'),
    (
      ['--input', 'a.txt', '--out', 'b', '--vocab_size', '0'],
      '--vocab_size must',
    ),
    (['--input', 'a.txt', '--out', 'b', '--max_mb', '-1'], '--max_mb must be'),
  ],
)
def test_bad_input_is_one_error_line(
  module, tmp_path, monkeypatch, capsys, arguments, message
):
  (tmp_path / 'a.txt').write_text('text')
  (tmp_path / 'null.jsonl').write_text('{"text": null}\n')
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'argv', ['train.py', *arguments])
  with pytest.raises(SystemExit) as error:
    module.main()
  assert error.value.code == 2
  out, err = capsys.readouterr()
  assert out == '' and err.count('\n') == 1 and err.startswith('error: ')
  assert re.search(message, err)
  assert {p.name for p in tmp_path.iterdir()} == {'a.txt', 'null.jsonl'}


def test_out_replaces_no_device_and_no_link(module, tmp_path):
  fifo, link = tmp_path / 'fifo', tmp_path / 'link'
  os.mkfifo(fifo)
  with pytest.raises(UserError, match='not a regular file'):
    with module.atomic_write(fifo):
      raise AssertionError
  assert fifo.is_fifo()
  link.symlink_to('model')
  with module.atomic_write(link) as file:
    file.write_text('x')
  assert link.is_symlink() and (tmp_path / 'model').read_text() == 'x'


def test_sample_is_within_bounds_and_deterministic(module):
  texts = [f'{i:04d}' for i in range(5000)]
  training, held_out = module.draw(iter(texts), 4000, 10)
  assert len(training) == 1000 and 350 < len(held_out) < 650
  assert training == sorted(training) and held_out == sorted(held_out)
  assert not set(training) & set(held_out)
  # Each quarter of the stream has its share.
  quarters = [sum(i // 1250 == q for i in map(int, training)) for q in range(4)]
  assert min(quarters) > 190
  assert module.draw(iter(texts), 4000, 10) == (training, held_out)
  larger, _ = module.draw(iter(texts), 8000, 10)
  assert set(training) < set(larger)
  assert module.draw(iter(texts), 10**6, 10)[0] == [
    t.encode() for t in texts if t.encode() not in set(held_out)
  ]


def test_max_mb_bounds_the_training_text(module, tmp_path):
  (tmp_path / 'a.txt').write_text('some words\n' * 150_000)
  skipped = {}
  chunks, _ = module.corpus([str(tmp_path)], 'text', False, 1, skipped)
  size = sum(map(len, chunks))
  assert 10**6 - 5000 < size <= 10**6


@pytest.mark.slow
def test_shipped_model_is_reproduced(module, tmp_path):
  if (sys.version_info[:3], sentencepiece.__version__) != ((3, 11, 7), '0.2.3'):
    pytest.skip('the standard library differs between Python versions')
  out = tmp_path / 'a.model'
  status, line, err = script('--out', out)
  assert (status, err) == (0, '')
  assert '4096 pieces, fingerprint 294674c103afc9bb' in line
  assert out.read_bytes() == module.SHIPPED.read_bytes()


def test_library_has_held_out_text(module):
  sentences, held_out = module.library()
  assert 0 < sum(map(len, held_out)) <= tokenizer_training.HELD_OUT_BYTES
  assert next(sentences)
