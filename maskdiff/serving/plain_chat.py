"""Conversations as plain text, for models without a chat template.

    SYSTEM

    User:
    What is 2 + 2?

    Assistant:
    4

An answer ends where the model would begin the next turn of the user. The text
has no special tokens, so any model that has seen dialogues can continue it.
"""

from maskdiff.serving.asked import Chat

_HEADERS = {'system': '', 'user': 'User:\n', 'assistant': 'Assistant:\n'}
STOP = '\n\nUser:'


def chat(tokenizer):
  """Returns the Chat of a tokenizer.

  Args:
    tokenizer: data.tokenizer.Tokenizer.
  """
  return Chat(lambda messages: tokenizer.encode(text(messages)), (), (STOP,))


def text(messages):
  """Returns a conversation as text, up to the beginning of the next answer.

  Args:
    messages: list of dicts with role and content.
  """
  turns = [_HEADERS[m['role']] + m['content'] + '\n\n' for m in messages]
  return ''.join(turns) + _HEADERS['assistant']
