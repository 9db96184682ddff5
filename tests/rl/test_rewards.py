"""Rewards: golden values of d1 and ESPO, our own, and files of the user."""

import json
import pathlib

import pytest

from maskdiff.errors import UserError
from maskdiff.rl import published_rewards, rewards

GOLDEN = json.loads(
  (pathlib.Path(__file__).parents[1] / 'golden' / 'rewards.json').read_text()
)
# Names of the recorded functions.
PARTS = {
  'int_reward_func': 'integer',
  'strict_format_reward_func': 'strict_format',
  'soft_format_reward_func': 'soft_format',
  'xmlcount_reward_func': 'xml_count',
  'correctness_reward_func': 'correctness',
}
TAGGED = '<reasoning>\n{}\n</reasoning>\n<answer>\n42\n</answer>\n'


@pytest.mark.parametrize('recorded', PARTS)
def test_parts_of_d1s_reward_match_golden(recorded):
  found = [
    published_rewards.gsm8k(GOLDEN['answer'], text)[PARTS[recorded]]
    for text in GOLDEN['texts']
  ]
  assert found == pytest.approx(GOLDEN[recorded], abs=1e-12)


def test_answers_of_d1_match_golden():
  found = list(map(published_rewards.answer_of, GOLDEN['texts']))
  assert found == GOLDEN['extract_xml_answer']


def test_countdown_matches_golden():
  golden = GOLDEN['countdown']
  question = {'numbers': golden['numbers'], 'target': golden['target']}
  for text, score in zip(golden['texts'], golden['scores'], strict=True):
    assert rewards.countdown_published(question, text)['total'] == score, text


def test_sudoku_matches_golden():
  golden = GOLDEN['sudoku']
  question = {'puzzle': golden['puzzle'], 'solution': golden['solution']}
  for text, score in zip(golden['texts'], golden['scores'], strict=True):
    assert rewards.sudoku_published(question, text)['total'] == score, text


@pytest.mark.parametrize('reasoning', ['one', 'two\nlines'])
def test_fault_of_the_format_rewards_is_only_in_the_published_one(reasoning):
  question, text = {'answer': 'Work.\n#### 42'}, TAGGED.format(reasoning)
  ours = rewards.gsm8k(question, text)
  theirs = rewards.gsm8k_published(question, text)
  assert ours['correct'] == theirs['correct'] == 1
  assert ours['total'] == 2 + 4 * 0.5
  # A dot of the published patterns does not match a newline. That of the soft
  # pattern also meets the newlines around the reasoning.
  assert theirs['soft_format'] == 0
  assert theirs['strict_format'] == (0.5 if reasoning == 'one' else 0)


@pytest.mark.parametrize(
  'text, total, correct',
  [
    ('12-07+10', 0.0, 0),
    ('12+07-04', 1.0, 1),
    ('12+04-07', 0.1, 0),
    ('12 07 04', 0.1, 0),
    ('12+7-4', 0.0, 0),
    ('', 0.0, 0),
  ],
)
def test_countdown(text, total, correct):
  found = rewards.countdown({'prompt': '04,07,12->15:'}, text)
  assert (found['total'], found['correct']) == (total, correct)


@pytest.mark.parametrize(
  'expression, total',
  [
    ('(12 - 4) * 7', 1.0),
    ('07*(12-04)', 1.0),
    ('12-4*7', 0.1),
    ('-4+12**7', 0.1),
    ('12-4', 0.0),
    ('56', 0.0),
  ],
)
def test_countdown_in_tags(expression, total):
  question = {'numbers': [4, 7, 12], 'target': 56}
  text = f'<reasoning>\n12-4 = 8\n</reasoning><answer> {expression}\n</answer>'
  assert rewards.countdown_tags(question, text)['total'] == total
  assert rewards.countdown_tags(question, expression)['total'] == 0.0


@pytest.mark.parametrize(
  'text, total, correct',
  [
    ('1234341221434321', 1.0, 1),
    ('1234341221434322', 0.75, 0),
    ('2234341221434321', 1.0, 0),  # a given digit differs
    ('123434122143432', 0.0, 0),
    ('12343412214343211', 0.0, 0),
    ('', 0.0, 0),
  ],
)
def test_sudoku(text, total, correct):
  question = {'prompt': '1034341220434020=', 'answer': '1234341221434321'}
  found = rewards.sudoku(question, text)
  assert (found['total'], found['correct']) == (total, correct)
  lines = '\n'.join(text[i : i + 4] for i in range(0, 20, 4))
  tagged = {'puzzle': question['prompt'][:16], 'solution': question['answer']}
  assert rewards.sudoku_tags(tagged, f'<answer>{lines}</answer>') == found
  assert rewards.sudoku_tags(tagged, lines)['total'] == 0.0


@pytest.mark.parametrize(
  'answer', ['10 - 3 = 7\n#### 7', r'So it is $\boxed{7}$.', '7']
)
def test_math_reads_worked_answers(answer):
  question = {'answer': answer}
  assert rewards.math_answer(question, 'So\n\\boxed{14/2}')['correct'] == 1
  assert rewards.math_answer(question, answer)['correct'] == 1
  assert rewards.math_answer(question, '7\n#### 8')['correct'] == 0
  assert rewards.math_answer(question, '')['correct'] == 0


def test_program_of_the_user_is_read_once(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('def score(question, text):\n  return len(text)\n')
  source = rewards.find(f'{path}:score')
  path.write_text('def score(question, text):\n  return 0\n')
  assert rewards.load(source)({}, 'abc') == 3


@pytest.mark.parametrize(
  'program, message',
  [
    ('x = (', "cannot run the rewards of '.*mine.py': line 1, SyntaxError"),
    ('\n1 / 0', 'mine.py.: line 2, ZeroDivisionError: division by zero'),
    ('import sys\nsys.exit(2)', 'line 2, SystemExit: 2'),
    ('def scored(q, t): pass', "no function 'score': it has scored"),
    ('score = 3', "no function 'score'"),
  ],
)
def test_bad_program_is_one_line(tmp_path, program, message):
  path = tmp_path / 'mine.py'
  path.write_text(program)
  with pytest.raises(UserError, match=message) as error:
    rewards.load(rewards.find(f'{path}:score'))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'name, message',
  [
    ('sudok', "reward 'sudok': choose one of exact.*did you mean 'sudoku'"),
    ('none.py:f', "reward 'none.py:f': cannot read 'none.py'"),
    ('none.py', 'write FILE.py:FUNCTION'),
  ],
)
def test_unknown_reward_is_one_line(name, message):
  with pytest.raises(UserError, match=message):
    rewards.find(name)
