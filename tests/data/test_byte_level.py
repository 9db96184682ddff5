"""Hugging Face's byte-level tokenizer.json files, and texts of any length.

The tokenizers are trained here, small, with the special tokens and the
pre-tokenizers of the published ones.
"""

import hashlib
import itertools
import json
import pathlib
import pickle
import shutil
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from maskdiff.data import byte_level, sentencepiece_model, tokenizer
from maskdiff.errors import UserError

SHIPPED = pathlib.Path(__file__).parents[2] / 'tokenizer' / 'stdlib_4k.model'
CODE = [
  path.read_bytes().decode()
  for path in sorted(pathlib.Path(pathlib.__file__).parent.glob('*.py'))[::4]
]

# Special tokens that LLaDA and Qwen share.
WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
  r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)

LLADA = ['<|startoftext|>', '<|endoftext|>', '[CLS]', '<|mdm_mask|>']
LLADA_CONFIG = {
  'bos_token': '<|startoftext|>',
  'eos_token': '<|endoftext|>',
  'pad_token': {'content': '<|endoftext|>', 'special': True},
}
QWEN = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']

TEXTS = {
  'empty': '',
  'spaces': '  two  spaces   three ',
  'newlines': '\n\n\n\n\n    x\n\n  \n',
  'tabs': '\tif x:\n\t\treturn\t1\n',
  'line ends': 'a\r\nb\rc\n\r\n',
  'odd spaces': '\xa0a\u3000b\u2028c\x85d\x1c',
  'emoji': 'a \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 b',
  'cjk': '\u4f60\u597d\uff0c\u4e16\u754c \uc548\ub155',
  'zero': 'a\0b',
  'byte order mark': '\ufeffx',
  'space mark': 'a\u2581\u2581 b\u2581',
  'byte-level characters': '\u0120a \u010a\u0100\u0143',
  'special tokens': ''.join(LLADA + QWEN) + ' <s></s><pad><mask>',
  'tool calls': 'a <tool_call>{}</tool_call> b',
  'digits': '1234567890 3.14e-10',
}


