"""Chat templates: conversations to texts, as transformers renders them.

A template is a Jinja program of a model's folder, or one of chat_templates.py.
It may come from anybody, so it runs in Jinja's sandbox, and for a limited time.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import jinja2

from maskdiff.data import tokenizer_files
from maskdiff.errors import UserError, suggestion, writing
from maskdiff.files import atomic, reading
from maskdiff.files import folder as folder_lib
from maskdiff.posttraining import chat_sandbox as sandbox
from maskdiff.posttraining.chat_templates import TEMPLATES

FILE = tokenizer_files.CHAT_TEMPLATE
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
  values = _parse_arguments(arguments)
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
  # Jinja computes constant expressions when it compiles.
  with sandbox.errors(name), sandbox.time_limit(MAX_SECONDS):
    sandbox.compiled(source)
  return template


def with_defaults(template: Template, arguments: str) -> Template:
  """Returns a template whose variables have values unless a caller sets them.

  Its source begins with a line that sets them. For the template of a run, whose
  rows were rendered with these values.

  Args:
    template: Template.
    arguments: see `Template`.

  Raises:
    UserError: the arguments are not a JSON object, or a name or a value cannot
      be written in the language of Jinja.
  """
  values = _parse_arguments(arguments)
  lines = [
    f'{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}'
    '{% endif %}'
    for name, value in values.items()
    if name.isidentifier()  # no template has another variable
  ]
  if not lines:
    return template
  # A template does not write the newline after a block.
  source = ''.join(lines) + '\n' + template.source
  with sandbox.errors(template.name), sandbox.time_limit(MAX_SECONDS):
    sandbox.compiled(source)
  return dataclasses.replace(template, source=source)


def of_folder(path: str | os.PathLike) -> Template | None:
  """Returns the template of a folder; None if the folder has none.

  Raises:
    UserError: as `load`.
  """
  path = pathlib.Path(path)
  if (path / FILE).exists():
    return load(str(path))
  if _config(path).get('chat_template') is None:  # missing, or null
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
    seconds: limit on the time.

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
    strftime_now=sandbox.refuse_date if fixed_date else sandbox.strftime_now,
    **special,
  )
  variables |= json.loads(template.arguments)
  size, pieces = 0, []
  with sandbox.errors(template.name), sandbox.time_limit(seconds):
    for piece in sandbox.compiled(template.source).generate(variables):
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


def _parse_arguments(arguments: str) -> dict:
  is_text = isinstance(arguments, str)  # a damaged manifest may have others
  values = is_text and reading.parse_json(arguments, 'the template arguments')
  if not isinstance(values, dict):
    raise UserError(
      f'the template arguments {arguments!r:.60} are not a JSON object: write '
      '{"enable_thinking": false}, for example'
    )
  return values


def _literal(value) -> str:
  """Returns a JSON value in the language of Jinja."""
  if isinstance(value, dict):
    items = (f'{_literal(k)}: {_literal(v)}' for k, v in value.items())
    return '{' + ', '.join(items) + '}'
  if isinstance(value, list):
    return '[' + ', '.join(map(_literal, value)) + ']'
  return 'none' if value is None else json.dumps(value, ensure_ascii=False)


def _of_folder(path: pathlib.Path) -> str:
  if (path / FILE).exists():
    content = folder_lib.read_bytes(path, FILE)
    try:
      return content.decode()
    except UnicodeDecodeError as e:
      raise UserError(f'{path / FILE} is not UTF-8: replace it') from e
  found = _config(path).get('chat_template')
  if isinstance(found, list):
    named = (t for t in found if isinstance(t, dict))
    default = (t for t in named if t.get('name') == 'default')
    found = next(default, {}).get('template')
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


def _without_marks(text: str, before: str, after: str) -> Rendered:
  parts, spans, at = [], [], 0
  for piece in text.split(before):
    inside, mark, outside = piece.rpartition(after)
    if mark:
      spans.append((at, at + len(inside)))
    parts += [inside, outside]
    at += len(inside) + len(outside)
  return Rendered(''.join(parts), tuple(spans))


def _texts(messages) -> str:
  return json.dumps(list(messages), ensure_ascii=False)
