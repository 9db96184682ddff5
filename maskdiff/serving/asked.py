"""Reads requests in the OpenAI protocol, and checks every field of a body.

Besides the fields of OpenAI, a body may have the sampler settings that may
differ by request (config.sample.PER_REQUEST). max_tokens is their gen_length.
"""

import dataclasses
import numbers
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from maskdiff.config.sample import PER_REQUEST, SETTINGS
from maskdiff.config.settings import check_names, check_types
from maskdiff.data.tokenizer import Tokenizer
from maskdiff.errors import UserError, suggestion
from maskdiff.files import reading
from maskdiff.sampling import layouts, lengths
from maskdiff.sampling.settings import SamplerConfig, Settings

ROLES = ('system', 'user', 'assistant')
MAX_STOPS, MAX_STOP_CHARS = 4, 1000
# Fields that do not change an answer, and fields that do unless they have this
# value. Clients may send both.
IGNORED = ('metadata', 'safety_identifier', 'service_tier', 'store', 'user')
ONLY = {
  'best_of': 1,
  'echo': False,
  'frequency_penalty': 0,
  'logit_bias': {},
  'logprobs': False,
  'n': 1,
  'presence_penalty': 0,
  'response_format': {'type': 'text'},
  'suffix': '',
  'tool_choice': 'none',
  'tools': [],
}
_OWN = ('max_tokens', 'max_completion_tokens', 'model', 'seed', 'stop')
_STREAM = ('stream', 'stream_options')
_SETTINGS = tuple(name for name in PER_REQUEST if name != 'gen_length')


class BadRequest(UserError):
  """A request that cannot be answered; the fields are those of OpenAI's errors.

  Attributes:
    param: the field of the body, or None.
    code: a short name of the error, or None.
    http_status: int.
  """

  def __init__(self, message, param=None, code=None, http_status=400):
    super().__init__(message)
    self.param, self.code, self.http_status = param, code, http_status


class Chat(NamedTuple):
  """How conversations become prompts, and where an answer ends."""

  # From a list of dicts with role and content to token ids, which end where the
  # answer begins. Raises a UserError if the template refuses the messages.
  encode: Callable
  end_ids: tuple = ()  # tokens that end an answer, in addition to eos


@dataclasses.dataclass(frozen=True)
class Model:
  """The model of a server.

  Attributes:
    name: in requests and answers.
    config: ConfigDict of its run.
    c: SamplerConfig of all requests.
    values: dict, settings of requests that do not set them, with gen_length.
    tokenizer: data.tokenizer.Tokenizer.
    length: largest number of tokens of a prompt and its answer.
    chat: Chat; None: the model has no chat template.
    predict_length: whether the model predicts the length of each answer.
  """

  name: str
  config: ConfigDict
  c: SamplerConfig
  values: dict
  tokenizer: Tokenizer
  length: int
  chat: Chat | None = None
  predict_length: bool = False


def settings_of(model, tokens, changes=None):
  """Returns the Settings of an answer; see lengths.settings_of.

  Args:
    model: Model.
    tokens: number of slots of the answer.
    changes: dict, settings that differ from those of the model.
  """
  return lengths.settings_of(
    model.config, model.c, model.values, tokens, changes
  )


class Asked(NamedTuple):
  """A request, checked and encoded."""

  row: list  # int for a token, None for a slot
  num_prompt: int  # tokens of the prompt
  seed: int
  settings: Settings
  stream: bool
  include_usage: bool  # at the end of a stream
  end_ids: tuple  # tokens that end the answer
  stop: tuple  # texts that end the answer


def parse(model, content, is_chat):
  """Returns the Asked of a body.

  Args:
    model: Model.
    content: bytes, JSON.
    is_chat: whether the body has messages; otherwise, a prompt.

  Raises:
    UserError: the body is not valid. BadRequest, if the error has a field.
  """
  body = reading.parse_json(content, 'the body')
  if not isinstance(body, dict):
    raise BadRequest('the body must be a JSON object')
  body = {key: value for key, value in body.items() if value is not None}
  text = 'messages' if is_chat else 'prompt'
  _check_fields(body, (text, *_OWN, *_STREAM, *_SETTINGS))
  if body.get('model', model.name) != model.name:
    raise BadRequest(
      f'there is no model {body["model"]!r:.100}; this server has {model.name}',
      'model',
      'model_not_found',
      404,
    )
  if text not in body:
    raise BadRequest(f'{text} is missing', text)
  prompt = (_of_messages if is_chat else _of_prompt)(model, body[text])
  settings = _settings(model, body, len(prompt), text)
  options = _get(body, 'stream_options', dict, {})
  seed = _get(body, 'seed', int, secrets.randbelow(2**32))
  if not 0 <= seed < 2**32:
    raise BadRequest(f'seed={seed}: must lie in [0, 2^32)', 'seed')
  end_ids = model.chat.end_ids if is_chat else ()
  return Asked(
    layouts.prompt_row(prompt, settings.gen_length),
    len(prompt),
    seed,
    settings,
    _get(body, 'stream', bool, False),
    _get(options, 'include_usage', bool, False),
    (model.config.tokens.eos_id, *end_ids),
    _stop(body),
  )


