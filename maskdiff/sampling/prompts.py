"""Reads prompts from a file of lines or JSON lines, and from a keyboard."""

import dataclasses
import os
import sys

from maskdiff.config.settings import check_names, check_types
from maskdiff.errors import UserError
from maskdiff.files import reading


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A text to continue, or a text with gaps.

  Attributes:
    text: str.
    seed: int in [0, 2^32).
    settings: values that differ from those of the command line, by key of
      config.sample.
    where: file and line, for errors; '' for a text of the command line.
  """

  text: str
  seed: int
  settings: dict = dataclasses.field(default_factory=dict)
  where: str = ''


def read(path, first_seed):
  """Reads a file of prompts.

  Args:
    path: UTF-8 text, or /dev/stdin. In a file named *.jsonl every line is an
      object, all with the key `prompt` or all with `infill`, a text with gaps;
      `seed` and `settings` are optional. In other files every line is a prompt.
      Empty lines are skipped. Lines may end as on Windows.
    first_seed: seed of the first prompt; by default it grows by 1 per prompt.

  Returns:
    List of Prompt; and a bool, whether the prompts have gaps.

  Raises:
    UserError: the file cannot be read or has no prompts; a line is not valid;
      or the file has both prompts and texts with gaps.
  """
  is_json = os.path.splitext(path)[1] == '.jsonl'
  prompts, gaps = [], None
  for where, line in reading.lines(path):
    seed = first_seed + len(prompts)
    prompt, has_gaps = (
      _parse(line, seed, where)
      if is_json
      else (Prompt(line, seed, where=where), False)
    )
    if gaps not in (None, has_gaps):
      raise UserError(
        f'{where}: "prompt" and "infill" are in one file: split it into two'
      )
    gaps = has_gaps
    prompts.append(prompt)
  if not prompts:
    raise UserError(f'--prompts: {path} has no prompts')
  return prompts, gaps


def located(function, prompt):
  """Returns function(prompt); adds the file and line to a UserError.

  Args:
    function: function of a Prompt.
    prompt: Prompt.

  Raises:
    UserError: of the function, with `prompt.where` in front.
  """
  try:
    return function(prompt)
  except UserError as error:
    if not prompt.where:
      raise
    raise UserError(f'{prompt.where}: {error}') from error


def check_seed(prompt):
  """Raises UserError unless the seed of a Prompt is in [0, 2^32)."""
  if not 0 <= prompt.seed < 2**32:
    raise UserError(
      f'"seed" is {prompt.seed}, but must be an integer in [0, 2^32)'
    )


def typed(file, note):
  """Yields the lines of a stream as they arrive, without line ends.

  A line that is too long or not UTF-8 is skipped, after a message.

  Args:
    file: sys.stdin. On a terminal the user is prompted for each line, and can
      edit it and recall earlier ones.
    note: function that receives a line of text for every skipped line.

  Raises:
    UserError: the stream cannot be read.
  """
  if file.isatty() and sys.stdout.isatty():
    import readline  # noqa: F401, gives `input` editing and history

    while True:
      try:
        yield input('> ')
      except EOFError:
        print()
        return
      except KeyboardInterrupt:
        print()
        raise
      except UnicodeDecodeError as error:
        note(f'error: not UTF-8 ({error})')
  number, most = 0, reading.MAX_LINE_BYTES
  while True:
    number += 1
    try:
      line = rest = file.buffer.readline(most + 1)
      while len(rest) > most and not rest.endswith(b'\n'):
        rest = file.buffer.readline(most + 1)
    except OSError as error:
      raise UserError(
        f'cannot read standard input ({error.strerror})'
      ) from error
    if not line:
      return
    try:
      text = reading.decode_line(line, number == 1, f'line {number}')
    except UserError as error:
      note(f'error: {error}')
      continue
    yield text


def check_unicode(text, message):
  """Raises UserError(message) if the text cannot be encoded in UTF-8."""
  if any('\ud800' <= letter <= '\udfff' for letter in text):
    raise UserError(message)


def _parse(line, seed, where):
  row = reading.parse_json(line, where)
  row = row if isinstance(row, dict) else {}
  gaps = 'infill' in row
  text, seed = row.get('infill' if gaps else 'prompt'), row.get('seed', seed)
  if not isinstance(text, str) or (gaps and 'prompt' in row):
    raise UserError(
      f'{where}: must be {{"prompt": "text"}} or '
      '{"infill": "text, {{n}}"}'
    )
  if type(seed) is not int:
    raise UserError(f'{where}: "seed" must be an integer')
  settings = row.get('settings', {})
  if not isinstance(settings, dict):
    raise UserError(
      f'{where}: "settings" must be an object, such as {{"temperature": 0.7}}'
    )
  prompt = Prompt(text, seed, settings, where)
  located(lambda prompt: check_names(prompt.settings), prompt)
  located(lambda prompt: check_types(prompt.settings), prompt)
  located(check_seed, prompt)
  return prompt, gaps
