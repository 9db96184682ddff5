"""tokenizer.json files of others: malformed, hostile, or losing text."""

import json
import random
import resource
import time

import made_tokenizers as made
import mutations
import pytest

from maskdiff.data import tokenizer
from maskdiff.errors import UserError

TEXT = (
  '  the def in\n\n\t12 \u2603 e\u0301 \u4e16 \U0001f600<|im_end|> </s>\r\n '
)


def load(folder, value, config=None):
  return tokenizer.load(made.write_json(folder, value, config))


def refused(folder, value, config=None):
  """Returns the message with which a tokenizer.json is refused."""
  with pytest.raises(UserError) as error:
    load(folder, value, config)
  message = str(error.value)
  assert '\n' not in message and '\x1b' not in message and len(message) < 800
  return message


def test_made_tokenizer_keeps_text(tmp_path):
  tok = load(tmp_path, made.spec())
  assert tok.decode(tok.encode(TEXT)) == TEXT
  assert [tok.piece(i) for i in tok.encode('def the')] == [b'def', b' the']


@pytest.mark.parametrize(
  'step, shown',
  [
    (
      made.split('\u2603', 'Removed'),
      r'Split of .* has the behavior .Removed.',
    ),
    (made.split(' ', 'Removed', 'String'), "Split of ' ' has the behavior"),
    (made.split(' ', 'isolated', 'String'), "the behavior 'isolated'"),
    ({'type': 'Punctuation', 'behavior': 'Removed'}, 'Punctuation has the beh'),
    ({'type': 'Whitespace'}, "'Whitespace' is not one of ByteLevel, Split"),
    ({'type': 'WhitespaceSplit'}, "'WhitespaceSplit' is not one of"),
    ({'type': 'BertPreTokenizer'}, "'BertPreTokenizer' is not one of"),
    (
      {'type': 'CharDelimiterSplit', 'delimiter': 'x'},
      "'CharDelimiterSplit' is",
    ),
    ({'type': 'Metaspace', 'replacement': '_'}, "'Metaspace' is not one of"),
    (made.BYTE_LEVEL, 'has ByteLevel twice'),
    ({**made.BYTE_LEVEL, 'add_prefix_space': True}, 'set add_prefix_space'),
  ],
)
def test_pre_tokenizer_that_loses_text_is_refused(tmp_path, step, shown):
  value = made.spec(pre_tokenizer=made.sequence(step, made.BYTE_LEVEL))
  with pytest.raises(UserError, match=f'changes some texts: .*{shown}'):
    load(tmp_path, value)


@pytest.mark.parametrize(
  'normalizer, shown',
  [
    (
      {'type': 'Replace', 'pattern': {'String': '\u2603'}, 'content': ''},
      'Replace',
    ),
    ({'type': 'Lowercase'}, 'Lowercase'),
    ({'type': 'NFKC'}, 'NFKC'),
    ({'type': 'NFD'}, 'NFD'),
    ({'type': 'Prepend', 'prepend': 'x'}, 'Prepend'),
    ({'type': 'ByteLevel'}, 'ByteLevel'),
    ({'type': 'Sequence', 'normalizers': [{'type': 'StripAccents'}]}, 'StripA'),
    (
      {
        'type': 'Sequence',
        'normalizers': [
          {'type': 'NFC'},
          {'type': 'Sequence', 'normalizers': [{'type': 'Strip'}]},
        ],
      },
      'Strip',
    ),
  ],
)
def test_normalizer_other_than_nfc_is_refused(tmp_path, normalizer, shown):
  value = made.spec(normalizer=normalizer)
  message = refused(tmp_path, value)
  assert f"remove normalizers other than NFC ('{shown}" in message


@pytest.mark.parametrize('kind', ['Strip', 'Replace', 'Metaspace', 'WordPiece'])
def test_decoder_that_loses_text_is_refused(tmp_path, kind):
  for decoder in (
    {'type': kind},
    {'type': 'Sequence', 'decoders': [{'type': 'ByteLevel'}, {'type': kind}]},
  ):
    message = refused(tmp_path, made.spec(decoder=decoder))
    assert f"its decoder '{kind}' is not ByteLevel" in message


