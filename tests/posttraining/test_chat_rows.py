"""Files of conversations become rows of prompts and answers."""

import gzip
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from maskdiff.data import packing, prepare, records, row_reader, sources
from maskdiff.data import rows as rows_lib
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError
from maskdiff.posttraining import chat, chat_rows

MODEL = pathlib.Path(__file__).parents[2] / 'tokenizer' / 'stdlib_4k.model'
BOS, EOS = 1, 2


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.load(MODEL)


def say(*contents):
  """Returns a record of alternating turns; a system turn begins with '!'."""
  first = contents[0].startswith('!')
  roles = ['system', *['user', 'assistant'] * len(contents)][not first :]
  turns = zip(roles, [contents[0].lstrip('!'), *contents[1:]], strict=False)
  return {'messages': [{'role': role, 'content': c} for role, c in turns]}


def write(path, values, compress=False):
  lines = [
    v if isinstance(v, bytes) else json.dumps(v).encode() for v in values
  ]
  data = b'\n'.join(lines) + b'\n'
  path.write_bytes(gzip.compress(data, mtime=0) if compress else data)
  return path


def prepared(
  source, out, tokenizer, layout='packed', fraction=0.0, workers=0, **changes
):
  """Returns the manifest of prepared conversations."""
  changes = {'row_length': 64, 'template': chat.load('plain')} | changes
  encode = chat_rows.ChatDocuments(**changes)
  return prepare.prepare(
    sources.plan([str(source)], records=True),
    tokenizer,
    out,
    row_length=encode.row_length,
    heldout_fraction=fraction,
    workers=workers,
    layout=packing.Layout(layout) if isinstance(layout, str) else layout,
    encode=encode,
    encode_settings=encode.settings,
    log=lambda line: None,
  )


def documents(out, split='train'):
  """Returns (text with answers in brackets) of all documents of a split."""
  manifest = records.read_manifest(out)
  tokenizer = tokenizer_lib.load(out)
  source = row_reader.RowSource(out, manifest, split)
  found = []
  for i in range(len(source)):
    row = rows_lib.map_columns(lambda x: x[0], source.read([i]))
    for n in np.unique(row.doc[row.doc >= 0]):
      text = ''
      for token, is_answer in zip(
        row.tokens[row.doc == n], row.answer[row.doc == n], strict=True
      ):
        piece = {BOS: '<', EOS: '>'}.get(int(token))
        piece = tokenizer.piece(int(token)).decode() if piece is None else piece
        text += f'[{piece}]' if is_answer else piece
      found.append(text.replace('][', ''))
  return found


PAIR = say('a?', 'A')
PAIR_TEXT = '<user\na?>assistant\n[A>]'


@pytest.mark.parametrize(
  'name', ['x.jsonl', 'x.json', 'x.jsonl.gz', 'x.parquet']
)
def test_formats(tokenizer, tmp_path, name):
  values = [PAIR, {'prompt': 'b?', 'completion': 'B'}]
  path = tmp_path / name
  if name.endswith('.parquet'):
    nothing = dict.fromkeys(['messages', 'prompt', 'completion'])
    table = pyarrow.Table.from_pylist([nothing | value for value in values])
    pyarrow.parquet.write_table(table, path)
  else:
    write(path, values, name.endswith('.gz'))
  manifest = prepared(path, tmp_path / 'rows', tokenizer)
  assert documents(tmp_path / 'rows') == [
    PAIR_TEXT,
    '<user\nb?>assistant\n[B>]',
  ]
  assert manifest.columns == {'doc': 'int16', 'answer': 'bits'}
  row_reader.verify(tmp_path / 'rows', manifest, rows='all')


LONG = say('!s', 'a?', 'A', 'b?', 'B')


@pytest.mark.parametrize(
  'turns, expected',
  [
    ('last', ['<system\ns>user\na?>assistant\nA>user\nb?>assistant\n[B>]']),
    ('all', ['<system\ns>user\na?>assistant\n[A>]user\nb?>assistant\n[B>]']),
    (
      'each',
      [
        '<system\ns>user\na?>assistant\n[A>]',
        '<system\ns>user\na?>assistant\nA>user\nb?>assistant\n[B>]',
      ],
    ),
  ],
)
def test_choice_of_turns(tokenizer, tmp_path, turns, expected):
  source = write(tmp_path / 'x.jsonl', [LONG, say('no answer')])
  manifest = prepared(source, tmp_path / 'rows', tokenizer, turns=turns)
  assert documents(tmp_path / 'rows') == expected
  assert manifest.skipped == {chat_rows.NO_ANSWER: 1}


