"""vocab.json and merges.txt, as Dream publishes its tokenizer."""

import json

import made_tokenizers as made
import pytest

from maskdiff.data import split_patterns, tokenizer
from maskdiff.errors import UserError

TEXTS = (
  '',
  "  the def in\n\n\t12 345 e\u0301 \u4e16 \U0001f600 don\u2019t DON'T ",
  'a\r\n\r\n b  \n',
  '<|mask|> <|im_start|>x<|endoftext|>',
)


def refused(folder):
  with pytest.raises(UserError) as error:
    tokenizer.load(folder)
  message = str(error.value)
  assert '\n' not in message and '\x1b' not in message
  return message


@pytest.fixture
def dream(tmp_path):
  return made.write_vocabulary(tmp_path / 'dream', made.dream_config())


def test_equal_to_the_tokenizer_json_of_the_same_vocabulary(dream, tmp_path):
  value = made.spec(
    normalizer={'type': 'NFC'}, added_tokens=made.added(made.DREAM)
  )
  expected = tokenizer.load(
    made.write_json(tmp_path / 'json', value, made.dream_config())
  )
  tok = tokenizer.load(dream)
  assert tok.path == str(dream / 'vocab.json')
  ids = lambda t: (t.bos_id, t.eos_id, t.pad_id, t.mask_id, t.vocab_size)
  assert ids(tok) == ids(expected)
  assert tok.pieces == expected.pieces
  for text in TEXTS:
    assert tok.encode(text) == expected.encode(text)
  assert tok.decode(tok.encode(TEXTS[1])) == TEXTS[1].replace('e\u0301', '\xe9')


