"""Reports a stalled run: kind of work, duration and stacks of all threads."""

import collections
import contextlib
import sys
import threading
import traceback

from maskdiff.distributed import runtime

COMPILE_FACTOR = 10  # a compilation may last this many times stall_s
_MAX_INTERVAL_S = 10  # between two checks


@contextlib.contextmanager
def watch(ledger, stall_s, out=None):
  """Context manager that reports stalls from a thread.

  When a span of the ledger lasts longer than stall_s, and again after every
  further stall_s, the thread prints the kind of the span, its seconds, the
  seconds by kind before it, and the stack of every Python thread. It never ends
  the run, which may only be slow.

  Args:
    ledger: Ledger of this process.
    stall_s: seconds; 0 disables the watchdog.
    out: text file; None for standard error.
  """
  if not stall_s:
    yield
    return
  done = threading.Event()
  thread = threading.Thread(
    target=_check,
    args=(ledger, stall_s, out, done),
    name='watchdog',
    daemon=True,
  )
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def _check(ledger, stall_s, out, done):
  """Checks for stalls until the event `done` is set."""
  reports = 0
  while not done.wait(min(stall_s / 4, _MAX_INTERVAL_S)):
    kind, seconds = ledger.current()
    limit = stall_s * (COMPILE_FACTOR if kind == 'compile' else 1)
    if seconds < limit:
      reports = 0
    elif seconds >= limit + reports * stall_s:
      reports = int((seconds - limit) // stall_s) + 1
      text = describe(kind, seconds, ledger.totals())
      with contextlib.suppress(OSError, ValueError):  # closed terminal
        print(text, file=out or sys.stderr, flush=True)


def describe(kind, seconds, totals):
  """Formats a report about a stall.

  Args:
    kind, seconds: kind of the current span and how long it has lasted.
    totals: seconds by kind before it.
  """
  spent = ', '.join(f'{k} {s:,.1f}' for k, s in totals.items() if s)
  process = runtime.process_name()
  return (
    f'stall: {kind!r} has lasted {seconds:,.1f} s'
    + (f' in {process}' if process else '')
    + f'; seconds before by kind: {spent or "none"}\n{_stacks()}'
  )


def _stacks():
  """Returns the stacks of all other threads, grouped if they are equal."""
  names = {t.ident: t.name for t in threading.enumerate()}
  threads_by_stack = collections.defaultdict(list)
  for ident, frame in sys._current_frames().items():
    if ident != threading.get_ident():
      stack = ''.join(traceback.format_stack(frame))
      threads_by_stack[stack].append(names.get(ident, str(ident)))
  return '\n'.join(
    f'thread {", ".join(sorted(threads))}:\n{stack}'
    for stack, threads in threads_by_stack.items()
  )
