"""Says where a run hangs: what it is doing, for how long, and all stacks."""

import collections
import contextlib
import sys
import threading
import traceback

from maskdiff.distributed import runtime

COMPILE_FACTOR = 10  # a compilation may last so many times as long
_LOOK_S = 10


@contextlib.contextmanager
def watch(ledger, stall_s, out=None):
  """Reports, from a thread of its own, when the run does not get on.

  Once the same span of the ledger lasts longer than stall_s, and then every
  stall_s, it prints the kind of span, its seconds, the seconds by kind so far
  and the stack of every Python thread. It ends nothing: what is slow may still
  come.

  Args:
    ledger: Ledger of this process.
    stall_s: seconds; 0 for no watchdog.
    out: text file, standard error by default.
  """
  if not stall_s:
    yield
    return
  done = threading.Event()
  thread = threading.Thread(
    target=_look,
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


def _look(ledger, stall_s, out, done):
  reports = 0
  while not done.wait(min(stall_s / 4, _LOOK_S)):
    kind, seconds = ledger.current()
    limit = stall_s * (COMPILE_FACTOR if kind == 'compile' else 1)
    if seconds < limit:
      reports = 0
    elif seconds >= limit + reports * stall_s:
      reports = int((seconds - limit) // stall_s) + 1
      text = describe(kind, seconds, ledger.totals())
      with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        print(text, file=out or sys.stderr, flush=True)


def describe(kind, seconds, totals):
  """What `watch` prints."""
  spent = ', '.join(f'{k} {s:,.1f}' for k, s in totals.items() if s)
  who = runtime.who()
  return (
    f'stall: {kind!r} has lasted {seconds:,.1f} s'
    + (f' in {who}' if who else '')
    + f'; seconds before by kind: {spent or "none"}\n{_stacks()}'
  )


def _stacks():
  """The stacks of all other threads, those that are alike together."""
  names = {t.ident: t.name for t in threading.enumerate()}
  alike = collections.defaultdict(list)
  for ident, frame in sys._current_frames().items():
    if ident != threading.get_ident():
      stack = ''.join(traceback.format_stack(frame))
      alike[stack].append(names.get(ident, str(ident)))
  return '\n'.join(
    f'thread {", ".join(sorted(threads))}:\n{stack}'
    for stack, threads in alike.items()
  )
