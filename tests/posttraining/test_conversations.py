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