def test_a_row_has_both_answers_of_a_preference(tokenizer, tmp_path):
  pair = lambda chosen, rejected: {
    'prompt': 'a?',
    'chosen': chosen,
    'rejected': rejected,
  }
  source = write(
    tmp_path / 'x.jsonl', [pair('A', 'B'), pair('A', 'A'), pair('C', 'x' * 99)]
  )
  manifest = prepared(
    source,
    tmp_path / 'rows',
    tokenizer,
    packing.Layout('pairs', 16),
    pairs=True,
    row_length=32,
  )
  expected = [PAIR_TEXT, PAIR_TEXT.replace('A', 'B')]
  assert documents(tmp_path / 'rows') == expected
  assert manifest.skipped == {chat_rows.EQUAL: 1, chat_rows.TOO_LONG: 1}
  rows = row_reader.RowSource(tmp_path / 'rows', manifest, 'train').read([0])
  assert (rows.doc[0, [0, 15, 16, 31]] == [0, -1, 1, -1]).all()
  with pytest.raises(UserError, match='row_length=31 must be even'):
    packing.check(packing.Layout('pairs', 15), 31)
  with pytest.raises(UserError, match='x.jsonl line 1: has no rejected'):
    prepared(
      write(tmp_path / 'x.jsonl', [{'prompt': 'a', 'chosen': 'b'}]),
      tmp_path / 'others',
      tokenizer,
      packing.Layout('pairs', 16),
      pairs=True,
      row_length=32,
    )


def test_train_of_a_message_overrides_the_choice(tokenizer, tmp_path):
  record = say('a?', 'A', 'b?', 'B')
  record['messages'][1]['train'] = True
  record['messages'][3]['train'] = False
  source = write(tmp_path / 'x.jsonl', [record])
  prepared(source, tmp_path / 'rows', tokenizer)
  assert documents(tmp_path / 'rows') == [PAIR_TEXT]


@pytest.mark.parametrize(
  'truncate, expected',
  [
    ('drop', [PAIR_TEXT]),
    ('turns', ['<system\ns>user\nb?>assistant\n[B>]', PAIR_TEXT]),
    ('right', ['<system\ns>user\na?>assistant\n[A>]', PAIR_TEXT]),
  ],
)
def test_truncation(tokenizer, tmp_path, truncate, expected):
  size = lambda text: len(tokenizer.encode(text))
  header = size('system\ns') + size('user\na?') + size('assistant\n')
  source = write(
    tmp_path / 'x.jsonl', [LONG, say('x' * 999, 'X'), PAIR, say('!' + 's' * 99)]
  )
  manifest = prepared(
    source,
    tmp_path / 'rows',
    tokenizer,
    turns='all',
    truncate=truncate,
    row_length=header + 5,  # bos, two eos, and A with its eos
  )
  assert sorted(documents(tmp_path / 'rows')) == sorted(expected)
  assert manifest.statistics['truncated'] == len(expected) - 1
  too_long = 3 - len(expected)
  assert manifest.skipped == {
    chat_rows.TOO_LONG: too_long,
    chat_rows.NO_ANSWER: 1,
  }


def test_as_few_turns_as_possible_are_dropped(tokenizer, tmp_path):
  contents = [f'{n}' for n in range(40)]
  source = write(tmp_path / 'x.jsonl', [say('!s', *contents)])
  ends = []
  for length in (24, 64, 120):
    out = tmp_path / f'rows{length}'
    changes = dict(turns='all', truncate='turns', row_length=length)
    manifest = prepared(source, out, tokenizer, **changes)
    assert manifest.statistics['truncated'] == 1
    # Another exchange would not fit.
    assert length - 12 < manifest.row_length - manifest.statistics['padding']
    (text,) = documents(out)
    assert text.startswith('<system\ns>user\n')
    ends.append(text.removeprefix('<system\ns>'))
  for shorter, longer in zip(ends, ends[1:], strict=False):
    assert longer.endswith(shorter)


def test_report(tokenizer, tmp_path):
  values = [PAIR, say('b?', 'B ' * 5)]
  source = write(tmp_path / 'x.jsonl', values)
  manifest = prepared(source, tmp_path / 'rows', tokenizer, layout='padded')
  sizes = [
    3 + sum(len(tokenizer.encode(t)) for t in ('user\n' + q, 'assistant\n', a))
    for q, a in (('a?', 'A'), ('b?', 'B ' * 5))
  ]
  answers = 2 + len(tokenizer.encode('A') + tokenizer.encode('B ' * 5))
  assert manifest.statistics == {
    'padding': 128 - sum(sizes),
    'answer_eos': 2,
    'filled_eos': 0,
    'truncated': 0,
  }
  assert manifest.splits['train'].tokens == answers
  assert manifest.splits['train'].documents == 2
  line = packing.summary(manifest)
  assert f'{answers} tokens with a loss, of which {2 / answers:.1%} are' in line
  assert f'{(128 - sum(sizes)) / 128:.1%} are padding' in line


