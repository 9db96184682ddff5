"""tokenizer.json of a SentencePiece model gives the ids of the model."""

import json
import pathlib
import random

import pytest

from maskdiff.data import sources, tokenizer_training
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.interop import sentencepiece_json

tokenizers = pytest.importorskip('tokenizers')

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ROOT / 'tokenizer' / 'stdlib_4k.model'
# Texts whose segmentations by merges and by scores may differ.
HARD = [
  '',
  ' ',
  '\n',
  '\n\n\n\n    x',
  'a' * 200,
  '=' * 81 + '  ' * 33,
  ' leading, trailing   ',
  'tabs\tand\r\nreturns\x00\x7f',
  '0123456789' * 7,
  'naïve Größe, 漢字かな, עברית, 👩‍👩‍👧‍👦, e\u0301',
  '<0x41> <unk',
  'def f(x):\n    return x  # \u00a0\n\n\n  y',
]


def fast(path):
  """Returns the converted tokenizer of a model, and the Tokenizer."""
  tokenizer = tokenizer_lib.load(path)
  spec = json.dumps(sentencepiece_json.convert(tokenizer.processor))
  return tokenizers.Tokenizer.from_str(spec), tokenizer


def check(found, tokenizer, texts):
  for text in texts:
    ids = found.encode(text).ids
    assert ids == tokenizer.encode(text), text
    assert found.decode(ids) == text


def test_bpe_has_the_ids_of_the_model():
  found, tokenizer = fast(MODEL)
  draw = random.Random(0)
  random_texts = [
    ''.join(draw.choices(' \n=-aeint_().#"1é\u4e00', k=60)) for _ in range(200)
  ]
  check(found, tokenizer, HARD + random_texts)


@pytest.mark.slow
def test_bpe_has_the_ids_of_the_model_on_the_embedded_corpus():
  found, tokenizer = fast(MODEL)
  plan = sources.plan(['embedded'])
  texts = [text for part in plan.parts[:1] for text in sources.read(part)]
  texts = [t for t in texts if isinstance(t, str) and '\u2581' not in t]
  assert len(texts) > 100
  check(found, tokenizer, [text[:2000] for text in texts])


def test_unigram_has_the_ids_of_the_model(tmp_path):
  draw = random.Random(1)
  words = ['the', 'cat', 'sat', 'on', 'a', 'mat', 'red', 'dog', 'ran', 'far']
  text = [' '.join(draw.choices(words, k=12)) + '.\n' for _ in range(300)]
  model = tokenizer_training.train(iter(text), 300, 'unigram', 1)
  path = tmp_path / 'unigram.model'
  path.write_bytes(model)
  found, tokenizer = fast(path)
  # The names of bytes are known pieces of a unigram model.
  hard = [text for text in HARD if '<0x' not in text]
  check(found, tokenizer, text[:50] + hard)


def test_names_of_control_symbols_are_special():
  found, tokenizer = fast(MODEL)
  assert found.token_to_id('<mask>') == tokenizer.mask_id
  assert found.encode('a<eos>').ids[-1] == tokenizer.eos_id
  # This package never encodes text as a control symbol.
  assert tokenizer.eos_id not in tokenizer.encode('a<eos>')
