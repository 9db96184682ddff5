"""Chat templates: conversations to texts, as transformers renders them.

A template is a Jinja program of a model's folder, or one of chat_templates.py.
It may come from anybody, so it runs in Jinja's sandbox, and for a limited time.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import pathlib
import signal
import threading
from collections.abc import Mapping, Sequence

import jinja2
import jinja2.ext
import jinja2.sandbox

from maskdiff.errors import UserError, one_line, suggestion, writing
from maskdiff.files import atomic, reading
from maskdiff.files import folder as folder_lib
from maskdiff.posttraining.chat_templates import TEMPLATES

FILE = 'chat_template.jinja'
CONFIG = 'tokenizer_config.json'  # its key chat_template, in older folders
MAX_CHARS = 1 << 27  # of a rendered text
MAX_SECONDS = 10.0  # of rendering it
_PRIVATE_USE = range(0xE000, 0xF900)


@dataclasses.dataclass(frozen=True)
class Template:
  """A chat template.

  Attributes:
    name: name or path, for messages.
    source: text in the language of Jinja.
    arguments: variables of the template by name, as JSON, such as
      '{"enable_thinking": false}'.
  """

  name: str
  source: str
  arguments: str = '{}'

  @property
  def fingerprint(self) -> str:
    """16 hex digits, a hash of the source and the arguments."""
    content = json.dumps([self.source, self.arguments]).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class Rendered:
  """A rendered conversation.

  Attributes:
    text: the text.
    generated: (start, stop) of the answers, in characters of the text, if the
      template marks them by {% generation %}.
  """

  text: str
  generated: tuple[tuple[int, int], ...] = ()


def load(name: str, arguments: str = '{}') -> Template:
  """Returns a template by its name, or that of a model's folder.

  In a folder, the template is the file chat_template.jinja, else the key
  chat_template of tokenizer_config.json: a text, or a list of templates with
  names, of which 'default' is taken.

  Args:
    name: a key of TEMPLATES; the path of a folder; or of a .jinja file.
    arguments: see `Template`.

  Raises:
    UserError: there is no such template, it is not in the language of Jinja, or
      the arguments are not a JSON object.
  """
  values = reading.parse_json(arguments, 'the template arguments')
  if not isinstance(values, dict):
    raise UserError(
      f'the template arguments {arguments!r:.60} are not a JSON object: write '
      '{"enable_thinking": false}, for example'
    )
  path = pathlib.Path(name).expanduser()
  if name in TEMPLATES:
    source = TEMPLATES[name]
  elif path.is_dir():
    source = _of_folder(path)
  elif path.suffix == '.jinja':
    source = reading.read_text(path)
  else:
    raise UserError(
      f'there is no chat template {name!r:.100}: give a folder with one, or '
      f'one of {", ".join(TEMPLATES)}{suggestion(name, TEMPLATES)}'
    )
  template = Template(name, source, json.dumps(values, sort_keys=True))
  with _errors(template):
    _compiled(source)
  return template


def of_folder(path: str | os.PathLike) -> Template | None:
  """Returns the template of a folder; None if the folder has none.

  Raises:
    UserError: as `load`.
  """
  path = pathlib.Path(path)
  if not (path / FILE).exists() and 'chat_template' not in _config(path):
    return None
  return load(str(path))


def save(template: Template, directory: str | os.PathLike) -> None:
  """Writes a template to a directory, for `load` and for transformers.

  Raises:
    UserError: the directory is not writable.
  """
  path = os.path.join(directory, FILE)
  with writing('out', path):
    atomic.write_if_changed(path, template.source.encode())


def render(
  template: Template,
  messages: Sequence[Mapping],
  *,
  generation_prompt: bool,
  special: Mapping[str, str],
  fixed_date: bool = False,
  seconds: float = MAX_SECONDS,
) -> Rendered:
  """Renders a conversation as apply_chat_template of transformers does.

  Args:
    template: Template.
    messages: dicts with role and content, the turns from first to last.
    generation_prompt: whether to end with the header of the next answer.
    special: texts of special tokens by name: 'bos_token', 'eos_token'.
    fixed_date: refuse templates that ask for the date: a preparation of rows
      must have the same result every day.
    seconds: limit on the time. It needs the main thread of the process; on
      other threads there is no limit.

  Raises:
    UserError: the template refuses the conversation, fails, or exceeds a limit.
  """
  before, after = unused_characters([template.source, _texts(messages)], 2)
  variables = dict(
    messages=list(messages),
    tools=None,
    documents=None,
    add_generation_prompt=generation_prompt,
    generation_marks=(before, after),
    strftime_now=_refuse_date if fixed_date else _strftime_now,
    **special,
  )
  variables |= json.loads(template.arguments)
  size, pieces = 0, []
  with _errors(template), _time_limit(seconds):
    for piece in _compiled(template.source).generate(variables):
      pieces.append(piece)
      size += len(piece)
      if size > MAX_CHARS:
        raise jinja2.TemplateError(
          f'the text has over {MAX_CHARS:,} characters'
        )
  return _without_marks(''.join(pieces), before, after)


def unused_characters(texts: Sequence[str], count: int) -> list[str]:
  """Returns `count` characters of Unicode's private use that no text has.

  Raises:
    UserError: the texts use almost all of them.
  """
  used = set().union(*texts)
  free = (chr(i) for i in _PRIVATE_USE if chr(i) not in used)
  found = [c for c, _ in zip(free, range(count), strict=False)]
  if len(found) < count:
    raise UserError(
      'a conversation uses almost every private character of Unicode: remove it'
    )
  return found


def _of_folder(path: pathlib.Path) -> str:
  if (path / FILE).exists():
    content = folder_lib.read_bytes(path, FILE)
    try:
      return content.decode()
    except UnicodeDecodeError as e:
      raise UserError(f'{path / FILE} is not UTF-8: replace it') from e
  found = _config(path).get('chat_template')
  if isinstance(found, list):
    named = {t.get('name'): t for t in found if isinstance(t, dict)}
    found = named.get('default', {}).get('template')
  if not isinstance(found, str):
    raise UserError(
      f'{path} has no chat template: it needs a file {FILE} or the key '
      f'chat_template in {CONFIG}; or choose one of {", ".join(TEMPLATES)}'
    )
  return found


def _config(path: pathlib.Path) -> dict:
  if not (path / CONFIG).exists():
    return {}
  config = reading.parse_json(
    folder_lib.read_bytes(path, CONFIG), str(path / CONFIG)
  )
  return config if isinstance(config, dict) else {}


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
  # Options, filters and functions as in transformers 4.49.
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _raise_exception
  return environment.from_string(source)


class _Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}: marks a part of the text."""

  tags = {'generation'}

  def parse(self, parser):
    line = next(parser.stream).lineno
    body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
    marks = jinja2.nodes.Name('generation_marks', 'load')
    call = self.call_method('_mark', [marks])
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _mark(self, marks, caller):
    return marks[0] + caller() + marks[1]


