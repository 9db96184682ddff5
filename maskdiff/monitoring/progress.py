"""Progress of long commands on standard error, a line at a time."""

import contextlib
import sys
import threading
import time

# Seconds between two lines.
TERMINAL_S, LOG_S = 2, 30


def counter(total, unit):
  """Returns a function that counts finished work and sometimes prints a line.

  A line is printed every TERMINAL_S seconds on a terminal, and every LOG_S
  seconds in a log. Short work prints nothing.

  Args:
    total: number of things to do.
    unit: their name in the plural, for example 'lines'.

  Returns:
    Function of the number of things that have been finished since its last
    call, by default 1.
  """
  began = shown = time.monotonic()
  done = 0

  def count(number=1):
    nonlocal done, shown
    done += number
    now = time.monotonic()
    if now - shown >= _interval():
      shown = now
      left = (now - began) * (total - done) / done if done else 0
      _say(f'{done:,} of {total:,} {unit}, about {left:.0f} s left')

  return count


@contextlib.contextmanager
def waiting(text):
  """Context manager that prints the text, and the seconds so far now and then.

  For work that cannot be counted, such as a compilation.
  """
  ended, began = threading.Event(), time.monotonic()
  _say(text)

  def tell():
    while not ended.wait(_interval()):
      _say(f'{text}: {time.monotonic() - began:.0f} s')

  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()


def _interval():
  return TERMINAL_S if sys.stderr.isatty() else LOG_S


def _say(text):
  print(text, file=sys.stderr, flush=True)