def _check_fields(body, known):
  """Raises a BadRequest if a field is unknown, or not supported."""
  for key, value in body.items():
    if key in ONLY:
      only = ONLY[key]
      if value != only or isinstance(value, bool) != isinstance(only, bool):
        raise BadRequest(f'{key}: only {only!r} is supported', key)
    elif key in SETTINGS and key not in (*PER_REQUEST, *known):
      try:
        check_names({key: value})
      except UserError as error:
        raise BadRequest(str(error), key) from error
    elif key not in known and key not in IGNORED:
      raise BadRequest(
        f'unknown field {key!r:.100}{suggestion(key[:100], known)}; fields: '
        f'{", ".join(known)}',
        key[:100],
      )


def _get(body, key, kind, default):
  """Returns a field of a type, or the default.

  Args:
    body: dict.
    key: name of the field.
    kind: bool, int, str, dict or list.
    default: value of a missing field.
  """
  value = body.get(key, default)
  is_bool = isinstance(value, bool) and kind is not bool
  if not isinstance(value, kind) or is_bool:
    raise BadRequest(f'{key}: must be {kind.__name__}', key)
  return value


def _of_prompt(model, prompt):
  """Returns the token ids of a prompt: a text, or token ids."""
  if isinstance(prompt, str):
    return model.tokenizer.encode(prompt)
  size = model.config.model.vocab_size
  whole = lambda x: isinstance(x, numbers.Integral) and not isinstance(x, bool)
  if isinstance(prompt, list) and all(map(whole, prompt)):
    if all(0 <= token < size for token in prompt):
      return prompt
    raise BadRequest(f'prompt: token ids must lie in [0, {size})', 'prompt')
  raise BadRequest(
    'prompt: must be one text or one list of token ids; send a request per '
    'prompt',
    'prompt',
  )


def _of_messages(model, messages):
  """Returns the token ids of a conversation, by the template of the model."""
  if not model.chat:
    raise BadRequest(
      f'{model.name} has no chat template: start the server with '
      '--chat_template, or use /v1/completions',
      'messages',
    )
  if not isinstance(messages, list) or not messages:
    raise BadRequest('messages: must be a list of at least one', 'messages')
  messages = [_message(message, i) for i, message in enumerate(messages)]
  try:
    return model.chat.encode(messages)
  except UserError as error:
    raise BadRequest(f'messages: {error}', 'messages') from error


def _message(message, i):
  """Returns a message as a dict with the texts role and content."""
  where = f'messages[{i}]'
  if not isinstance(message, dict):
    raise BadRequest(f'{where}: must be an object', where)
  for key, value in message.items():
    if key not in ('role', 'content', 'name') and value not in (None, []):
      raise BadRequest(f'{where}.{key} is not supported', f'{where}.{key}')
  role, content = message.get('role'), message.get('content')
  if role not in ROLES:
    raise BadRequest(f'{where}.role: must be {", ".join(ROLES)}', where)
  parts = content if isinstance(content, list) else [_text_part(content)]
  for part in parts:
    is_text = isinstance(part, dict) and part.get('type') == 'text'
    if not is_text or not isinstance(part.get('text'), str):
      raise BadRequest(f'{where}.content: must be text', where)
  return {'role': role, 'content': ''.join(part['text'] for part in parts)}


def _text_part(content):
  return {'type': 'text', 'text': content}


def _settings(model, body, num_prompt, text):
  """Returns the Settings of a request.

  Args:
    model: Model.
    body: dict.
    num_prompt: number of tokens of the prompt.
    text: field with the prompt.
  """
  changes = {name: body[name] for name in _SETTINGS if name in body}
  room = model.length - num_prompt
  if room < 1:
    raise BadRequest(
      f'{text}: has {num_prompt} tokens, but prompt and answer together have '
      f'at most {model.length}: shorten it',
      text,
      'context_length_exceeded',
    )
  default = min(model.values['gen_length'], room)
  name = 'max_completion_tokens'
  name = name if name in body else 'max_tokens'
  tokens = _get(body, name, int, default)
  if not 1 <= tokens <= room:
    raise BadRequest(
      f'{name}={tokens}: must be at least 1 and at most {room}, since prompt '
      f'({num_prompt} tokens) and answer together have at most {model.length}',
      name,
      'context_length_exceeded' if tokens > room else None,
    )
  for key, value in changes.items():
    try:
      check_types({key: value})
    except UserError as error:
      raise BadRequest(str(error), key) from error
  try:
    return settings_of(model, tokens, changes)
  except UserError as error:
    message = str(error).replace('config.sample.', '')
    param = next((key for key in changes if f'{key}=' in message), None)
    raise BadRequest(message, param) from error


def _stop(body: dict[str, Any]):
  """Returns the texts of the field stop, a tuple."""
  stop = body.get('stop', [])
  stop = [stop] if isinstance(stop, str) else stop
  if not isinstance(stop, list) or not all(isinstance(x, str) for x in stop):
    raise BadRequest('stop: must be a text or a list of texts', 'stop')
  if len(stop) > MAX_STOPS or not all(
    0 < len(x) <= MAX_STOP_CHARS for x in stop
  ):
    raise BadRequest(
      f'stop: must be at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} '
      'characters',
      'stop',
    )
  return tuple(stop)
