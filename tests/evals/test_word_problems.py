"""Word problems: right worked answers, and two ways to split them."""

import re

import pytest

from maskdiff.evals import word_problems

N = 300


@pytest.mark.parametrize('split', word_problems.SPLITS)
def test_every_line_of_an_answer_is_right(split):
  for question in word_problems.questions(0, N, False, split):
    *work, last = question['answer'].splitlines()
    known = {int(n) for n in re.findall(r'\d+', question['prompt'])} | {2}
    for line in work:
      x, sign, y, result = re.search(r'(\d+) (.) (\d+) = (\d+)', line).groups()
      x, y, result = int(x), int(y), int(result)
      assert {x, y} <= known
      assert result == {'+': x + y, '-': x - y, '*': x * y, '/': x / y}[sign]
      assert result > 0
      known.add(result)
    assert len(work) > 1
    assert last == f'#### {result}'
    assert not set('{}[]') & set(question['prompt'] + question['answer'])


def test_every_number_of_a_question_is_in_its_answer():
  for question in word_problems.questions(1, N, False, 'numbers'):
    numbers = re.findall(r'\d+', question['prompt'])
    assert set(numbers) <= set(re.findall(r'\d+', question['answer']))


def test_templates_are_split_or_shared():
  found = {
    (split, heldout): {
      question['template']
      for question in word_problems.questions(0, N, heldout, split)
    }
    for split in word_problems.SPLITS
    for heldout in (False, True)
  }
  assert not found['template', False] & found['template', True]
  assert found['numbers', False] == found['numbers', True]
  every = set(word_problems.TEMPLATES)
  assert found['template', False] | found['template', True] == every
  assert found['numbers', True] == every
