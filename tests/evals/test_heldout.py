"""Questions from held-out text."""

import numpy as np
import pytest

from maskdiff import config as config_lib
from maskdiff.data import records
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
def found(config, tokenizer):
  return heldout.documents(config, tokenizer)


def texts(corpus, tokenizer, split):
  """The documents of a split, or what a row has of them."""
  source = records.RowSource(corpus, records.read_manifest(corpus), split)
  rows = np.array([source[i] for i in range(len(source))])
  ends = [np.flatnonzero(row == tokenizer.eos_id) + 1 for row in rows]
  return [
    tokenizer.decode(piece)
    for row, at in zip(rows, ends, strict=True)
    for piece in np.split(row, at)
  ]


def test_documents_are_those_held_out(found, corpus, tokenizer):
  expected = [t for t in texts(corpus, tokenizer, 'heldout') if t]
  assert [tokenizer.decode(ids) for ids in found] == expected
  assert not any(tokenizer.eos_id in ids for ids in found)


def test_the_right_choice_is_what_follows_in_the_text(found, tokenizer):
  held_out = [tokenizer.decode(ids) for ids in found]
  lines = heldout.choices(found, tokenizer, CONTEXT, 0, N)
  assert len(lines) == N
  follows = lambda line, i: any(
    line['prompt'] + line['choices'][i] in text for text in held_out
  )
  for line in lines:
    assert len(line['choices']) == len(set(line['choices'])) == 4
    assert follows(line, line['answer'])
    assert all(any(c in text for text in held_out) for c in line['choices'])
  # The others follow by chance alone, in a corpus of few words.
  others = [follows(x, i) for x in lines for i in range(4) if i != x['answer']]
  assert np.mean(others) < 0.5
  assert len({line['answer'] for line in lines}) > 1


def test_a_word_is_missing_and_the_parts_have_the_tokens_of_the_whole(
  found, tokenizer
):
  held_out = [tokenizer.decode(ids) for ids in found]
  lines = heldout.cloze(found, tokenizer, CONTEXT, 0, N)
  assert len(lines) == N
  for line in lines:
    parts = line['prompt'], line['answer'], line['suffix']
    whole = ''.join(parts)
    assert any(whole in text for text in held_out)
    assert line['answer'].strip().isalpha() and all(parts)
    assert sum(map(tokenizer.encode, parts), []) == tokenizer.encode(whole)


@pytest.mark.parametrize('draw', [heldout.choices, heldout.cloze])
def test_a_seed_gives_the_same_lines(draw, found, tokenizer):
  first = draw(found, tokenizer, CONTEXT, 0, N)
  assert draw(found, tokenizer, CONTEXT, 0, N) == first
  assert draw(found, tokenizer, CONTEXT, 1, N) != first


@pytest.mark.parametrize('draw', [heldout.choices, heldout.cloze])
def test_too_little_text_is_said(draw, found, tokenizer):
  with pytest.raises(UserError, match='held-out text has 0 places'):
    draw(found, tokenizer, 1024, 0, N)


@pytest.mark.parametrize('draw', [heldout.choices, heldout.cloze])
def test_text_that_makes_no_questions_is_said(draw, tokenizer):
  same = [tokenizer.encode('1' * 400)]
  with pytest.raises(UserError, match=f'gives 0 of {N} lines'):
    draw(same, tokenizer, 6, 0, N)
