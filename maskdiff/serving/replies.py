"""Bodies of answers and errors in the OpenAI protocol."""

import time
import uuid

from maskdiff.files import json_text


class Reply:
  """Makes the bodies of one answer; all have its id."""

  def __init__(self, model_name, asked, is_chat):
    """`asked` is the asked.Asked; the other arguments are str and bool."""
    self._is_chat = is_chat
    self._object = 'chat.completion' if is_chat else 'text_completion'
    self._num_prompt = asked.num_prompt
    self._common = {
      'id': f'{"chatcmpl" if is_chat else "cmpl"}-{uuid.uuid4().hex}',
      'created': int(time.time()),
      'model': model_name,
      'seed': asked.seed,  # not a field of OpenAI: it reproduces the answer
    }

  def whole(self, text, finish, tokens):
    """Returns the body of an answer that is not streamed, a dict.

    Args:
      text: the answer.
      finish: 'stop' or 'length'.
      tokens: number of tokens of the answer.
    """
    if self._is_chat:
      content = {'message': {'role': 'assistant', 'content': text}}
    else:
      content = {'text': text}
    return self._body(self._object, [self._choice(content, finish)]) | {
      'usage': self._usage(tokens)
    }

  def part(self, text, finish=None, is_first=False):
    """Returns the body of a part of a stream, a dict; arguments as `whole`."""
    content = {'text': text}
    if self._is_chat:
      role = {'role': 'assistant'} if is_first else {}
      content = {'delta': role | ({'content': text} if text or role else {})}
    return self._body(self._part, [self._choice(content, finish)])

  def usage(self, tokens):
    """Returns the body of the part of a stream that counts tokens, a dict."""
    return self._body(self._part, []) | {'usage': self._usage(tokens)}

  @property
  def _part(self):
    return self._object + '.chunk' * self._is_chat

  def _body(self, kind, choices):
    return self._common | {'object': kind, 'choices': choices}

  def _choice(self, content, finish):
    return {'index': 0, **content, 'logprobs': None, 'finish_reason': finish}

  def _usage(self, tokens):
    return {
      'prompt_tokens': self._num_prompt,
      'completion_tokens': tokens,
      'total_tokens': self._num_prompt + tokens,
    }


def event(body):
  """Returns a server-sent event with a JSON body, as str."""
  return f'data: {json_text.dumps(body)}\n\n'


DONE = 'data: [DONE]\n\n'


def error(message, http_status, param=None, code=None):
  """Returns the body of an error, a dict."""
  kind = 'invalid_request_error' if http_status < 500 else 'server_error'
  fields = {'message': message, 'type': kind, 'param': param, 'code': code}
  return {'error': fields}


def models(name, created):
  """Returns the body of /v1/models, a dict."""
  model = {
    'id': name,
    'object': 'model',
    'created': created,
    'owned_by': 'maskdiff',
  }
  return {'object': 'list', 'data': [model]}
