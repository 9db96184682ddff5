"""Prints answers and denoising steps, and writes answers to files."""

import contextlib
import sys
import time

import jax

from maskdiff.distributed import runtime
from maskdiff.errors import writing
from maskdiff.files import json_text

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
      write(json_text.dumps(answer, ensure_ascii=False) + '\n')
    elif not shown:
      line = '---\n' if number else ''
      runtime.print_once(line + answer['text'], file=sys.stdout)


def print_step(texts):
  """Prints the texts of a step; a terminal is cleared first, and then waits."""
  clear, end = '', '\n' + '=' * 8
  if sys.stdout.isatty():
    clear, end = '\x1b[2J\x1b[H', ''
    time.sleep(STEP_SECONDS)
  runtime.print_once(clear + '\n---\n'.join(texts) + end, file=sys.stdout)


@contextlib.contextmanager
def open_file(flag, path):
  """Yields a function that writes text to the file of a flag.

  Yields None without a path. Only process 0 writes. Each line is flushed.
  """
  if not path or jax.process_index():
    yield path and (lambda text: None)
    return
  with writing(flag, path):
    f = open(path, 'w', encoding='utf-8', buffering=1)
  with f:
    yield f.write
