"""SentencePiece models of others: damaged, or losing text; tiktoken files."""

import base64
import io
import pathlib
import random

import made_tokenizers as made
import mutations
import pytest
import sentencepiece

from maskdiff.data import tokenizer
from maskdiff.errors import UserError

SHIPPED = pathlib.Path(__file__).parents[2] / 'tokenizer' / 'stdlib_4k.model'
TEXT = ''.join(map(chr, range(0x250))) + '  a  \ufb01 \u2581 \u2603 e\u0301\n\n'
TIKTOKEN = b''.join(
  base64.b64encode(bytes([byte])) + b' %d\n' % byte for byte in range(256)
)


def extended(number, message):
  """Returns the shipped model with fields added to a message in it."""
  head = bytes([number << 3 | 2, len(message)])
  return SHIPPED.read_bytes() + head + message


def refused(path, content):
  path.write_bytes(content)
  with pytest.raises(UserError) as error:
    tokenizer.load(path)
  message = str(error.value)
  assert message.isprintable()
  return message


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'a.model'


def test_shipped_model_keeps_text(path):
  path.write_bytes(extended(3, b'\x18\x00'))
  tok = tokenizer.load(path)
  assert tok.decode(tok.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
  'number, message, shown',
  [
    (3, b'\x18\x01', r'(add_dummy_prefix)'),
    (3, b'\x20\x01', r'(remove_extra_whitespaces)'),
    (3, b'\x28\x00', r'(escape_whitespaces)'),
    (3, b'\x18\x01\x20\x05', r'(add_dummy_prefix, remove_extra_whitespaces)'),
    (2, b'\x98\x02\x00', 'is not a SentencePiece model'),
    # Fields of another wire type, which the library skips.
    (3, b'\x1a\x01x', 'is not a SentencePiece model'),
    (3, b'\x10\x00', 'is not a SentencePiece model'),
    (3, b'\x1b', 'is not a SentencePiece model'),
    (3, b'\x18' + b'\xff' * 9, 'is not a SentencePiece model'),
  ],
)
def test_model_that_loses_text_is_refused(path, number, message, shown):
  assert shown in refused(path, extended(number, message))


def test_normalization_by_a_table_is_refused(path):
  content = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the def in'] * 20),
    model_writer=content,
    vocab_size=275,
    hard_vocab_limit=False,
    byte_fallback=True,
    control_symbols=['<pad>', '<bos>', '<eos>', '<mask>'],
    pad_id=-1,
    bos_id=-1,
    eos_id=-1,
    normalization_rule_name='nmt_nfkc',
    minloglevel=2,
  )
  assert '(precompiled_charsmap, add_dummy_prefix' in refused(
    path, content.getvalue()
  )


@pytest.mark.parametrize('seed', range(3))
def test_damaged_model_is_refused_or_keeps_text(path, seed):
  rng = random.Random(seed)
  content = SHIPPED.read_bytes()
  for _ in range(15):
    path.write_bytes(mutations.mutated_bytes(rng, content))
    try:
      tok = tokenizer.load(path)
    except UserError as error:
      assert str(error).isprintable()
    else:
      assert tok.decode(tok.encode(TEXT)) == TEXT


@pytest.mark.parametrize('size', [0, 1, 100, 30_000, 60_000])
def test_truncated_model_is_refused(path, size):
  assert 'SentencePiece' in refused(path, SHIPPED.read_bytes()[:size])
  refused(path, random.Random(size).randbytes(size))


def test_tiktoken_file_beside_a_tokenizer_json_is_not_used(tmp_path):
  made.write_json(tmp_path, made.spec())
  (tmp_path / 'tokenizer.model').write_bytes(TIKTOKEN)
  tok = tokenizer.load(tmp_path)
  assert tok.path == str(tmp_path / 'tokenizer.json')
  tokenizer.copy(tok, tmp_path / 'run')
  assert tokenizer.load(tmp_path / 'run') == tok


def test_tiktoken_file_beside_a_vocabulary_is_not_used(tmp_path):
  made.write_vocabulary(tmp_path, made.dream_config())
  (tmp_path / 'tokenizer.model').write_bytes(TIKTOKEN)
  assert tokenizer.load(tmp_path).path == str(tmp_path / 'vocab.json')


def test_tiktoken_file_alone_is_named(tmp_path):
  message = refused(tmp_path / 'tokenizer.model', TIKTOKEN)
  assert 'is a tiktoken file, not a SentencePiece model' in message
  (tmp_path / 'b.model').write_bytes(TIKTOKEN)
  with pytest.raises(UserError, match='is a tiktoken file'):
    tokenizer.load(tmp_path)


def test_sentencepiece_model_goes_before_a_tokenizer_json(tmp_path):
  made.write_json(tmp_path, made.spec())
  (tmp_path / 'tokenizer.model').write_bytes(SHIPPED.read_bytes())
  assert tokenizer.load(tmp_path).path == str(tmp_path / 'tokenizer.model')
