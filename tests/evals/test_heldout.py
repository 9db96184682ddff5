"""Questions made from held-out text."""

import numpy as np
import pytest

from maskdiff import config as config_lib
from maskdiff.data import records, row_reader, row_writer
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.evals import heldout

CONTEXT, N = 16, 12


@pytest.fixture(scope='module')
def config(tokenizer, corpus):
  c = config_lib.default()
  c.data.path, c.data.length = str(corpus), 16
  c.data.tokenizer = tokenizer.path
  return c


@pytest.fixture(scope='module')
def documents(config, tokenizer):
  return heldout.documents(config, tokenizer)


def texts(corpus, tokenizer, split):
  """Returns the documents of a split as text, cut where a row ends."""
  source = row_reader.RowSource(corpus, records.read_manifest(corpus), split)
  rows = np.array([source[i] for i in range(len(source))])
  ends = [np.flatnonzero(row == tokenizer.eos_id) + 1 for row in rows]
  return [
    tokenizer.decode(piece)
    for row, at in zip(rows, ends, strict=True)
    for piece in np.split(row, at)
  ]


def test_documents_are_held_out(documents, corpus, tokenizer):
  expected = [t for t in texts(corpus, tokenizer, 'heldout') if t]
  assert [tokenizer.decode(ids) for ids in documents] == expected
  assert not any(tokenizer.eos_id in ids for ids in documents)


def test_stored_documents_are_split_without_padding(
  config, tokenizer, tmp_path
):
  eos = tokenizer.eos_id
  rows = Rows(
    tokens=np.array([[20, eos, 21, 22], [23, 24, 25, eos]]),
    doc=np.array([[0, 0, 0, -1], [2, 2, 1, 1]]),
  )
  row_writer.write_rows(
    tmp_path / 'rows', {'heldout': [rows]}, tokenizer, source=''
  )
  c = config.copy_and_resolve_references()
  c.data.path = str(tmp_path / 'rows')
  assert heldout.documents(c, tokenizer) == [[20, 21], [23, 24], [25]]


def test_right_choice_continues_the_prompt(documents, tokenizer):
  held_out = [tokenizer.decode(ids) for ids in documents]
  lines = heldout.choices(documents, tokenizer, CONTEXT, 0, N)
  assert len(lines) == N
  follows = lambda line, i: any(
    line['prompt'] + line['choices'][i] in text for text in held_out
  )
  for line in lines:
    assert len(line['choices']) == len(set(line['choices'])) == 4
    assert follows(line, line['answer'])
    assert all(any(c in text for text in held_out) for c in line['choices'])
  # In a corpus of few words, some other choices continue it by chance.
  others = [follows(x, i) for x in lines for i in range(4) if i != x['answer']]
  assert np.mean(others) < 0.5
  assert len({line['answer'] for line in lines}) > 1


def test_cloze_parts_have_the_tokens_of_the_whole(documents, tokenizer):
  held_out = [tokenizer.decode(ids) for ids in documents]
  lines = heldout.cloze(documents, tokenizer, CONTEXT, 0, N)
  assert len(lines) == N
  for line in lines:
    parts = line['prompt'], line['answer'], line['suffix']
    whole = ''.join(parts)
    assert any(whole in text for text in held_out)
    assert line['answer'].strip().isalpha() and all(parts)
    assert sum(map(tokenizer.encode, parts), []) == tokenizer.encode(whole)


@pytest.mark.parametrize('draw', [heldout.choices, heldout.cloze])
def test_lines_depend_on_the_seed_only(draw, documents, tokenizer):
  first = draw(documents, tokenizer, CONTEXT, 0, N)
  assert draw(documents, tokenizer, CONTEXT, 0, N) == first
  assert draw(documents, tokenizer, CONTEXT, 1, N) != first


@pytest.mark.parametrize('draw', [heldout.choices, heldout.cloze])
def test_too_little_text_is_refused(draw, documents, tokenizer):
  with pytest.raises(UserError, match='held-out text has 0 windows'):
    draw(documents, tokenizer, 1024, 0, N)


@pytest.mark.parametrize('draw', [heldout.choices, heldout.cloze])
def test_text_without_questions_is_refused(draw, tokenizer):
  uniform = [tokenizer.encode('1' * 400)]
  with pytest.raises(UserError, match=f'it gives 0 of {N} lines'):
    draw(uniform, tokenizer, 6, 0, N)
