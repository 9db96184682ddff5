"""Records become messages, or one line that names the problem."""

import pytest

from maskdiff.errors import UserError
from maskdiff.posttraining import conversations

QUESTION = {'role': 'user', 'content': '2+2?'}
ANSWER = {'role': 'assistant', 'content': '4'}


@pytest.mark.parametrize(
  'record',
  [
    {'messages': [QUESTION, ANSWER], 'id': 7},
    {'messages': [QUESTION | {'name': 'x', 'train': None}, ANSWER]},
    {'prompt': '2+2?', 'completion': '4'},
    {'prompt': '2+2?', 'response': '4', 'messages': None},
    {'prompt': '2+2?', 'answer': '4', 'text': '2+2?4'},
    {'question': '2+2?', 'answer': '4'},
    {'instruction': '2+2?', 'input': '', 'output': '4'},
  ],
)
def test_messages_and_pairs_are_read(record):
  assert conversations.parse(record) == [QUESTION, ANSWER]


def test_input_follows_the_instruction():
  record = {'instruction': 'Add.', 'input': '2, 2', 'output': '4'}
  assert conversations.parse(record)[0]['content'] == 'Add.\n\n2, 2'


def test_train_and_thoughts_are_kept():
  answer = ANSWER | {'train': False, 'reasoning_content': 'hm'}
  assert conversations.parse({'messages': [QUESTION, answer]})[1] == answer


def turns(*changed):
  return {'messages': [QUESTION, *changed]}


@pytest.mark.parametrize(
  'record, problem',
  [
    (7, 'is 7, not a JSON object'),
    (['a'], 'is a list, not a JSON object'),
    ({}, 'has neither messages'),
    ({'text': 'x', 'a\nb': 1}, "has neither messages.* 'text'"),
    ({'prompt': 'x', 'completion': 4}, 'completion is 4: it must be a text'),
    ({'prompt': [QUESTION], 'completion': ''}, 'prompt is a list'),
    ({'messages': 'x'}, 'messages is a text: it must be a list'),
    ({'messages': []}, 'messages is an empty list'),
    ({'messages': [QUESTION] * 1001}, '1,001 messages, over the limit'),
    (turns('x'), r'messages\[1\] is a text: it must have a role'),
    (turns({'content': 'x'}), r'messages\[1\] has no role'),
    (turns({'role': 'bot', 'content': 'x'}), "has the role 'bot'"),
    (turns({'role': ['user'], 'content': 'x'}), 'has the role'),
    (turns({'role': 'user'}), r'messages\[1\] has no content'),
    (turns({'role': 'user', 'content': [{}]}), r'messages\[1\] is a list'),
    (turns(ANSWER | {'tool_calls': [{}]}), r'messages\[1\] has tool_calls'),
    (turns(ANSWER | {'train': 1}), '"train": 1: it must be true or false'),
    (turns(QUESTION | {'train': True}), 'only in a turn of the assistant'),
    (turns(ANSWER | {'reasoning_content': 3}), 'thoughts is 3'),
  ],
)
def test_damaged_records_are_refused_in_one_line(record, problem):
  with pytest.raises(UserError, match=problem) as error:
    conversations.parse(record)
  assert str(error.value).isprintable()


WRONG = ANSWER | {'content': '5'}


@pytest.mark.parametrize(
  'record',
  [
    {'prompt': '2+2?', 'chosen': '4', 'rejected': '5', 'score': 1},
    {'prompt': [QUESTION], 'chosen': [ANSWER], 'rejected': [WRONG]},
    {'prompt': '2+2?', 'chosen': [ANSWER], 'rejected': '5'},
    {'chosen': [QUESTION, ANSWER], 'rejected': [QUESTION, WRONG]},
    {
      'prompt': '2+2?',
      'chosen': [QUESTION, ANSWER],
      'rejected': [QUESTION, WRONG],
    },
  ],
)
def test_forms_of_preferences(record):
  pair = [QUESTION, ANSWER], [QUESTION, WRONG]
  assert conversations.parse_pair(record) == pair


@pytest.mark.parametrize(
  'record, problem',
  [
    ('x', 'is a text, not a JSON object: write one pair'),
    ({'prompt': 'x', 'chosen': 'a'}, "no rejected among 'prompt', 'chosen'"),
    ({'chosen': '', 'rejected': 'b'}, "no prompt among 'chosen', 'rejected'"),
    ({'prompt': 'x', 'chosen': 1, 'rejected': 'b'}, 'chosen is 1: it must be'),
    (
      {'prompt': [], 'chosen': 'a', 'rejected': 'b'},
      'prompt is an empty list: it must be a list of turns',
    ),
    ({'chosen': [ANSWER], 'rejected': [WRONG]}, 'chosen does not end a conv'),
    ({'prompt': 'x', 'chosen': [ANSWER], 'rejected': [QUESTION]}, 'rejected d'),
    (
      {'chosen': [QUESTION, ANSWER], 'rejected': [ANSWER, QUESTION, WRONG]},
      'differ before their last turn',
    ),
  ],
)
def test_damaged_preferences_are_refused_in_one_line(record, problem):
  with pytest.raises(UserError, match=problem) as error:
    conversations.parse_pair(record)
  assert str(error.value).isprintable()
