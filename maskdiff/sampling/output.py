"""Prints answers and denoising steps, and writes answers to files."""

import contextlib
import os
import sys
import time

import jax

from maskdiff.distributed import runtime
from maskdiff.errors import UserError
from maskdiff.files import json_text, outputs, streams

STEP_SECONDS = 0.1  # that --show leaves a step on a terminal


def write_answers(answers, write, shown, totals):
  """Writes or prints answers as they arrive, and counts their tokens and work.

  Args:
    answers: iterable of dicts, in the form that answers.py describes.
    write: function that writes a line to --out, or None to print the text.
    shown: True if --show has already printed the texts.
    totals: Counter of tokens, forwards and positions, updated in place.
  """
  for number, answer in enumerate(answers):
    for key in ('tokens', 'forwards', 'positions'):
      totals[key] += answer[key]
    if write:
      write(json_text.dumps(answer, ensure_ascii=False))
    elif not shown:
      line = '---\n' if number else ''
      runtime.print_once(line + answer['text'], file=sys.stdout)


def print_step(texts):
  """Prints the texts of a step; a terminal is cleared first, and then waits."""
  end = '\n' + '=' * 8
  if sys.stdout.isatty():
    end = ''
    if jax.process_index() == 0:
      streams.clear_terminal()
    time.sleep(STEP_SECONDS)
  runtime.print_once('\n---\n'.join(texts) + end, file=sys.stdout)


@contextlib.contextmanager
def open_lines(flag, path):
  """Yields a function that writes a line to the file of a flag.

  Yields None without a path. Only process 0 writes; see `outputs.lines`.
  """
  if not path or jax.process_index():
    yield path and (lambda text: None)
    return
  with outputs.lines(flag, path, runtime.print_once) as write:
    yield write
  runtime.print_once(f'answers: {path}')


def write_page(flag, path, page):
  """Writes an HTML page to the file of a flag, from process 0 only."""
  if jax.process_index() == 0:
    outputs.write(flag, path, page)
  runtime.print_once(f'page: {path}')


def check_files(**paths):
  """Raises UserError, from process 0, if a flag names a file it cannot write.

  Args:
    **paths: path by name of the flag; None for a flag that is not set. Two
      flags must not name the same regular file.
  """
  if jax.process_index() == 0:
    flag_of = {}
    for flag, path in paths.items():
      if path:
        outputs.check(flag, path)
        file = os.path.realpath(path)
        if file in flag_of and not file.startswith('/dev/'):
          raise UserError(f'--{flag_of[file]} and --{flag} name the same file')
        flag_of[file] = flag
