"""The instruction set has right answers and holds out questions."""

import collections
import re

import pytest

from maskdiff.errors import UserError
from maskdiff.evals import instructions
from maskdiff.posttraining import conversations


def solve(task, prompt):
  """Answers a question by its words."""
  numbers = list(map(int, re.findall(r'\d+', prompt)))
  if task == 'addition':
    return str(sum(numbers))
  if task == 'subtraction':
    return str(abs(numbers[0] - numbers[1]))
  if task == 'larger':
    return str(max(numbers))
  if task == 'sorting':
    return ' '.join(map(str, sorted(numbers)))
  if task == 'module':
    modules = instructions.MODULES.items()
    (name,) = [name for name, does in modules if does in prompt]
    return name
  if task == 'letters':
    return ' '.join(reversed(re.findall(r'\b\w\b', prompt)))
  before = '(?:word|Write|Spell|How is|Capitalize|does|of)'
  word = re.search(f'{before} (\\w+)', prompt)[1]
  return {
    'reversal': word[::-1],
    'spelling': ' '.join(word),
    'capitals': word.upper(),
    'length': str(len(word)),
    'last_letter': word[-1],
  }[task]


def test_answers_are_right():
  lines = instructions.questions(0, 3000, False)
  assert set(instructions.TASKS) == {line['task'] for line in lines}
  for line in lines:
    assert line['answer'] == solve(line['task'], line['prompt']), line


def test_questions_are_drawn_from_the_seed():
  draw = lambda seed: instructions.questions(seed, 50, True)
  assert draw(3) == draw(3) != draw(4)
  talk = lambda seed: instructions.conversations(seed, 50)
  assert talk(3) == talk(3) != talk(4)
  # A change of the questions would change the results of trained models.
  (line,) = instructions.questions(0, 1, True)
  assert line['prompt'] == 'Name the last letter of pipure.'


def test_pairs_have_a_right_and_a_wrong_answer():
  for pair in instructions.preferences(0, 200, ['larger', 'capitals']):
    task = 'larger' if any(map(str.isdigit, pair['prompt'])) else 'capitals'
    assert pair['chosen'] == solve(task, pair['prompt']) != pair['rejected']


def test_no_question_is_in_training_and_evaluation():
  trained = {
    turn['content']
    for line in instructions.conversations(1, 3000)
    for turn in line['messages']
    if turn['role'] == 'user'
  }
  asked = {line['prompt'] for line in instructions.questions(2, 2000, True)}
  assert len(trained) > 3000
  assert len(asked) > 1000
  assert not trained & asked


def test_conversations_are_read_by_preparation():
  sizes, systems = collections.Counter(), 0
  for line in instructions.conversations(0, 1000):
    messages = conversations.parse(line)
    system = messages[0]['role'] == 'system'
    roles = [message['role'] for message in messages[system:]]
    assert roles == ['user', 'assistant'] * (len(roles) // 2)
    sizes[len(roles) // 2] += 1
    systems += system
  assert set(sizes) == {1, 2, 3}
  assert 150 < systems < 250


def test_tasks_are_chosen_by_name():
  lines = instructions.questions(0, 20, False, ['sorting'])
  assert {line['task'] for line in lines} == {'sorting'}
  with pytest.raises(UserError, match="'sort'.*choose among addition"):
    instructions.questions(0, 1, False, ['sort'])
