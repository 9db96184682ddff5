"""Tasks: right answers, seeds, and questions that are never in both parts."""

import collections
import json
import pathlib
import re
import sys
import types

import pytest

from maskdiff.errors import UserError
from maskdiff.evals import puzzles
from maskdiff.rl import reward_pool, rewards, tasks

N = 150
NEXT = str.maketrans('0123456789', '1234567890')


def content(name, question):
  """Returns the part of a question that no question of the other part has."""
  prompt = question['prompt']
  if name.startswith('word_problems_numbers'):
    return question['template'], tuple(re.findall(r'\d+', prompt))
  if name.startswith('word_problems'):
    return question['template']
  if name == 'instructions':
    return prompt
  if name.startswith('sudoku'):
    return question.get('solution', question['answer'])
  if name == 'countdown_tags' or name == 'countdown_4_tags':
    return tuple(sorted(question['numbers']))
  if name.startswith('countdown'):
    return tuple(sorted(prompt.partition('->')[0].split(',')))
  return tuple(sorted(prompt.removesuffix('=').split('+')))


@pytest.mark.parametrize('name', tasks.TASKS)
def test_training_and_evaluation_are_disjoint(name):
  draw = tasks.get(name).draw
  train, heldout = draw(0, N, False), draw(1, N, True)
  assert len(train) == len(heldout) == N
  of = lambda questions: {content(name, question) for question in questions}
  assert not of(train) & of(heldout)
  assert len(of(train)) > 8
  assert len(of(heldout)) > 2


@pytest.mark.parametrize('name', tasks.TASKS)
def test_questions_depend_on_the_seed_only(name):
  draw = tasks.get(name).draw
  for seed in 3, '3-17':
    assert draw(seed, 20, True) == draw(seed, 20, True)
  assert draw(3, 20, True) != draw('3-17', 20, True)
  assert json.loads(json.dumps(draw(3, 5, False))) == draw(3, 5, False)


@pytest.mark.parametrize('name', tasks.TASKS)
def test_reward_is_one_for_the_right_answer_only(name):
  task = tasks.get(name)
  reward = rewards.load(rewards.find(task.reward))
  for question in task.draw(0, 50, False):
    answer = question['answer']
    found = reward(question, answer)
    assert found['correct'] == 1
    assert found.get('total', 1) == 1
    wrong = answer.translate(NEXT)  # a word has no digits
    for text in '', '\n', wrong if wrong != answer else answer + 'x':
      found = reward(question, text)
      assert found['correct'] == 0, text
      assert 0 <= found.get('total', 0) < 1


def test_countdown_of_four_numbers():
  for question in tasks.get('countdown_4').draw(0, 20, True):
    assert re.fullmatch(r'(\d\d,){3}\d\d->\d\d:', question['prompt'])
    assert len(re.findall(r'\d\d', question['answer'])) == 4


def test_seeds_keep_the_puzzles_of_published_results():
  """docs/evaluation.md has results on them."""
  lines = [puzzles.make(name, 0, 1)[0] for name in ('countdown', 'addition')]
  assert [p['prompt'] for p in lines] == ['04,04,16->00:', '59+13=']


def questions_file(tmp_path, n):
  path = tmp_path / 'questions.jsonl'
  lines = [
    {'question': f'What is {i} + {i}?', 'answer': f'{i} + {i}\n#### {2 * i}'}
    for i in range(n)
  ]
  path.write_text('\n'.join(map(json.dumps, lines)))
  return path


def test_questions_of_a_file(tmp_path):
  task = tasks.get(str(questions_file(tmp_path, 100)))
  train, heldout = task.draw(0, 200, False), task.draw(0, 50, True)
  prompts = lambda lines: collections.Counter(line['prompt'] for line in lines)
  assert not prompts(train).keys() & prompts(heldout).keys()
  assert len(prompts(train)) + len(prompts(heldout)) == 100
  assert set(prompts(train).values()) == {2, 3}
  reward = rewards.load(rewards.find(task.reward))
  number = train[0]['answer'].split()[-1]
  assert reward(train[0], f'It is\n\\boxed{{{number}}}')['correct'] == 1


@pytest.mark.parametrize(
  'text, message',
  [
    (
      '{"prompt": "a", "answer": "b"}\n[1]',
      r'questions.jsonl:2: a question has',
    ),
    ('{"prompt": "a", "answer": ""}', 'questions.jsonl:1: a question has'),
    ('{"prompt": ', 'questions.jsonl:1 is not valid JSON'),
    ('', 'questions.jsonl. has no questions'),
  ],
)
def test_bad_file_is_one_line(tmp_path, text, message):
  path = tmp_path / 'questions.jsonl'
  path.write_text(text)
  with pytest.raises(UserError, match=message):
    tasks.get(str(path))


def test_file_without_questions_for_evaluation_is_one_line(tmp_path):
  task = tasks.get(str(questions_file(tmp_path, 1)))
  with pytest.raises(UserError, match="none of the 1 questions, such as 'What"):
    task.draw(0, 1, True)
    task.draw(0, 1, False)


def test_page_lists_tasks_rewards_and_errors():
  page = (pathlib.Path(__file__).parents[2] / 'docs/rewards.md').read_text()
  listed = set(re.findall(r'`(\w+)`', page))
  known = {*tasks.TASKS, *rewards.REWARDS, *reward_pool.KINDS}
  assert not known - listed


def test_unknown_task_is_one_line():
  with pytest.raises(UserError, match="'sudok': choose.*mean 'sudoku'"):
    tasks.get('sudok')


def test_questions_of_reasoning_gym(monkeypatch):
  made = types.ModuleType('reasoning_gym')
  made.create_dataset = lambda name, seed, size: [
    {'question': f'{name} {seed + i}?', 'answer': str(seed + i)}
    for i in range(size)
  ]
  made.factory = types.ModuleType('reasoning_gym.factory')
  made.factory.DATASETS = {'sum': None, 'product': None}
  monkeypatch.setitem(sys.modules, 'reasoning_gym', made)
  monkeypatch.setitem(sys.modules, 'reasoning_gym.factory', made.factory)
  task = tasks.get('reasoning_gym:sum,product')
  train, heldout = task.draw('0-1', 20, False), task.draw('0-1', 20, True)
  assert train == task.draw('0-1', 20, False)
  assert {line['task'] for line in train} == {'sum', 'product'}
  prompts = lambda lines: {line['prompt'] for line in lines}
  assert not prompts(train) & prompts(heldout)