def train(normalizer=None, pre_tokenizer=None):
  """Returns a byte-level BPE of 1,000 tokens without special tokens."""
  made = tokenizers.Tokenizer(models.BPE())
  made.normalizer = normalizer
  made.pre_tokenizer = pre_tokenizer or pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(tokenizers.Regex(WORDS), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  trainer = trainers.BpeTrainer(
    vocab_size=1000,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(CODE[:10], trainer)
  return made


@pytest.fixture(scope='module')
def bare():
  return train()


@pytest.fixture
def save(bare, tmp_path):
  """Returns save(tokenizer or None, special tokens, config) -> folder."""

  def save(special=(), config=None, ordinary=(), **changes):
    made = tokenizers.Tokenizer.from_str(bare.to_str())
    made.add_special_tokens(list(special))
    made.add_tokens(list(ordinary))
    return write(tmp_path / 'made', json.loads(made.to_str()) | changes, config)

  return save


def write(folder, spec, config=None):
  folder.mkdir()
  (folder / 'tokenizer.json').write_text(json.dumps(spec))
  if config:
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return folder


@pytest.fixture(scope='module')
def llada(bare, tmp_path_factory):
  made = tokenizers.Tokenizer.from_str(bare.to_str())
  made.add_special_tokens(LLADA)
  folder = tmp_path_factory.mktemp('llada') / 'made'
  return tokenizer.load(write(folder, json.loads(made.to_str()), LLADA_CONFIG))


@pytest.fixture(scope='module')
def qwen(tmp_path_factory):
  made = train(normalizer=normalizers.NFC())
  made.add_special_tokens(QWEN)
  made.add_tokens(['<tool_call>', '</tool_call>'])
  # Settings that training leaves in published files.
  made.enable_truncation(5)
  made.enable_padding(length=7)
  folder = tmp_path_factory.mktemp('qwen') / 'made'
  return tokenizer.load(write(folder, json.loads(made.to_str())))


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
  made = train(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
  made.add_special_tokens(['<|endoftext|>'])
  folder = tmp_path_factory.mktemp('gpt2') / 'made'
  return tokenizer.load(write(folder, json.loads(made.to_str())))


@pytest.fixture(scope='module')
def shipped():
  return tokenizer.load(SHIPPED)


@pytest.fixture(params=['llada', 'qwen', 'gpt2'])
def tok(request):
  return request.getfixturevalue(request.param)


@pytest.fixture(params=['llada', 'qwen', 'gpt2', 'shipped'])
def any_tok(request):
  return request.getfixturevalue(request.param)


@pytest.mark.parametrize('name', TEXTS)
def test_round_trip_is_exact(tok, name):
  text = TEXTS[name]
  ids = tok.encode(text)
  assert tok.decode(ids) == text
  assert b''.join(tok.pieces[i] for i in ids) == text.encode()


def test_round_trip_is_exact_on_code(tok):
  for text, ids in zip(CODE, tok.encode_batch(CODE, 2), strict=True):
    assert tok.decode(ids) == text


def test_round_trip_is_exact_on_every_plane_of_unicode(llada, qwen):
  points = [*range(0xD800), *range(0xE000, 0x110000, 7)]
  text = ''.join(map(chr, points))
  assert llada.decode(llada.encode(text)) == text
  # Composition in newer planes differs between Unicode versions.
  text = text[:0x800]
  assert qwen.decode(qwen.encode(text)) == unicodedata.normalize('NFC', text)


def test_normalization_is_that_of_the_file(llada, qwen):
  assert llada.decode(llada.encode('e\u0301')) == 'e\u0301'
  assert qwen.decode(qwen.encode('e\u0301')) == '\xe9'


def test_ids_are_those_of_the_library(tok):
  library = tokenizers.Tokenizer.from_file(tok.path)
  library.no_truncation()
  library.no_padding()
  for text in [*TEXTS.values(), *CODE[::5]]:
    if any(token in text for token in LLADA + QWEN):
      continue
    expected = library.encode(text, add_special_tokens=False).ids
    assert tok.encode(text) == expected


def test_batch_equals_single(any_tok):
  texts = list(TEXTS.values())
  singles = [any_tok.encode(text) for text in texts]
  assert any_tok.encode_batch(texts, num_threads=1) == singles
  assert any_tok.encode_batch(texts, num_threads=2) == singles


def test_special_ids_as_the_config_beside_names_them(llada):
  assert (llada.bos_id, llada.eos_id, llada.pad_id) == (1000, 1001, 1001)
  assert llada.mask_id == 1003  # by its well-known name
  assert llada.vocab_size == len(llada.pieces) == 1004
  assert set(llada.pieces[1000:]) == {b''}


def test_missing_special_ids_are_none(qwen):
  assert (qwen.bos_id, qwen.mask_id) == (None, None)
  assert (qwen.eos_id, qwen.pad_id) == (1000, 1000)
  assert qwen.vocab_size == 1005
  assert qwen.pieces[1002:] == (b'', b'<tool_call>', b'</tool_call>')
  assert qwen.encode('<tool_call>') == [1003]


@pytest.mark.parametrize(
  'special, expected',
  [
    (['<s>', '</s>', '<pad>', '<mask>'], (1000, 1001, 1002, 1003)),
    (['[MASK]', '<|pad|>', '<eos>', '<bos>'], (1003, 1002, 1001, 1000)),
    (['<|end_of_text|>', '<|begin_of_text|>'], (1001, 1000, 1000, None)),
  ],
)
def test_special_ids_by_well_known_names(save, special, expected):
  tok = tokenizer.load(save(special))
  assert (tok.bos_id, tok.eos_id, tok.pad_id, tok.mask_id) == expected


def test_config_goes_before_the_map_and_that_before_well_known_names(save):
  folder = save(
    ['<|endoftext|>', '<|im_end|>', '<a>', '<b>'],
    {'eos_token': {'content': '<|im_end|>'}, 'bos_token': None},
  )
  (folder / 'special_tokens_map.json').write_text(
    json.dumps({'eos_token': '<a>', 'bos_token': '<b>'})
  )
  tok = tokenizer.load(folder)
  assert (tok.eos_id, tok.bos_id, tok.pad_id) == (1001, 1003, 1001)


@pytest.mark.parametrize('text', TEXTS.values(), ids=TEXTS)
def test_text_never_produces_a_special_id(tok, text):
  special = {i for i, piece in enumerate(tok.pieces) if not piece}
  assert special and special.isdisjoint(tok.encode(text))


def test_special_ids_are_dropped_and_masks_shown(llada):
  a, b = llada.encode('def'), llada.encode(' f()')
  ids = [llada.bos_id, *a, llada.mask_id, *b, llada.eos_id, 1002]
  assert llada.decode(ids) == 'def\u2591 f()'
  assert llada.decode(np.array(ids), mask_text='_') == 'def_ f()'
  assert llada.decode([llada.vocab_size]) == '\ufffd'


def test_any_masks_among_the_bytes_of_a_character_decode(llada):
  ids = llada.encode('\U0001f600')
  assert len(ids) == 4
  for masked in itertools.product([False, True], repeat=4):
    canvas = [
      llada.mask_id if m else i for i, m in zip(ids, masked, strict=True)
    ]
    shown = llada.decode(canvas)
    assert shown.count('\u2591') == sum(masked)
    if any(masked):
      assert set(shown) <= {'\u2591', '\ufffd'}
    else:
      assert shown == '\U0001f600'


def test_fingerprint_is_of_the_file(llada, qwen):
  content = pathlib.Path(llada.path).read_bytes()
  assert llada.fingerprint == hashlib.sha256(content).hexdigest()[:16]
  assert llada.fingerprint != qwen.fingerprint


def test_with_ids_fills_in_what_is_absent(qwen):
  more = tokenizer.with_ids(qwen, mask_id=2000, bos_id=1001)
  assert (more.mask_id, more.bos_id, more.eos_id) == (2000, 1001, 1000)
  assert more.vocab_size == qwen.vocab_size and qwen.mask_id is None
  assert more.decode([*more.encode('ab'), 2000, 2001]) == 'ab\u2591\ufffd'
  assert tokenizer.with_ids(qwen) == qwen


@pytest.mark.parametrize(
  'ids, message',
  [
    ({'mask_id': 64}, r"mask_id=64 is the text b'.' in .*1005 or more"),
    ({'mask_id': 1003}, r"mask_id=1003 is the text b'<tool_call>'"),
    ({'bos_id': -1}, 'bos_id=-1 is not an id in .*1005 or more'),
    ({'mask_id': 1000}, 'mask_id=1000 is also the pad_id of .*of its own'),
    ({'mask_id': 1002, 'bos_id': 1002}, 'mask_id=1002 is also the bos_id'),
  ],
)
def test_with_ids_refuses_what_text_could_produce(qwen, ids, message):
  with pytest.raises(UserError, match=message):
    tokenizer.with_ids(qwen, **ids)


def test_with_ids_on_a_sentencepiece_model(shipped):
  assert tokenizer.with_ids(shipped, mask_id=5).mask_id == 5
  for i in (3, 9, 300):
    with pytest.raises(UserError, match=f'mask_id={i} is the text'):
      tokenizer.with_ids(shipped, mask_id=i)


def test_equal_after_pickling(any_tok):
  copy = pickle.loads(pickle.dumps(any_tok))
  assert copy == any_tok
  text = 'for i in x: <|endoftext|><eos>'
  assert copy.encode(text) == any_tok.encode(text)


def test_usable_in_a_spawned_process(qwen, tmp_path):
  (tmp_path / 'pickle').write_bytes(pickle.dumps(qwen))
  program = (
    'import pickle, sys; tok = pickle.load(open(sys.argv[1], "rb"));'
    'print(tok.encode_batch(["a<|endoftext|> b"], 2)[0])'
  )
  out = subprocess.run(
    [sys.executable, '-c', program, tmp_path / 'pickle'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert json.loads(out.stdout) == qwen.encode('a<|endoftext|> b')
  assert not out.stderr


def test_copy_can_be_loaded_and_is_equal(any_tok, tmp_path):
  folder = tmp_path / 'new' / 'run'
  for _ in range(2):  # a run that is resumed copies again
    tokenizer.copy(any_tok, folder)
    again = tokenizer.load(folder)
    assert again == any_tok
    tokenizer.copy(again, folder)
  assert again.encode(CODE[0]) == any_tok.encode(CODE[0])
  assert not [path for path in folder.iterdir() if path.name.startswith('.')]


def test_copy_takes_the_names_of_special_tokens_along(save, tmp_path):
  folder = save(['<a>', '<b>'], {'eos_token': '<a>'})
  (folder / 'special_tokens_map.json').write_text('{"mask_token": "<b>"}')
  tok = tokenizer.load(folder)
  tokenizer.copy(tok, tmp_path / 'run')
  assert tokenizer.load(tmp_path / 'run') == tok
  assert len(list((tmp_path / 'run').iterdir())) == 3


def test_copy_over_another_tokenizer_is_refused(llada, shipped, tmp_path):
  tokenizer.copy(shipped, tmp_path)
  with pytest.raises(UserError, match='holds tokenizer.model of another.*del'):
    tokenizer.copy(llada, tmp_path)


def test_copy_to_an_unwritable_directory_is_named(llada, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot copy the tokenizer .*file'):
    tokenizer.copy(llada, tmp_path / 'file')


def test_directories(llada, tmp_path):
  with pytest.raises(UserError, match='has neither tokenizer.model nor.* 0 '):
    tokenizer.load(tmp_path)
  shutil.copy(SHIPPED, tmp_path / 'a.model')
  assert tokenizer.load(tmp_path).path == str(tmp_path / 'a.model')
  shutil.copy(SHIPPED, tmp_path / 'b.model')
  with pytest.raises(UserError, match='and 2 other .model files'):
    tokenizer.load(tmp_path)
  shutil.copy(llada.path, tmp_path / 'tokenizer.json')
  assert tokenizer.load(tmp_path) == llada
  shutil.copy(SHIPPED, tmp_path / 'tokenizer.model')
  assert tokenizer.load(tmp_path).path == str(tmp_path / 'tokenizer.model')


BYTE_LEVEL = {
  'type': 'ByteLevel',
  'add_prefix_space': True,
  'trim_offsets': True,
  'use_regex': True,
}
METASPACE = {
  'type': 'Metaspace',
  'replacement': '\u2581',
  'prepend_scheme': 'always',
  'split': True,
}


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'pre_tokenizer': METASPACE}, 'not byte-level BPE: .*SentencePiece .mode'),
    ({'pre_tokenizer': None}, 'not byte-level BPE'),
    ({'pre_tokenizer': BYTE_LEVEL}, 'changes some texts.*set add_prefix_space'),
    ({'normalizer': {'type': 'Lowercase'}}, 'remove normalizers other than'),
    ({'normalizer': {'type': 'NFKC'}}, 'remove normalizers other than'),
    (
      {
        'normalizer': {'type': 'Strip', 'strip_left': True, 'strip_right': True}
      },
      'remove normalizers other than',
    ),
    (
      {'model': {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'a'}},
      'BPE',
    ),
    ({'model': {'type': 'BPE', 'vocab': {}, 'merges': ['a b']}}, 'not a token'),
    ({'added_tokens': []}, 'no eos token: name it .*tokenizer_config.json'),
  ],
)
def test_unfit_tokenizer_is_refused(save, changes, message):
  with pytest.raises(UserError, match=f'tokenizer.json .*{message}') as error:
    tokenizer.load(save(['<|endoftext|>'], **changes))
  assert '\n' not in str(error.value)


def test_missing_bytes_are_named(save):
  folder = save(['</s>'])
  spec = json.loads((folder / 'tokenizer.json').read_text())
  spec['model'] = {'type': 'BPE', 'vocab': {'a': 0, 'b': 1}, 'merges': []}
  spec['added_tokens'][0]['id'] = 2
  (folder / 'tokenizer.json').write_text(json.dumps(spec))
  with pytest.raises(UserError, match='no token for .* bytes.*alphabet'):
    tokenizer.load(folder)


@pytest.mark.parametrize('name', ['eos', 'mask'])
def test_special_token_that_text_can_produce_is_refused(save, name):
  tokens = {'eos': '<|endoftext|>', 'mask': '<mask>'}
  ordinary = tokens.pop(name)
  folder = save(tokens.values(), ordinary=[ordinary])
  with pytest.raises(UserError, match=f'the {name} token .*"special": true'):
    tokenizer.load(folder)


def test_special_token_that_is_an_ordinary_one_is_refused(save):
  folder = save(['</s>'], {'bos_token': 'de'})
  with pytest.raises(UserError, match="the bos token 'de'.*added_tokens"):
    tokenizer.load(folder)


def test_added_token_that_swallows_space_is_refused(save):
  folder = save(
    ['</s>'], ordinary=[tokenizers.AddedToken('<tool>', rstrip=True)]
  )
  with pytest.raises(UserError, match='rstrip'):
    tokenizer.load(folder)


def test_gap_before_an_added_token_is_refused(save):
  folder = save(['</s>', '<mask>'])
  spec = json.loads((folder / 'tokenizer.json').read_text())
  spec['added_tokens'][1]['id'] = 1500
  (folder / 'tokenizer.json').write_text(json.dumps(spec))
  with pytest.raises(UserError, match="'<mask>' the id 1500, but .* 1001"):
    tokenizer.load(folder)


@pytest.mark.parametrize(
  'content', ['', '{', '[]', '{}', '{"model": 1}', '\xff']
)
@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer_config.json'])
def test_broken_json_is_named(save, name, content):
  folder = save(['</s>'])
  (folder / name).write_bytes(content.encode('latin-1'))
  if name == 'tokenizer_config.json' and content in ('{}', '{"model": 1}'):
    return  # names no special token, so the well-known ones are found
  with pytest.raises(UserError, match=f'{name}.? .*config.data.tok') as error:
    tokenizer.load(folder)
  assert '\n' not in str(error.value)


def test_missing_file_is_named(tmp_path):
  with pytest.raises(UserError, match='absent.json.*config.data.tokenizer'):
    tokenizer.load(tmp_path / 'absent.json')


def test_missing_package_is_named(llada, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(UserError, match='pip install -r requirements-data.txt'):
    tokenizer.load(llada.path)


def test_dropout_is_switched_off(save):
  folder = save(['</s>'])
  spec = json.loads((folder / 'tokenizer.json').read_text())
  spec['model']['dropout'] = 0.9
  (folder / 'tokenizer.json').write_text(json.dumps(spec))
  tok = tokenizer.load(folder)
  again = pickle.loads(pickle.dumps(tok))
  expected = tok.encode(CODE[0])
  assert tok.encode(CODE[0]) == again.encode(CODE[0]) == expected


@pytest.mark.parametrize('text', ['a\ud800', '\udfff', '\ud83d\ude00'])
def test_lone_surrogates_are_refused(any_tok, text):
  with pytest.raises(ValueError, match='lone surrogate at character'):
    any_tok.encode_batch(['fine', text], 1)


def test_long_texts_have_the_ids_of_their_whole(any_tok, monkeypatch):
  assert max(map(len, CODE)) < tokenizer.PART_CHARS
  whole = any_tok.encode_batch(CODE, 2)
  monkeypatch.setattr(tokenizer, 'PART_CHARS', 1000)
  monkeypatch.setattr(tokenizer, '_CHARS_AT_ONCE', 5000)
  assert any_tok.encode_batch(CODE, 2) == whole


@pytest.mark.parametrize('name', TEXTS)
def test_parts_without_a_good_cut_lose_no_text(any_tok, name, monkeypatch):
  monkeypatch.setattr(tokenizer, 'PART_CHARS', 20)
  text = TEXTS[name] * 50
  assert any_tok.decode(any_tok.encode(text)) == text


def test_parts_keep_combining_marks_with_their_letters(qwen, monkeypatch):
  monkeypatch.setattr(tokenizer, 'PART_CHARS', 21)
  text = 'e\u0301' * 100
  assert qwen.decode(qwen.encode(text)) == '\xe9' * 100
  marks = '\u0301' * 100
  assert qwen.decode(qwen.encode(marks)) == marks


@pytest.mark.parametrize('name', ['gpt2', 'shipped'])
def test_long_line_without_a_space_is_encoded_in_parts(
  request, name, monkeypatch
):
  tok = request.getfixturevalue(name)
  library = byte_level if name == 'gpt2' else sentencepiece_model
  encode, sizes = library.encode_batch, []

  def spy(processor, texts, num_threads):
    sizes.append([len(text) for text in texts])
    return encode(processor, texts, num_threads)

  monkeypatch.setattr(library, 'encode_batch', spy)
  monkeypatch.setattr(tokenizer, '_CHARS_AT_ONCE', 1 << 19)
  text = 'etaoinshrdlu\u4e00' * 90_000
  assert tok.decode(tok.encode_batch([text], 2)[0]) == text
  assert sum(map(sum, sizes)) == len(text) > 4 * tokenizer.PART_CHARS
  assert max(map(max, sizes)) <= tokenizer.PART_CHARS
  assert max(map(sum, sizes)) <= 1 << 19