def _without_marks(text: str, before: str, after: str) -> Rendered:
  parts, spans, at = [], [], 0
  for piece in text.split(before):
    inside, mark, outside = piece.rpartition(after)
    if mark:
      spans.append((at, at + len(inside)))
    parts += [inside, outside]
    at += len(inside) + len(outside)
  return Rendered(''.join(parts), tuple(spans))


def _to_json(value, ensure_ascii=False, indent=None, separators=None, **kwargs):
  # Jinja's own filter escapes < and >.
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=kwargs.get('sort_keys', False),
  )


def _raise_exception(message):
  raise jinja2.TemplateError(message)


def _strftime_now(format):
  return datetime.datetime.now().strftime(format)


def _refuse_date(format):
  raise jinja2.TemplateError(
    'it prints the date of today; set its variable of the date, such as '
    '--chat_arguments=\'{"date_string": "26 Jul 2024"}\''
  )


def _texts(messages) -> str:
  return json.dumps(list(messages), ensure_ascii=False)


class _TooSlow(BaseException):
  """Not an Exception, which a template's functions might catch."""


@contextlib.contextmanager
def _errors(template: Template):
  """Context manager: turns all that a template may raise into a UserError."""
  try:
    yield
  except _TooSlow as e:
    reason = 'it does not end'
    raise UserError(f'chat template {template.name!r}: {reason}') from e
  except Exception as e:  # a template may call any method of its values
    reason = one_line(e)
    raise UserError(f'chat template {template.name!r}: {reason}') from e


@contextlib.contextmanager
def _time_limit(seconds: float):
  """Context manager: raises _TooSlow after some seconds, on the main thread."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def stop(*_):
    raise _TooSlow

  previous = signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, seconds)
  try:
    yield
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)
