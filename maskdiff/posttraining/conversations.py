"""Records of files to conversations.

A record has `messages`, or a prompt and its answer under the names of PAIRS:

    {"messages": [{"role": "user", "content": "2+2?"},
                  {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2?", "completion": "4"}
    {"instruction": "Add.", "input": "2 and 2", "output": "4"}

A message may also have `train`, whether an answer is learned, and
`reasoning_content`, which some templates read. Records of preferences have a
chosen and a rejected answer (`parse_pair`).
"""

from maskdiff.errors import UserError, inline

ANSWERS = 'chosen', 'rejected'  # of a pair
ROLES = ('system', 'user', 'assistant', 'tool')
PAIRS = (
  ('prompt', 'completion'),
  ('prompt', 'response'),
  ('prompt', 'answer'),
  ('question', 'answer'),
  ('instruction', 'output'),
)
MAX_MESSAGES = 1000  # the time to find answers grows with the square


def parse(record) -> list[dict]:
  """Returns the messages of a record, dicts with role and content.

  Keys other than role, content, train and reasoning_content are dropped.

  Args:
    record: JSON value.

  Raises:
    UserError: the record has not the form above. The message does not name the
      file, which the caller knows.
  """
  if not isinstance(record, dict):
    raise UserError(
      f'is {_kind(record)}, not a JSON object: write one conversation per line'
    )
  if record.get('messages') is not None:
    return messages(record['messages'], 'messages')
  for first, second in PAIRS:
    if record.get(first) is not None and record.get(second) is not None:
      question = _text(record[first], first)
      more = record.get('input') if first == 'instruction' else None
      if more is not None and _text(more, 'input'):
        question = f'{question}\n\n{more}'
      return [
        {'role': 'user', 'content': question},
        {'role': 'assistant', 'content': _text(record[second], second)},
      ]
  known = ', '.join(f'{first} and {second}' for first, second in PAIRS)
  names = ', '.join(inline(repr(name), 40) for name in list(record)[:10])
  raise UserError(f'has neither messages nor a pair ({known}) among {names}')


def parse_pair(record) -> tuple[list[dict], list[dict]]:
  """Returns the conversations with the chosen and with the rejected answer.

  They differ in their last turn only, which is an answer.

  Args:
    record: JSON value with `prompt`, `chosen` and `rejected`, which are texts
      or lists of messages, as in datasets for TRL. Without `prompt`, the lists
      are whole conversations.

  Raises:
    UserError: as `parse`.
  """
  if not isinstance(record, dict):
    raise UserError(
      f'is {_kind(record)}, not a JSON object: write one pair per line'
    )
  chosen, rejected = (_with_answer(record, key) for key in ANSWERS)
  for key, turns in zip(ANSWERS, (chosen, rejected), strict=True):
    if len(turns) < 2 or turns[-1]['role'] != 'assistant':
      raise UserError(
        f'{key} does not end a conversation: it must be an answer of the '
        'assistant to a prompt'
      )
  if chosen[:-1] != rejected[:-1]:
    raise UserError(
      'chosen and rejected differ before their last turn: they must answer the '
      'same prompt'
    )
  return chosen, rejected


def _with_answer(record, key: str) -> list[dict]:
  """Returns the conversation that ends with an answer of a pair."""
  prompt, answer = record.get('prompt'), record.get(key)
  if answer is None or (prompt is None and isinstance(answer, str)):
    names = ', '.join(inline(repr(name), 40) for name in list(record)[:10])
    missing = key if answer is None else 'prompt'
    raise UserError(
      f'has no {missing} among {names}: a pair has prompt, chosen and rejected'
    )
  turns = _turns(answer, key, 'assistant')
  # Some datasets repeat the prompt in both answers.
  if prompt is None or turns[0]['role'] != 'assistant':
    return turns
  return _turns(prompt, 'prompt', 'user') + turns


def _turns(found, name: str, role: str) -> list[dict]:
  if isinstance(found, str):
    return [{'role': role, 'content': found}]
  return messages(found, name)


def messages(found, name: str) -> list[dict]:
  """Returns the messages of a list, as `parse`; errors call it `name`."""
  if not isinstance(found, list) or not found:
    raise UserError(f'{name} is {_kind(found)}: it must be a list of turns')
  if len(found) > MAX_MESSAGES:
    raise UserError(
      f'has {len(found):,} messages, over the limit of {MAX_MESSAGES:,}: split '
      'the conversation'
    )
  return [_message(turn, f'{name}[{i}]') for i, turn in enumerate(found)]


def _message(turn, where: str) -> dict:
  if not isinstance(turn, dict):
    raise UserError(
      f'{where} is {_kind(turn)}: it must have a role and a content'
    )
  role = turn.get('role')
  if role is None:
    raise UserError(f'{where} has no role: it is one of {", ".join(ROLES)}')
  if role not in ROLES:
    raise UserError(
      f'{where} has the role {inline(repr(role), 40)}: it must be one of '
      f'{", ".join(ROLES)}'
    )
  if turn.get('tool_calls'):
    raise UserError(
      f'{where} has tool_calls, which are not rendered: write them in the '
      'content, or leave the conversation out'
    )
  if turn.get('content') is None:
    raise UserError(f'{where} has no content: write "" for an empty turn')
  message = {'role': role, 'content': _text(turn['content'], where)}
  # Parquet has a null for a key that other messages have.
  if (thoughts := turn.get('reasoning_content')) is not None:
    message['reasoning_content'] = _text(thoughts, f'{where} thoughts')
  if (train := turn.get('train')) is not None:
    if not isinstance(train, bool) or (train and role != 'assistant'):
      raise UserError(
        f'{where} has "train": {inline(repr(train), 40)}: it must be true or '
        'false, and true only in a turn of the assistant'
      )
    message['train'] = train
  return message


def _text(value, where: str) -> str:
  if not isinstance(value, str):
    raise UserError(f'{where} is {_kind(value)}: it must be a text')
  return value


def _kind(value) -> str:
  names = {dict: 'an object', list: 'a list', str: 'a text', type(None): 'null'}
  if isinstance(value, list) and not value:
    return 'an empty list'
  return names.get(type(value)) or inline(repr(value), 40)