def test_split_depends_on_the_prompt_only(tokenizer, tmp_path):
  values = [
    say(f'{n}?', answer) for n in range(40) for answer in ('first', 'second')
  ]
  source = write(tmp_path / 'x.jsonl', values)
  prepared(source, tmp_path / 'rows', tokenizer, fraction=0.4)
  prompts = [
    {text.partition('>')[0] for text in documents(tmp_path / 'rows', split)}
    for split in records.SPLITS
  ]
  assert len(prompts[0] | prompts[1]) == 40
  assert not prompts[0] & prompts[1]
  assert min(map(len, prompts)) > 4


DEEP = b'{"messages": ' + b'[' * 5000 + b']' * 5000 + b'}'


@pytest.mark.parametrize(
  'line, problem',
  [
    (b'{', 'the line is not valid JSON'),
    (b'[', 'the line is not valid JSON'),
    (b'\xff', 'not valid JSON'),
    (DEEP, 'nested'),
    (b'{"messages": "\\ud800"}', 'surrogate'),
    (b'7', 'not a JSON object'),
    (b'{"text": "x"}', 'has neither messages'),
    (b'{"messages": [{"content": "x"}]}', r'messages\[0\] has no role'),
    (b'{"messages": [{"role": "cat", "content": "x"}]}', "the role 'cat'"),
    (json.dumps(say('a?', 7)).encode(), 'is 7: it must be a text'),
    (b'{"prompt": "", "completion": 1}', 'completion is 1'),
    (
      b'{"messages": [{"role": "assistant", "content": "x"}]}',
      'the first turn is an answer',
    ),
  ],
)
def test_damaged_line_is_refused_with_its_number(
  tokenizer, tmp_path, line, problem
):
  source = write(tmp_path / 'x.jsonl', [PAIR, b'', line, PAIR])
  with pytest.raises(UserError, match=problem) as error:
    prepared(source, tmp_path / 'rows', tokenizer)
  assert f'{source} line 3: ' in str(error.value)
  assert str(error.value).isprintable()
  # The corrected file has another size.
  write(source, [PAIR])
  prepared(source, tmp_path / 'rows', tokenizer)


def test_line_of_a_file_that_was_cut_is_counted(
  tokenizer, tmp_path, monkeypatch
):
  monkeypatch.setattr(sources, 'MIN_PART_BYTES', 300)
  values = [PAIR] * 30 + [b'{'] + [PAIR] * 30
  source = write(tmp_path / 'x.jsonl', values)
  assert len(sources.plan([str(source)], records=True).parts) > 10
  with pytest.raises(UserError, match='line 31: '):
    prepared(source, tmp_path / 'rows', tokenizer)


def test_damaged_parquet_is_refused_with_its_row(tokenizer, tmp_path):
  values = [PAIR, {'messages': [{'role': 'user', 'content': None}]}]
  path = tmp_path / 'x.parquet'
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
  with pytest.raises(UserError, match=r'row 1: messages\[0\] has no content'):
    prepared(path, tmp_path / 'rows', tokenizer)
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(UserError, match='cannot read'):
    prepared(path, tmp_path / 'other', tokenizer)


@pytest.mark.slow
def test_10_mb_line_is_dropped(tokenizer, tmp_path):
  huge = say('a?', 'word ' * (2 << 20))
  source = write(tmp_path / 'x.jsonl', [huge, PAIR])
  manifest = prepared(source, tmp_path / 'rows', tokenizer)
  assert manifest.skipped == {chat_rows.TOO_LONG: 1}
  assert documents(tmp_path / 'rows') == [PAIR_TEXT]


def test_template_that_raises_or_loops_is_refused_with_the_line(
  tokenizer, tmp_path, monkeypatch
):
  source = write(tmp_path / 'x.jsonl', [PAIR])
  monkeypatch.setitem(chat.render.__kwdefaults__, 'seconds', 0.2)
  for body, problem in (
    ("{{ raise_exception('no\nsystem') }}", 'line 1: .*no system'),
    ('{% for i in range(9) %}' * 9 + '{% endfor %}' * 9, 'does not end'),
    ("{{ strftime_now('%d') }}", 'date_string'),
  ):
    template = chat.Template('own', body)
    with pytest.raises(UserError, match=problem) as error:
      prepared(source, tmp_path / 'rows', tokenizer, template=template)
    assert str(error.value).isprintable()


