"""Prompts from a file, one per line or JSON lines, and from a keyboard."""

import dataclasses
import json
import os
import sys

from maskdiff.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prompt:
  text: str
  seed: int


def read(path, first_seed):
  """Reads a file of prompts.

  Args:
    path: UTF-8 text. If it ends in .jsonl, every line is an object with the
      key `prompt`, or every line one with `infill`, a text with gaps, and, if
      the request has a seed of its own, `seed`; else a line is a prompt, and
      empty ones are passed over.
    first_seed: seed of the first line; the n-th after it has first_seed + n.

  Returns:
    List of Prompt; and whether they have gaps.

  Raises:
    UserError: the file cannot be read, has no prompts, a line is wrong, or
      some lines have gaps and some are prompts.
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
      _parse(line, seed, where) if is_json else (Prompt(line, seed), False)
    )
    if gaps not in (None, has_gaps):
      raise UserError(
        f'{where}: "prompt" and "infill" in one file: write one for each'
      )
    gaps = has_gaps
    prompts.append(prompt)
  if not prompts:
    raise UserError(f'--prompts: {path} has no prompts')
  return prompts, gaps


def typed(file):
  """Yields lines as they come, without their ends, until there are no more.

  Args:
    file: sys.stdin, or what stands for it; on a terminal, lines are asked for
      and can be edited and called back.
  """
  if file.isatty() and sys.stdout.isatty():
    import readline  # noqa: F401, which changes what `input` does

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
    # A line that is not UTF-8 is found by `check_unicode`, not here.
    file.reconfigure(encoding='utf-8', errors='surrogateescape')
  for line in file:
    yield line.removesuffix('\n')


def check_unicode(text, message):
  """Raises UserError if there are letters that no UTF-8 file holds."""
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
      f'{where}: wants {{"prompt": "text"}} or {{"infill": "text, {{{{n}}}}"}}'
    )
  check_unicode(text, f'{where}: half a surrogate pair is no text')
  if not isinstance(seed, int) or not 0 <= seed < 2**32:
    raise UserError(f'{where}: "seed" must be an integer in [0, 2^32)')
  return Prompt(text, seed), gaps
