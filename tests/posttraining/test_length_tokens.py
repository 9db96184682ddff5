"""Tokens of lengths, and documents and rows that teach them."""

import json
import pathlib

import numpy as np
import pytest

from maskdiff.data import packing, prepare, records, row_reader, sources
from maskdiff.data import rows as rows_lib
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.errors import UserError
from maskdiff.posttraining import (
  chat,
  chat_rows,
  chat_tokens,
  heldout_answers,
  length_tokens,
)
from maskdiff.posttraining.heldout_answers import Question

MODEL = pathlib.Path(__file__).parents[2] / 'tokenizer' / 'stdlib_4k.model'
EOS = 2


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.load(MODEL)


def test_tokens_are_those_that_no_text_has(tokenizer):
  named = length_tokens.choose(tokenizer, range(13, 0, -1))
  assert [length for length, _ in named] == list(range(1, 14))
  found = [tokenizer.pieces[i] for _, i in named]
  assert len(set(found)) == 13
  for piece in found:
    with pytest.raises(UnicodeDecodeError):
      piece.decode()
  # UTF-8 begins all characters with other bytes.
  starts = {
    chr(i).encode()[:1] for i in range(0x110000) if chr(i).isprintable()
  }
  assert not starts & set(found)


@pytest.mark.parametrize(
  'lengths, problem',
  [
    (range(1, 15), 'at most 13 lengths'),
    ([4, 4], 'different'),
    ([0, 4], 'above 0'),
  ],
)
def test_bad_lengths_are_refused(tokenizer, lengths, problem):
  with pytest.raises(UserError, match=problem):
    length_tokens.choose(tokenizer, lengths)


def test_setting_is_read_back():
  named = ((4, 212), (16, 9))
  text = length_tokens.to_setting(named)
  assert length_tokens.of_settings({'length_tokens': text}) == named
  assert length_tokens.of_settings({}) == ()
  for bad in ('x', '4', '4=5=6', 7):
    with pytest.raises(UserError, match='prepare the rows again'):
      length_tokens.of_settings({'length_tokens': bad})


def test_length_and_answer_are_learned_in_documents_of_their_own():
  encoded = chat_tokens.Encoded(
    np.array([1, 5, 6, 7, 8, EOS]), np.array([0, 0, 0, 1, 1, 1], bool)
  )
  length, answer = length_tokens.documents(encoded, 5, 99, EOS)
  assert length.tokens.tolist() == [1, 5, 6, 99]
  assert length.answer.tolist() == [False] * 3 + [True]
  assert answer.tokens.tolist() == [1, 5, 6, 99, 7, 8, EOS, EOS, EOS]
  assert answer.answer.tolist() == [False] * 4 + [True] * 5


def write(path, *records):
  path.write_text(''.join(json.dumps(r) + '\n' for r in records))
  return path


def pair(prompt, answer):
  return {'prompt': prompt, 'completion': answer}


def prepared(source, out, tokenizer, lengths, row_length=64, **changes):
  """Returns the manifest of prepared conversations."""
  named = length_tokens.choose(tokenizer, lengths)
  encode = chat_rows.ChatDocuments(
    chat.load('plain'), row_length, length_tokens=named, **changes
  )
  return prepare.prepare(
    sources.plan([str(source)], records=True),
    tokenizer,
    out,
    row_length=row_length,
    heldout_fraction=0.0,
    workers=0,
    layout=packing.Layout('packed'),
    encode=encode,
    encode_settings=encode.settings,
    log=lambda line: None,
  )


def test_rows_have_both_documents_and_the_manifest_the_tokens(
  tokenizer, tmp_path
):
  """Questions of held-out rows have neither lengths nor their tokens."""
  out = tmp_path / 'rows'
  long = pair('c', 'x = ' * 20)
  source = write(tmp_path / 'x.jsonl', pair('a', 'b'), long)
  manifest = prepared(source, out, tokenizer, [8, 4])
  assert manifest.skipped == {chat_rows.NO_BUCKET: 1}
  named = length_tokens.of_settings(records.read_manifest(out).settings)
  assert named == length_tokens.choose(tokenizer, [4, 8])
  rows = row_reader.RowSource(out, manifest, 'train').read([0])
  (row,) = [rows_lib.map_columns(lambda x: x[0], rows)]
  prompt = tokenizer.encode('a')
  documents = [row.tokens[row.doc == i].tolist() for i in (0, 1)]
  token, answer = named[0][1], tokenizer.encode('b')
  assert documents[0][-1] == token
  assert documents[1] == [
    *documents[0],
    *answer,
    *[EOS] * (4 - len(answer)),
  ]
  assert row.answer[row.doc == 0].sum() == 1
  assert row.answer[row.doc == 1].sum() == 4
  assert set(prompt) < set(documents[0])
  assert manifest.statistics['answer_eos'] == 4 - len(answer)
  assert manifest.statistics['filled_eos'] == 3 - len(answer)
  ids = [i for _, i in named]
  assert heldout_answers.of_rows(rows, EOS, ids) == [
    Question(documents[0][:-1], answer)
  ]


def test_filled_answers_count_for_the_row_length(tokenizer, tmp_path):
  """The answer has 2 tokens, its length is 32; first turns are dropped."""
  turns = [
    {'role': role, 'content': content}
    for role, content in [
      ('user', 'x = ' * 9),
      ('assistant', 'y'),
      ('user', 'a'),
      ('assistant', 'b'),
    ]
  ]
  source = write(tmp_path / 'x.jsonl', {'messages': turns})
  with pytest.raises(UserError, match='1 too long'):
    prepared(source, tmp_path / 'drop', tokenizer, [32])
  manifest = prepared(
    source, tmp_path / 'turns', tokenizer, [32], truncate='turns'
  )
  assert manifest.skipped == {} and manifest.statistics['truncated'] == 2
  with pytest.raises(UserError, match='choose --turns=each'):
    prepared(source, tmp_path / 'all', tokenizer, [32], turns='all')