def test_ids_are_those_of_the_library(dream):
  import tokenizers
  from tokenizers import normalizers, pre_tokenizers

  library = tokenizers.Tokenizer(
    tokenizers.models.BPE.from_file(
      str(dream / 'vocab.json'), str(dream / 'merges.txt')
    )
  )
  library.normalizer = normalizers.NFC()
  pattern = tokenizers.Regex(split_patterns.QWEN2)
  library.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(pattern, 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  tok = tokenizer.load(dream)
  for text in TEXTS:
    assert tok.encode(text) == library.encode(text).ids


def test_gpt2_splits_by_its_own_pattern(tmp_path):
  vocab = {**made.vocabulary(), '<|endoftext|>': len(made.vocabulary())}
  config = {'tokenizer_class': 'GPT2TokenizerFast'}
  tok = tokenizer.load(made.write_vocabulary(tmp_path / 'gpt2', config, vocab))
  value = made.spec(pre_tokenizer={**made.BYTE_LEVEL, 'use_regex': True})
  expected = tokenizer.load(made.write_json(tmp_path / 'json', value))
  assert (tok.eos_id, tok.bos_id, tok.mask_id) == (len(vocab) - 1, None, None)
  for text in TEXTS:
    assert tok.encode(text) == expected.encode(text)
  assert tok.decode(tok.encode('e\u0301')) == 'e\u0301'


def test_added_tokens_of_an_older_folder(tmp_path):
  first = len(made.vocabulary())
  config = {
    'tokenizer_class': 'Qwen2Tokenizer',
    'additional_special_tokens': ['<|im_start|>'],
  }
  folder = made.write_vocabulary(tmp_path / 'old', config)
  added = {'<|im_start|>': first + 1, '<|endoftext|>': first, '<x>': first + 2}
  (folder / 'added_tokens.json').write_text(json.dumps(added))
  tok = tokenizer.load(folder)
  assert tok.eos_id == first and tok.encode('<x>') == [first + 2]
  assert first + 1 not in tok.encode('<|im_start|>')
  tokenizer.copy(tok, tmp_path / 'run')
  assert tokenizer.load(tmp_path / 'run') == tok
  assert (tmp_path / 'run' / 'added_tokens.json').is_file()


def test_copy_can_be_loaded_and_is_equal(dream, tmp_path):
  tok = tokenizer.load(dream)
  for _ in range(2):
    tokenizer.copy(tok, tmp_path / 'run')
    again = tokenizer.load(tmp_path / 'run')
    assert again == tok
  names = {path.name for path in (tmp_path / 'run').iterdir()}
  assert names == {'vocab.json', 'merges.txt', 'tokenizer_config.json'}


def test_fingerprint_is_of_all_that_determines_tokens(dream):
  before = tokenizer.load(dream).fingerprint
  config = dream / 'tokenizer_config.json'
  value = json.loads(config.read_text())
  config.write_text(json.dumps(value | {'chat_template': '{{ messages }}'}))
  assert tokenizer.load(dream).fingerprint == before
  config.write_text(json.dumps(value | {'tokenizer_class': 'GPT2Tokenizer'}))
  assert tokenizer.load(dream).fingerprint != before
  config.write_text(json.dumps(value))
  merges = dream / 'merges.txt'
  lines = merges.read_text().splitlines()
  merges.write_text('\r\n'.join(lines))
  assert tokenizer.load(dream).fingerprint == before
  merges.write_text('\n'.join(lines[:-1]))
  assert tokenizer.load(dream).fingerprint != before


def test_tokenizer_json_goes_before_the_vocabulary(dream):
  value = made.spec(added_tokens=made.added(made.DREAM))
  made.write_json(dream, value)
  assert tokenizer.load(dream).path == str(dream / 'tokenizer.json')


@pytest.mark.parametrize(
  'changes, shown',
  [
    ({'tokenizer_class': None}, 'is GPT2Tokenizer, Qwen2Tokenizer, DreamToken'),
    ({'tokenizer_class': 'X\x1b[2J'}, r"DreamTokenizer, not 'X\x1b[2J'"),
    ({'tokenizer_class': ['x']}, 'DreamTokenizer, not'),
    ({'pretokenize_regex': 'a'}, 'has a "pretokenize_regex" that is not'),
    ({'mask_token': '<m>'}, "no id for the special token '<m>': add it to"),
    ({'added_tokens_decoder': [5]}, 'added_tokens_decoder is not an object'),
    ({'added_tokens_decoder': {'-1': {}}}, "'-1' in added_tokens_decoder is"),
    ({'added_tokens_decoder': {'9' * 50: {}}}, 'is not an id'),
    ({'added_tokens_decoder': {'\u0661': {}}}, 'is not an id'),
    ({'added_tokens_decoder': {'264': 'x'}}, 'token 264 of added_tokens_deco'),
    ({'added_tokens_decoder': {'264': {}}}, 'no id for the special token'),
    ({'additional_special_tokens': [5]}, 'are not texts'),
    ({'additional_special_tokens': 5}, 'are not texts'),
  ],
)
def test_malformed_config_is_refused(dream, changes, shown):
  config = dream / 'tokenizer_config.json'
  config.write_text(json.dumps(json.loads(config.read_text()) | changes))
  assert shown in refused(dream)


def test_prefix_space_of_gpt2_is_refused(tmp_path):
  config = {'tokenizer_class': 'GPT2Tokenizer', 'add_prefix_space': True}
  vocab = {**made.vocabulary(), '<|endoftext|>': len(made.vocabulary())}
  folder = made.write_vocabulary(tmp_path / 'gpt2', config, vocab)
  assert 'set add_prefix_space of ByteLevel to false' in refused(folder)


@pytest.mark.parametrize(
  'content, shown',
  [
    (b'#version: 0.2\nd e f\n', "merges has 'd e f', not two tokens"),
    (b'd z\n', "a merge has 'dz', not a token of vocab"),
    (b'\xff', 'merges.txt'),
    (b'd\x1b[2J\n', r"merges has 'd\x1b[2J', not two tokens"),
  ],
)
def test_malformed_merges_are_refused(dream, content, shown):
  (dream / 'merges.txt').write_bytes(content)
  assert shown in refused(dream)


@pytest.mark.parametrize('content', ['[]', '{}', '5', '{"a": "b"}', 'x'])
def test_malformed_vocabulary_is_refused(dream, content):
  (dream / 'vocab.json').write_text(content)
  assert 'vocab.json' in refused(dream)


def test_missing_merges_are_named(dream):
  (dream / 'merges.txt').unlink()
  with pytest.raises(UserError, match='cannot read .*merges.txt'):
    tokenizer.load(dream / 'vocab.json')


def test_link_of_added_tokens_that_leaves_the_folder_is_refused(tmp_path):
  config = {'tokenizer_class': 'Qwen2Tokenizer'}
  folder = made.write_vocabulary(tmp_path / 'in', config)
  (tmp_path / 'private').write_text('{"<|endoftext|>": 264}')
  (folder / 'added_tokens.json').symlink_to('../private')
  assert 'is a link to' in refused(folder)
