"""The tokenizer loses nothing, and text cannot produce control ids."""

import io
import itertools
import pathlib
import pickle

import numpy as np
import pytest
import sentencepiece

from maskdiff.data import sources, tokenizer
from maskdiff.errors import UserError

MODEL = pathlib.Path(__file__).parents[2] / 'tokenizer' / 'stdlib_4k.model'

TEXTS = {
  'empty': '',
  'spaces': '  two  spaces   three ',
  'newlines': '\n\n\n\n\n    x\n\n  \n',
  'tabs': '\tif x:\n\t\treturn\t1\n',
  'line ends': 'a\r\nb\rc\n\r\n',
  'emoji': 'a \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 b',
  'cjk': '\u4f60\u597d\uff0c\u4e16\u754c \uc548\ub155',
  'combining': 'e\u0301 \u00e9 \ufb01 \u2460',
  'zero': 'a\0b',
  'byte order mark': '\ufeffx',
  'space mark': 'a\u2581\u2581 b\u2581',
  'control symbols': '<mask><pad> <bos><eos><unk><user>',
  'byte pieces': '<0x41><0xE2>',
  'digits': '1234567890 3.14e-10',
}


@pytest.fixture(scope='module')
def tok():
  return tokenizer.load(MODEL)


@pytest.mark.parametrize('name', TEXTS)
def test_round_trip_is_exact(tok, name):
  text = TEXTS[name]
  assert tok.decode(tok.encode(text)) == text


def test_round_trip_is_exact_on_the_corpus(tok):
  sample = list(itertools.islice(sources.embedded(), 0, None, 25))
  texts = [text for _, text in sample]
  assert len(texts) > 20
  for text, ids in zip(texts, tok.encode_batch(texts, 2), strict=True):
    assert tok.decode(ids) == text


def test_round_trip_is_exact_on_every_plane_of_unicode(tok):
  points = [*range(0xD800), *range(0xE000, 0x110000, 7)]
  text = ''.join(map(chr, points))
  assert tok.decode(tok.encode(text)) == text


def test_batch_equals_single(tok):
  texts = list(TEXTS.values())
  singles = [tok.encode(text) for text in texts]
  assert tok.encode_batch(texts, num_threads=1) == singles
  assert tok.encode_batch(texts, num_threads=2) == singles


def test_ids_of_the_shipped_model(tok):
  assert (tok.pad_id, tok.bos_id, tok.eos_id, tok.mask_id) == (0, 1, 2, 4)
  names = [tok.processor.id_to_piece(i) for i in range(3, 9)]
  assert names == [
    '<unk>', '<mask>', '<system>', '<user>', '<assistant>', '<end_of_turn>'
  ]  # fmt: skip
  assert tok.vocab_size == len(tok.pieces) == 4096


@pytest.mark.parametrize('text', TEXTS.values(), ids=TEXTS)
def test_text_never_produces_a_control_id(tok, text):
  control = set(range(9))
  assert control.isdisjoint(tok.encode(text))


def test_control_ids_are_dropped_and_masks_shown(tok):
  a, b = tok.encode('def'), tok.encode(' f()')
  ids = [tok.bos_id, *a, tok.mask_id, *b, tok.eos_id, tok.pad_id, 6]
  assert tok.decode(ids) == 'def\u2591 f()'
  assert tok.decode(np.array(ids), mask_text='_') == 'def_ f()'
  assert tok.decode([]) == ''


def test_any_masks_among_the_bytes_of_a_character_decode(tok):
  ids = tok.encode('\U0001f600')
  assert len(ids) == 4  # bytes, since the corpus hardly has emoji
  for masked in itertools.product([False, True], repeat=4):
    canvas = [tok.mask_id if m else i for i, m in zip(ids, masked, strict=True)]
    shown = tok.decode(canvas)
    assert shown.count('\u2591') == sum(masked)
    if any(masked):
      assert set(shown) <= {'\u2591', '\ufffd'}
    else:
      assert shown == '\U0001f600'


def test_ids_above_the_vocabulary_are_shown_as_replacement(tok):
  assert tok.decode([*tok.encode('ab'), tok.vocab_size]) == 'ab\ufffd'


def test_negative_ids_are_refused(tok):
  with pytest.raises(IndexError):
    tok.decode([-1])


def test_pieces_are_the_bytes_of_every_id(tok):
  text = ''.join(TEXTS.values())
  size = sum(len(tok.pieces[i]) for i in tok.encode(text))
  assert size == len(text.encode())


@pytest.mark.parametrize('spaces', [0, 4, 8, 12, 16])
def test_line_break_and_indentation_are_one_token(tok, spaces):
  ids = tok.encode('x:\n' + ' ' * spaces + 'return')
  shown = [tok.pieces[i] for i in ids]
  assert shown[-2:] == [b'\n' + b' ' * spaces, b'return']


def test_equal_after_pickling(tok):
  copy = pickle.loads(pickle.dumps(tok))
  assert copy == tok
  assert copy.encode('for i in x:') == tok.encode('for i in x:')


def test_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match='absent.model.*config.data.tokenizer'):
    tokenizer.load(tmp_path / 'absent.model')


@pytest.mark.parametrize('content', [b'', b'<html>not found</html>'])
def test_file_that_is_not_a_model_is_named(tmp_path, content):
  path = tmp_path / 'page.model'
  path.write_bytes(content)
  with pytest.raises(UserError, match='page.model is not a SentencePiece'):
    tokenizer.load(path)


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'byte_fallback': True, 'pad_id': 3}, 'no control symbol <bos>.*<mask>'),
    (
      {
        'byte_fallback': True,
        'control_symbols': ['<pad>', '<bos>', '<eos>'],
        'user_defined_symbols': ['<mask>'],
      },
      'no control symbol <mask>',
    ),
    (
      {'control_symbols': ['<pad>', '<bos>', '<eos>', '<mask>']},
      'no byte fallback',
    ),
  ],
)
def test_unfit_model_is_refused(tmp_path, settings, message):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['some text to learn from'] * 10),
    model_writer=model,
    vocab_size=300,
    hard_vocab_limit=False,
    minloglevel=2,
    **settings,
  )
  path = tmp_path / 'other.model'
  path.write_bytes(model.getvalue())
  with pytest.raises(UserError, match=f'other.model has {message}'):
    tokenizer.load(path)