@pytest.mark.parametrize(
  'changes, shown',
  [
    ({'end_of_word_suffix': '</w>'}, 'its end_of_word_suffix'),
    ({'continuing_subword_prefix': '##'}, 'its continuing_subword_prefix'),
    ({'vocab': {}}, 'vocab is not an object with tokens'),
    ({'vocab': []}, 'vocab is not an object'),
    ({'vocab': {'a': 0}}, 'no token for 242 of the bytes'),
    ({'merges': None}, 'merges is not a list'),
    ({'merges': ['zz e']}, "a merge has 'zz', not a token"),
    ({'merges': [['z', 'e']]}, "a merge has 'ze', not a token"),
    ({'merges': ['a  b']}, 'not two tokens'),
    ({'merges': [['a', 1]]}, 'not two tokens'),
    ({'merges': [['a', '']]}, 'not two tokens'),
    ({'merges': ['\x1b]0;x\x07']}, r"merges has '\x1b]0;x\x07', not two"),
    ({'ignore_merges': 'yes'}, 'ignore_merges is not true or false'),
    ({'type': 'Unigram'}, 'not byte-level BPE'),
  ],
)
def test_malformed_model_is_refused(tmp_path, changes, shown):
  value = made.spec(model=made.model(**changes))
  assert shown in refused(tmp_path, value)


@pytest.mark.parametrize(
  'i', [-1, 2**21, 2**31, 2**40, 10**400, 1.5, True, '7']
)
def test_id_out_of_range_is_refused(tmp_path, i):
  vocab = {**made.vocabulary(), '\x1bz': i}
  message = refused(tmp_path, made.spec(model=made.model(vocab=vocab)))
  assert r"the id of '\x1bz' is" in message
  token = made.added(['<|endoftext|>'], id=i)
  assert 'not an integer' in refused(tmp_path, made.spec(added_tokens=token))


def test_two_tokens_with_one_id_are_refused(tmp_path):
  vocab = {**made.vocabulary(), 'zz': 5}
  message = refused(tmp_path, made.spec(model=made.model(vocab=vocab)))
  assert 'two tokens of vocab have the same id' in message
  value = made.spec(added_tokens=made.added(['<|endoftext|>'], id=5))
  assert 'and another token have the id 5' in refused(tmp_path, value)


def test_hole_in_the_ids_is_a_token_without_text(tmp_path):
  vocab = {**made.vocabulary(), 'qq': 300}
  first = len(made.vocabulary()) + 1
  value = made.spec(
    model=made.model(vocab=vocab),
    added_tokens=made.added(['<|endoftext|>'], id=first),
  )
  tok = load(tmp_path, value)
  assert (tok.vocab_size, tok.eos_id) == (301, first)
  assert tok.pieces[299] == b'' and tok.pieces[300] == b'qq'
  assert tok.decode(tok.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
  'token, shown',
  [
    ({'lstrip': True}, "set lstrip and rstrip of the added token '<x>'"),
    ({'rstrip': True}, "set lstrip and rstrip of the added token '<x>'"),
    ({'content': ''}, 'is empty or twice'),
    ({'content': '<|endoftext|>'}, 'is empty or twice'),
    ({'content': ['x']}, 'content is not a text'),
    ({'special': 1}, 'special is not true or false'),
    ({'id': None}, 'not an integer'),
    ({'content': 'x' * 1001}, 'has more than 1,000 characters'),
  ],
)
def test_malformed_added_token_is_refused(tmp_path, token, shown):
  first = len(made.vocabulary())
  entry = made.added(['<x>'], id=first + 1, special=False)[0] | token
  value = made.spec(added_tokens=[*made.added(['<|endoftext|>']), entry])
  assert shown in refused(tmp_path, value)


def test_many_added_tokens_are_refused(tmp_path):
  contents = [f'{i:0999}' for i in range(1100)]
  value = made.spec(added_tokens=made.added(contents))
  assert 'more than 1,048,576 characters in them' in refused(tmp_path, value)
  value = made.spec(added_tokens=made.added(map(str, range(1 << 16 | 1))))
  assert 'more than 65,536 added tokens' in refused(tmp_path, value)


def test_added_token_that_is_not_in_nfc_is_refused(tmp_path):
  first = len(made.vocabulary())
  tokens = [
    *made.added(['<|endoftext|>']),
    *made.added(['e\u0301'], id=first + 1, special=False),
  ]
  value = made.spec(added_tokens=tokens, normalizer={'type': 'NFC'})
  assert 'is not in NFC' in refused(tmp_path, value)
  tok = load(tmp_path, made.spec(added_tokens=tokens))
  assert tok.decode(tok.encode('e\u0301')) == 'e\u0301'


@pytest.mark.parametrize(
  'content, ignore_merges', [('def', False), ('q', True)]
)
def test_special_token_that_the_model_produces_is_refused(
  tmp_path, content, ignore_merges
):
  vocab = {**made.vocabulary()}
  special = made.added([content], id=vocab[content])
  first = len(vocab)
  eos = made.added(['<|endoftext|>'], id=first)
  value = made.spec(
    model=made.model(ignore_merges=ignore_merges), added_tokens=special + eos
  )
  message = refused(tmp_path, value)
  assert f'text could produce the special token {content!r}' in message


