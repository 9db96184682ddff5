"""Reads prompts from a file of lines or JSON lines, and from a keyboard."""

import dataclasses
import json
import os
import sys

from maskdiff.config.settings import check_names
from maskdiff.errors import UserError


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
    path: UTF-8 text. In a file named *.jsonl every line is an object, all with
      the key `prompt` or all with `infill`, a text with gaps; `seed` and
      `settings` are optional. In other files every line is a prompt. Empty
      lines are skipped.
    first_seed: seed of the first prompt; by default it grows by 1 per prompt.

  Returns:
    List of Prompt; and a bool, whether the prompts have gaps.

  Raises:
    UserError: the file cannot be read or has no prompts; a line is not valid;
      or the file has both prompts and texts with gaps.
  """
  try:
    with open(path, encoding='utf-8') as f:
      lines = f.read().split('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'--prompts: cannot read {path!r} ({error})') from error
  is_json = os.path.splitext(path)[1] == '.jsonl'
  prompts, gaps = [], None
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    seed = first_seed + len(prompts)
    where = f'{path}:{number}'
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


def typed(file):
  """Yields the lines of a stream as they arrive, without line ends.

  Args:
    file: sys.stdin. On a terminal the user is prompted for each line, and can
      edit it and recall earlier ones.
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
  if hasattr(file, 'reconfigure'):
    # `check_unicode` refuses a line that is not UTF-8. A decoding error would
    # end the whole conversation.
    file.reconfigure(encoding='utf-8', errors='surrogateescape')
  for line in file:
    yield line.removesuffix('\n')


def check_unicode(text, message):
  """Raises UserError(message) if the text cannot be encoded in UTF-8."""
  if any('\ud800' <= letter <= '\udfff' for letter in text):
    raise UserError(message)


def _parse(line, seed, where):
  try:
    row = json.loads(line)
  except ValueError as error:
    raise UserError(f'{where}: not JSON ({error})') from error
  row = row if isinstance(row, dict) else {}
  gaps = 'infill' in row
  text, seed = row.get('infill' if gaps else 'prompt'), row.get('seed', seed)
  if not isinstance(text, str) or (gaps and 'prompt' in row):
    raise UserError(
      f'{where}: must be {{"prompt": "text"}} or '
      '{"infill": "text, {{n}}"}'
    )
  check_unicode(text, f'{where}: half a surrogate pair is not valid text')
  if not isinstance(seed, int) or not 0 <= seed < 2**32:
    raise UserError(f'{where}: "seed" must be an integer in [0, 2^32)')
  settings = row.get('settings', {})
  if not isinstance(settings, dict):
    raise UserError(
      f'{where}: "settings" must be an object, such as {{"temperature": 0.7}}'
    )
  prompt = Prompt(text, seed, settings, where)
  located(lambda prompt: check_names(prompt.settings), prompt)
  return prompt, gaps
