"""Questions of reasoning-gym: a stand-in for the package, and the package."""

import sys
import types

import pytest

from maskdiff.errors import UserError
from maskdiff.evals import reasoning_tasks


@pytest.fixture
def package(monkeypatch):
  """A stand-in with two tasks; `few` has three different questions."""

  def create_dataset(name, seed, size):
    if name == 'broken':
      raise ValueError('no\nfont')
    number = (lambda i: i % 3) if name == 'few' else (lambda i: i + 1000 * seed)
    return [
      {'question': f'{name} {number(i)}', 'answer': str(i), 'metadata': {}}
      for i in range(size)
    ] + [{'question': 'no text', 'answer': None}]

  made = types.ModuleType('reasoning_gym')
  made.create_dataset = create_dataset
  made.factory = types.ModuleType('reasoning_gym.factory')
  made.factory.DATASETS = dict.fromkeys(('add', 'spell', 'few', 'broken'))
  monkeypatch.setitem(sys.modules, 'reasoning_gym', made)
  monkeypatch.setitem(sys.modules, 'reasoning_gym.factory', made.factory)


def test_tasks_take_turns_and_no_question_is_in_both_parts(package):
  draw = lambda heldout: reasoning_tasks.questions(
    ['add', 'spell'], 1, 50, heldout
  )
  train, heldout = draw(False), draw(True)
  for lines in train, heldout:
    assert [line['task'] for line in lines] == ['add', 'spell'] * 25
    assert len({line['prompt'] for line in lines}) == 50
  prompts = lambda lines: {line['prompt'] for line in lines}
  assert not prompts(train) & prompts(heldout)
  assert train[0]['answer'] in train[0]['prompt']


@pytest.mark.parametrize(
  'names, message',
  [
    (['ad'], "reasoning-gym has no task 'ad': try add"),
    (['add', 'add'], "'add' is named twice"),
    (['add', 'broken'], "'broken' of reasoning-gym fails .no font.: leave it"),
    (['add', 'few'], "'few' has too few questions: lower --num=50, or leave"),
  ],
)
def test_bad_names_are_one_line(package, names, message):
  with pytest.raises(UserError, match=message):
    reasoning_tasks.questions(names, 0, 50, False)


def test_missing_package_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, 'reasoning_gym', None)
  with pytest.raises(UserError, match='pip install reasoning-gym'):
    reasoning_tasks.questions(['add'], 0, 1, False)


def test_package_makes_questions_with_answers():
  pytest.importorskip('reasoning_gym')
  lines = reasoning_tasks.questions(
    ['basic_arithmetic', 'spell_backward'], 0, 20, True
  )
  for line in lines[1::2]:
    assert line['answer'][::-1] in line['prompt']