def test_no_conversation_leaves_no_directory_state(tokenizer, tmp_path):
  source = write(tmp_path / 'x.jsonl', [say('no answer')])
  with pytest.raises(UserError, match='no document to write .*1 without an'):
    prepared(source, tmp_path / 'rows', tokenizer)
  write(tmp_path / 'x.jsonl', [PAIR])
  prepared(source, tmp_path / 'rows', tokenizer, row_length=32)
  assert documents(tmp_path / 'rows') == [PAIR_TEXT]


def test_sources_of_other_formats_are_refused(tmp_path):
  (tmp_path / 'x.txt').write_text('text')
  with pytest.raises(UserError, match='give files that end in .jsonl'):
    sources.plan([str(tmp_path)], records=True)
  with pytest.raises(UserError, match='embedded'):
    sources.plan(['embedded'], records=True)


@pytest.fixture
def many(tmp_path, monkeypatch):
  """Returns a file of many parts."""
  monkeypatch.setattr(sources, 'MIN_PART_BYTES', 2000)
  values = [
    say(f'{n}?' * (1 + n % 7), f'{n} ' * (n % 5 + 1)) for n in range(200)
  ]
  return write(tmp_path / 'many.jsonl', values)


def contents(directory):
  return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


@pytest.mark.parametrize('layout', ['packed', 'padded'])
def test_interrupted_preparation_resumes_with_the_same_files(
  tokenizer, tmp_path, many, layout, monkeypatch
):
  options = dict(layout=layout, fraction=0.2)
  prepared(many, tmp_path / 'once', tokenizer, **options)
  write_shard, calls = records.write_shard, []

  def failing(path, *arguments):
    calls.append(path)
    if len(calls) == 5:
      raise OSError(28, 'No space left on device')
    return write_shard(path, *arguments)

  monkeypatch.setattr(records, 'write_shard', failing)
  with pytest.raises(UserError, match='free disk space'):
    prepared(many, tmp_path / 'rows', tokenizer, **options)
  prepared(many, tmp_path / 'rows', tokenizer, **options)
  assert len(calls) < 2 * len(contents(tmp_path / 'once'))
  assert contents(tmp_path / 'rows') == contents(tmp_path / 'once')
  # A finished preparation returns at once.
  monkeypatch.setattr(records, 'write_shard', None)
  prepared(many, tmp_path / 'rows', tokenizer, **options)


def test_bad_record_after_a_resume_leaves_an_empty_directory(
  tokenizer, tmp_path, many, monkeypatch
):
  with open(many, 'a') as file:
    file.write('{')
  out, write_shard, calls = tmp_path / 'rows', records.write_shard, []

  def failing(path, *arguments):
    calls.append(path)
    if len(calls) == 4:
      raise OSError(28, 'No space left on device')
    return write_shard(path, *arguments)

  monkeypatch.setattr(records, 'write_shard', failing)
  with pytest.raises(UserError, match='free disk space'):
    prepared(many, out, tokenizer)
  assert list(out.glob('train-*'))
  with pytest.raises(UserError, match='line 201: the line is not valid JSON'):
    prepared(many, out, tokenizer)
  assert not list(out.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['packed', 'padded'])
def test_files_do_not_depend_on_the_number_of_workers(
  tokenizer, tmp_path, many, layout
):
  options = dict(layout=layout, fraction=0.2)
  prepared(many, tmp_path / 'one', tokenizer, **options)
  prepared(many, tmp_path / 'two', tokenizer, workers=2, **options)
  assert contents(tmp_path / 'one') == contents(tmp_path / 'two')


@pytest.mark.parametrize(
  'changes, name',
  [
    (dict(turns='all'), 'turns'),
    (dict(truncate='right'), 'truncate'),
    (dict(layout='padded'), 'layout'),
    (dict(template=chat.load('plain', '{"a": 1}')), 'chat'),
  ],
)
def test_other_settings_need_another_directory(
  tokenizer, tmp_path, changes, name
):
  source = write(tmp_path / 'x.jsonl', [PAIR])
  prepared(source, tmp_path / 'rows', tokenizer)
  with pytest.raises(UserError, match=f'was prepared with {name}'):
    prepared(source, tmp_path / 'rows', tokenizer, **changes)