@pytest.mark.parametrize('ignore_merges', [False, True])
def test_special_tokens_may_be_in_the_vocabulary(tmp_path, ignore_merges):
  contents = ('<|endoftext|>', 'word')
  first = len(made.vocabulary())
  vocab = made.vocabulary() | {t: first + i for i, t in enumerate(contents)}
  value = made.spec(
    model=made.model(vocab=vocab, ignore_merges=ignore_merges),
    added_tokens=made.added(contents),
  )
  tok = load(tmp_path, value)
  assert (tok.eos_id, tok.vocab_size) == (first, first + 2)
  text = 'word <|endoftext|>'
  assert not {first, first + 1} & set(tok.encode(text))
  assert tok.decode(tok.encode(text)) == text


def test_added_token_that_spells_another_text_is_refused(tmp_path):
  # The model writes a space as this character.
  i = made.vocabulary()['\u0120']
  tokens = made.added(['\u0120'], id=i, special=False)
  value = made.spec(added_tokens=tokens + made.added(['<|endoftext|>']))
  assert 'is also another text in vocab' in refused(tmp_path, value)


@pytest.mark.parametrize('step', [None, 5, 'ByteLevel', {}, {'type': 1}])
def test_malformed_step_is_refused(tmp_path, step):
  value = made.spec(pre_tokenizer=made.sequence(step, made.BYTE_LEVEL))
  assert 'pre_tokenizer' in refused(tmp_path, value)
  value = made.spec(normalizer={'type': 'Sequence', 'normalizers': step})
  assert 'normalizer' in refused(tmp_path, value)


@pytest.mark.parametrize(
  'split',
  [
    {'pattern': 'a'},
    {'pattern': {}},
    {'pattern': {'Regex': 1}},
    {'pattern': {'String': ''}},
    {'pattern': {'Glob': 'a'}},
    {'pattern': {'Regex': 'a', 'String': 'b'}},
    {'pattern': {'Regex': r'\p{Klingon}'}},
    {'invert': None},
  ],
)
def test_malformed_split_is_refused(tmp_path, split):
  step = {**made.split(), **split}
  refused(
    tmp_path, made.spec(pre_tokenizer=made.sequence(step, made.BYTE_LEVEL))
  )


@pytest.mark.parametrize('pattern', ['(a|a)*b|(x+x+)+y', 'a*b', r'\s+$'])
def test_slow_pattern_is_refused_by_its_text(tmp_path, pattern):
  step = made.split(pattern)
  value = made.spec(pre_tokenizer=made.sequence(step, made.BYTE_LEVEL))
  message = refused(tmp_path, value)
  assert f'has the pattern {pattern!r}' in message
  assert 'a time that is not proportional to the text' in message


def test_many_steps_are_refused(tmp_path):
  digits = {'type': 'Digits', 'individual_digits': True}
  for steps in ([digits] * 101, [made.sequence(*[digits] * 60)] * 2):
    value = made.spec(pre_tokenizer=made.sequence(*steps, made.BYTE_LEVEL))
    assert 'pre_tokenizer has more than 100 steps' in refused(tmp_path, value)


def test_steps_that_keep_text_are_accepted(tmp_path):
  steps = made.sequence(
    made.sequence(made.split('[0-9]{1,3}', 'MergedWithPrevious')),
    made.split('\u2603', 'Contiguous', 'String'),
    {'type': 'Digits', 'individual_digits': True},
    {'type': 'Punctuation', 'behavior': 'MergedWithNext'},
    {**made.BYTE_LEVEL, 'use_regex': True},
  )
  tok = load(tmp_path, made.spec(pre_tokenizer=steps))
  assert tok.decode(tok.encode(TEXT * 3)) == TEXT * 3


def test_settings_of_another_use_do_not_matter(tmp_path):
  template = {
    'type': 'TemplateProcessing',
    'single': [{'SpecialToken': {'id': '<|im_start|>', 'type_id': 0}}],
    'pair': [],
    'special_tokens': {},
  }
  value = made.spec(
    post_processor=template,
    truncation={'max_length': 2},
    padding={'strategy': {'Fixed': 50}},
    model=made.model(dropout=0.9, unk_token='q', byte_fallback=True),
  )
  plain = load(tmp_path / 'plain', made.spec())
  assert load(tmp_path / 'more', value).encode(TEXT) == plain.encode(TEXT)


