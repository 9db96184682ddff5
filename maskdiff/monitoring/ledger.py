"""Where the time of a run goes, over all its restarts.

`ledger.jsonl` in the work directory gets a line whenever something is worth
one: `time` (s since 1970), `seconds` by kind since the line before, and either
the step that was reached or an event. A process that is killed leaves its
lines; `goodput` adds up those of all processes of the run.
"""

import contextlib
import json
import os
import time

from maskdiff.errors import UserError

KINDS = ('init', 'restore', 'compile', 'data', 'step', 'eval', 'save', 'other')


class Ledger:
  """Counts every second of this process once, under what it was doing."""

  def __init__(self, path, active):
    """Opens the file; one that is not `active` counts, but writes nothing."""
    self._totals = dict.fromkeys(KINDS, 0.0)
    self._written = dict(self._totals)
    self._now = ('other', time.monotonic())
    self._counted = self._now[1]
    self._file = None
    if active:
      unfinished = _ends_in_half_a_line(path)
      self._file = open(path, 'a')
      if unfinished:
        self._file.write('\n')
      self.event('opened')

  @contextlib.contextmanager
  def span(self, kind):
    """Counts the time inside as `kind`, one of KINDS.

    A span inside another one suspends it; outside all is `other`.
    """
    outer = self._now[0]
    self._begin(kind)
    try:
      yield
    finally:
      self._begin(outer)

  def beat(self):
    """Says that a long span gets on, so that it is not taken for a stall."""
    self._now = (self._now[0], time.monotonic())

  def write(self, step):
    """Appends a line that says that `step` steps are done."""
    self._append({'step': step})

  def event(self, name, **values):
    """Appends a line about something that happened.

    `started` with the step that the process goes on from, and `ended` when the
    run is over, are what `goodput` reads; others are for people.
    """
    self._append({'event': name, **values})

  def current(self):
    """The kind of time now, and the s since it began. For any thread."""
    kind, began = self._now
    return kind, time.monotonic() - began

  def totals(self):
    """Seconds of this process by kind, but for the span that goes on."""
    return dict(self._totals)

  def close(self):
    if self._file:
      self._append({'event': 'closed'})
      with contextlib.suppress(OSError):
        self._file.close()
      self._file = None

  def _begin(self, kind):
    if kind not in self._totals:
      raise ValueError(f'{kind!r} is none of {KINDS}')
    self._now = (kind, self._count())

  def _count(self):
    """Puts down the time until now; returns now."""
    now = time.monotonic()
    self._totals[self._now[0]] += now - self._counted
    self._counted = now
    return now

  def _append(self, values):
    self._count()
    if not self._file:
      return
    seconds = {
      kind: round(total - self._written[kind], 6)
      for kind, total in self._totals.items()
      if total > self._written[kind]
    }
    self._written = dict(self._totals)
    line = {'time': round(time.time(), 3), **values, 'seconds': seconds}
    # A full disk must not end a run for want of its diary; what could not be
    # written now goes with a later line.
    with contextlib.suppress(OSError):
      self._file.write(json.dumps(line) + '\n')
      self._file.flush()


def _ends_in_half_a_line(path):
  if not os.path.exists(path) or not os.path.getsize(path):
    return False
  with open(path, 'rb') as f:
    f.seek(-1, os.SEEK_END)
    return f.read(1) != b'\n'


def read(path):
  """The lines of a ledger; those that a kill cut short are passed over.

  Raises:
    UserError: there is no ledger.
  """
  lines = []
  try:
    with open(path, errors='replace') as f:
      for text in f:
        with contextlib.suppress(json.JSONDecodeError):
          lines.append(json.loads(text))
  except OSError as error:
    raise UserError(
      f'cannot read {path} ({error.strerror}): give the work directory of a run'
    ) from error
  return [x for x in lines if isinstance(x, dict) and 'seconds' in x]


def goodput(path):
  """Adds up a ledger over all processes that wrote it.

  A step counts if its result was used: those that were done again, because a
  later process started from an earlier step, do not. Time without a process
  is `down`, but for that after a run had come to its end.

  Returns:
    A dict: `wall_s`; `seconds`, by kind, where `step` holds the steps that
    count, `repeated` the others, and `down` is what it says, so that they add
    up to wall_s; `lost_s`, repeated and down; `restarts`; `steps`, the last
    one done; and `goodput`, step / wall_s, None without any time.

  Raises:
    UserError: there is no ledger, or no whole line in it.
  """
  lines = read(path)
  if not lines:
    raise UserError(f'{path} holds no whole line; nothing has been run yet')
  runs = _runs(lines)
  seconds = dict.fromkeys((*KINDS, 'repeated', 'down'), 0.0)
  for line in lines:
    for kind, spent in line['seconds'].items():
      seconds[kind] += spent
  for before, after in zip(runs, runs[1:], strict=False):
    if not any(line.get('event') == 'ended' for line in before):
      # The clocks of two machines may differ.
      seconds['down'] += max(0.0, after[0]['time'] - before[-1]['time'])
  kept = float('inf')  # steps after this one were, or will be, done again
  for run in reversed(runs):
    repeated = _step_seconds_after(run, kept)
    seconds['step'] -= repeated
    seconds['repeated'] += repeated
    kept = min([kept, *_starts(run)])
  wall = sum(seconds.values())
  return {
    'wall_s': wall,
    'seconds': seconds,
    'lost_s': seconds['repeated'] + seconds['down'],
    'restarts': len(runs) - 1,
    'steps': next((r[-1][0] for r in map(_reached, runs[::-1]) if r), 0),
    'goodput': seconds['step'] / wall if wall else None,
  }


def _runs(lines):
  """The lines of each process."""
  runs = []
  for line in lines:
    if not runs or line.get('event') == 'opened':
      runs.append([])
    runs[-1].append(line)
  return runs


def _starts(run):
  return [line['step'] for line in run if line.get('event') == 'started']


def _reached(run):
  """Pairs of a step and the seconds of steps until it was done."""
  pairs, spent = [], 0.0
  for line in run:
    spent += line['seconds'].get('step', 0.0)
    if 'step' in line and line.get('event') in (None, 'started'):
      pairs.append((line['step'], spent))
  return pairs


def _step_seconds_after(run, step):
  """Seconds that a process spent on steps after `step`."""
  total = sum(line['seconds'].get('step', 0.0) for line in run)
  pairs = _reached(run)
  if not pairs or step > pairs[-1][0]:
    return 0.0
  if step < pairs[0][0]:
    return total
  if step == pairs[-1][0]:
    return total - pairs[-1][1]
  later = next(i for i, (reached, _) in enumerate(pairs) if reached > step)
  (s0, t0), (s1, t1) = pairs[later - 1], pairs[later]
  return total - (t0 + (t1 - t0) * (step - s0) / (s1 - s0))


def format_goodput(result):
  """A small table of what `goodput` returns."""
  wall = result['wall_s']
  rows = sorted(result['seconds'].items(), key=lambda row: -row[1])
  lines = [
    f'{kind:<9}{spent:>12,.1f} s{spent / wall if wall else 0:>8.1%}'
    for kind, spent in rows
    if spent
  ]
  lines.append(f'{"wall":<9}{wall:>12,.1f} s')
  share, restarts = result['goodput'], result['restarts']
  lines.append(
    f'{result["steps"]:,} steps, {restarts:,} restart'
    + ('' if restarts == 1 else 's')
    + ', goodput '
    + ('unknown' if share is None else f'{share:.1%}')
  )
  return '\n'.join(lines)