@pytest.mark.parametrize('key', ['pre_tokenizer', 'normalizer', 'decoder'])
@pytest.mark.parametrize('depth', [60, 100_000])
def test_nested_sequences_are_refused_in_one_line(tmp_path, key, depth):
  children = {'pre_tokenizer': 'pretokenizers', 'normalizer': 'normalizers'}
  head = f'{{"type": "Sequence", "{children.get(key, "decoders")}": ['
  text = json.dumps(made.spec(**{key: 'HERE'}))
  text = text.replace('"HERE"', head * depth + ']}' * depth)
  tmp_path.joinpath('tokenizer.json').write_text(text)
  with pytest.raises(UserError, match='nested more than 100 levels deep'):
    tokenizer.load(tmp_path)


@pytest.mark.parametrize(
  'value', [[], 5, {'content': 5}, {'content': ['x']}, True]
)
def test_special_token_that_is_not_a_text_is_named(tmp_path, value):
  message = refused(tmp_path, made.spec(), {'eos_token': value})
  assert 'tokenizer_config.json has the eos_token' in message


def test_control_characters_in_names_are_escaped(tmp_path):
  message = refused(tmp_path, made.spec(), {'mask_token': '\x1b[2J\u202e'})
  assert r"mask token '\x1b[2J\u202e'" in message


def test_control_characters_in_a_path_are_escaped(tmp_path):
  folder = tmp_path / 'a\x1b[2J\nb'
  message = refused(folder, made.spec(model=made.model(type='Unigram')))
  assert r'a\x1b[2J b/tokenizer.json is not byte-level BPE' in message


def test_lone_surrogate_is_refused(tmp_path):
  tmp_path.joinpath('tokenizer.json').write_text(
    json.dumps(made.spec()).replace('<|im_end|>', r'\ud800')
  )
  with pytest.raises(UserError, match='half of a surrogate pair'):
    tokenizer.load(tmp_path)


def test_link_that_leaves_the_folder_is_not_copied(tmp_path):
  private = tmp_path / 'private.json'
  private.write_text('{"password": "secret"}')
  folder = made.write_json(tmp_path / 'in', made.spec())
  (folder / 'tokenizer_config.json').symlink_to(private)
  with pytest.raises(UserError, match='is a link to .*private.json'):
    tokenizer.load(folder)
  (folder / 'tokenizer_config.json').unlink()
  (folder / 'tokenizer.json').rename(private)
  (folder / 'tokenizer.json').symlink_to('../private.json')
  with pytest.raises(UserError, match='is a link to .*private.json'):
    tokenizer.load(folder)
  # The user may name a link.
  assert tokenizer.load(folder / 'tokenizer.json').vocab_size == 267


def test_folder_of_the_hub_cache_is_accepted(tmp_path):
  blobs = made.write_json(tmp_path / 'blobs', made.spec(), {'pad_token': None})
  folder = tmp_path / 'snapshots' / '0123'
  folder.mkdir(parents=True)
  config = blobs / ('c' * 40)
  (blobs / 'tokenizer_config.json').rename(config)
  (blobs / 'tokenizer.json').rename(blobs / ('a' * 64))
  (folder / 'tokenizer.json').symlink_to('../../blobs/' + 'a' * 64)
  (folder / 'tokenizer_config.json').symlink_to(f'../../blobs/{config.name}')
  tok = tokenizer.load(folder)
  tokenizer.copy(tok, tmp_path / 'out')
  copied = tmp_path / 'out' / 'tokenizer_config.json'
  assert not copied.is_symlink()
  assert copied.read_bytes() == config.read_bytes()


def check_refused_or_exact(path):
  """Checks that a damaged tokenizer raises UserError or keeps a text."""
  try:
    tok = tokenizer.load(path)
  except UserError as error:
    message = str(error)
    assert message.isprintable(), ascii(message)
  else:
    assert tok.decode(tok.encode(TEXT)) in (
      TEXT,
      TEXT.replace('e\u0301', '\xe9'),
    )
    assert tok.vocab_size <= 1 << 21


@pytest.mark.parametrize('seed', range(4))
def test_damaged_files_raise_user_errors_only(tmp_path, seed):
  rng = random.Random(seed)
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  start = time.process_time()
  json_folder = made.write_json(
    tmp_path / 'j', made.spec(), made.dream_config()
  )
  vocab_folder = made.write_vocabulary(tmp_path / 'v', made.dream_config())
  files = [p for f in (json_folder, vocab_folder) for p in f.iterdir()]
  for _ in range(60):
    path = rng.choice(sorted(files))
    content = path.read_bytes()
    if path.suffix == '.json' and rng.random() < 0.6:
      value = mutations.mutated_json(rng, json.loads(content))
      damaged = json.dumps(value).encode()
    else:
      damaged = mutations.mutated_bytes(rng, content)
    path.write_bytes(damaged)
    check_refused_or_exact(path.parent)
    path.write_bytes(content)
  assert time.process_time() - start < 30
  grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
  assert grown < 500 << 10  # KiB
