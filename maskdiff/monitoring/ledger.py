"""Records where the wall time of a run goes, over all its restarts.

Each line of `ledger.jsonl` in the work directory holds `time` (s since 1970),
`seconds` by kind since the previous line, and either the step reached or an
event. Lines are written one by one, so a killed process leaves its lines
behind. An error of the disk never ends the run; see files/appending.py.
`goodput` sums the lines of all processes of the run.
"""

import contextlib
import dataclasses
import time

from maskdiff.errors import UserError
from maskdiff.files import appending, json_text
from maskdiff.monitoring import json_lines, terminal

MAX_SECONDS = 4_102_444_800  # since 1970: the year 2100


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of time in the ledger.

  Attributes:
    meaning: what happens in this time, for readers of the documentation.
    useful: whether the time is goodput, unless a restart repeats the work.
  """

  meaning: str
  useful: bool = False


KINDS = {
  'init': Kind('start: devices, tokenizer and data'),
  'restore': Kind('restoring a checkpoint, or making random parameters'),
  'compile': Kind('compilation of the train step'),
  'data': Kind('waiting for a batch'),
  'rollout': Kind('sampling of answers to train on', useful=True),
  'step': Kind('train steps', useful=True),
  'eval': Kind('evaluation'),
  'save': Kind('saving, as far as it blocks the loop'),
  'other': Kind('the rest'),
}
# Kinds that `goodput` adds.
LOST = {
  'repeated': Kind('useful work done again after a restart'),
  'down': Kind(
    'time without a process: from the last ledger line of a process to the '
    'first line of the next'
  ),
}


class Ledger:
  """Counts each second of this process once, under one of KINDS."""

  def __init__(self, path, active):
    """Opens the file for appending; writes nothing unless `active`."""
    self._totals = dict.fromkeys(KINDS, 0.0)
    self._written = dict(self._totals)
    self._span = ('other', time.monotonic())
    self._counted = self._span[1]
    self._file = None
    if active:
      self._file = appending.lines(path, terminal.warn)
      self.event('opened')

  @contextlib.contextmanager
  def span(self, kind):
    """Context manager that counts the time inside it as `kind`.

    A span inside another span suspends the outer one. Time outside all spans
    is `other`.

    Args:
      kind: one of KINDS.

    Raises:
      ValueError: the kind is unknown.
    """
    outer = self._span[0]
    self._begin(kind)
    try:
      yield
    finally:
      self._begin(outer)

  def beat(self):
    """Resets the timer of stalls, by restarting the current span."""
    self._span = (self._span[0], time.monotonic())

  def write(self, step):
    """Appends a line: `step` steps are done."""
    self._append({'step': step})

  def event(self, name, **values):
    """Appends a line about an event.

    `goodput` reads three events: `opened`, the first line of a process;
    `started`, with the step from which the process resumes; and `ended`,
    written when the run is complete. It ignores all other events.
    """
    self._append({'event': name, **values})

  def current(self):
    """Returns kind and seconds so far of the current span; thread-safe."""
    kind, began = self._span
    return kind, time.monotonic() - began

  def totals(self):
    """Returns the seconds of this process by kind, without the current span."""
    return dict(self._totals)

  def close(self):
    if self._file:
      self._append({'event': 'closed'})
      self._file.close()
      self._file = None

  def _begin(self, kind):
    if kind not in self._totals:
      raise ValueError(f'unknown kind {kind!r}; choose one of {[*KINDS]}')
    self._span = (kind, self._count())

  def _count(self):
    """Adds the time since the last call to the current kind; returns now."""
    now = time.monotonic()
    self._totals[self._span[0]] += now - self._counted
    self._counted = now
    return now

  def _append(self, values):
    self._count()
    if not self._file:
      return
    if self._file.nearly_full and 'event' not in values:
      return  # no time is lost: the next line has the seconds of this one
    seconds = {
      kind: round(total - self._written[kind], 6)
      for kind, total in self._totals.items()
      if total > self._written[kind]
    }
    self._written = dict(self._totals)
    line = {'time': round(time.time(), 3), **values, 'seconds': seconds}
    self._file.append(json_text.dumps(line).encode() + b'\n')


def read(path):
  """Returns the valid lines of a ledger.

  Raises:
    UserError: the file cannot be read.
  """
  return read_lines(path).values


def read_lines(path):
  """Reads the lines of a ledger; returns json_lines.Lines.

  Raises:
    UserError: the file cannot be read.
  """
  try:
    return json_lines.read(path, is_line)
  except UserError as error:
    raise UserError(f'{error}: give the work directory of a run') from error


def is_line(value):
  """Returns whether a JSON value is a line as `Ledger` writes it."""
  if not isinstance(value, dict):
    return False
  seconds, event = value.get('seconds'), value.get('event')
  return (
    _is_time(value.get('time'))
    and isinstance(seconds, dict)
    and seconds.keys() <= KINDS.keys()
    and all(map(_is_time, seconds.values()))
    and (event is None or isinstance(event, str))
    and (
      json_lines.is_count(value['step'])
      if 'step' in value
      else event is not None and event != 'started'
    )
  )


def _is_time(value):
  """Returns whether a JSON value is a number of seconds."""
  number = json_lines.finite(value)
  return number is not None and 0 <= number <= MAX_SECONDS


def goodput(path):
  """Computes the goodput of a run from its ledger, over all its processes.

  Time of a useful kind counts if its result was used. It does not count if a
  later process started from an earlier step and repeated the work. Time without
  a process is `down`, except time after the end of a run.

  A process that ended before it had a state to train, for example because of a
  wrong flag, is a failed start and not a restart. Its time counts, unless the
  run had not begun, or had ended, at that time.

  Returns:
    Dict with
      wall_s: all seconds.
      seconds: seconds by kind, of KINDS and LOST; their sum is wall_s. Useful
        kinds have the seconds that count, `repeated` those that do not, and
        `down` the time without a process.
      lost_s: seconds of `repeated` and `down`.
      restarts: number of processes after the first, without failed starts.
      steps: last step done.
      goodput: seconds of useful kinds / wall_s; None if wall_s is 0.

  Raises:
    UserError: the ledger cannot be read or has no complete line.
  """
  lines = read(path)
  if not lines:
    raise UserError(f'{path} has no complete line: the run has not started yet')
  processes = _without_idle_starts(_split_by_process(lines))
  seconds = dict.fromkeys((*KINDS, *LOST), 0.0)
  useful = [name for name, kind in KINDS.items() if kind.useful]
  for line in (line for process in processes for line in process):
    for kind, spent in line['seconds'].items():
      seconds[kind] += spent
  for before, after in zip(processes, processes[1:], strict=False):
    if not any(line.get('event') == 'ended' for line in before):
      # The clocks of two machines may differ.
      seconds['down'] += max(0.0, after[0]['time'] - before[-1]['time'])
  last_used = float('inf')  # later steps are repeated by a later process
  for process in reversed(processes):
    for kind in useful:
      repeated = _seconds_after(process, last_used, kind)
      seconds[kind] -= repeated
      seconds['repeated'] += repeated
    last_used = min([last_used, *_starts(process)])
  wall = sum(seconds.values())
  reached = [pairs for p in processes if (pairs := _reached(p, 'step'))]
  return {
    'wall_s': wall,
    'seconds': seconds,
    'lost_s': seconds['repeated'] + seconds['down'],
    'restarts': max(0, sum(map(_has_started, processes)) - 1),
    'steps': reached[-1][-1][0] if reached else 0,
    'goodput': sum(seconds[kind] for kind in useful) / wall if wall else None,
  }


def _split_by_process(lines):
  """Splits the lines of a ledger into one list per process."""
  processes = []
  for line in lines:
    if not processes or line.get('event') == 'opened':
      processes.append([])
    processes[-1].append(line)
  return processes


def _has_started(lines):
  """Returns whether a process had a state to train."""
  return any(
    'step' in line and line.get('event') in (None, 'started') for line in lines
  )


def _without_idle_starts(processes):
  """Drops failed starts before the begin and after the end of a run."""
  kept, running = [], False
  for process in processes:
    if _has_started(process):
      running = not any(line.get('event') == 'ended' for line in process)
    elif not running:
      continue
    kept.append(process)
  return kept or processes


def _starts(lines):
  """Returns the steps from which a process started."""
  return [line['step'] for line in lines if line.get('event') == 'started']


def _reached(lines, kind):
  """Returns pairs of a step and the seconds of a kind until its end."""
  pairs, spent = [], 0.0
  for line in lines:
    spent += line['seconds'].get(kind, 0.0)
    if 'step' in line and line.get('event') in (None, 'started'):
      pairs.append((line['step'], spent))
  return pairs


def _seconds_after(lines, step, kind):
  """Returns the seconds of a kind that a process spent after `step`.

  Assumes that all steps between two lines of the ledger last equally long.
  """
  total = sum(line['seconds'].get(kind, 0.0) for line in lines)
  pairs = _reached(lines, kind)
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
  """Formats the result of `goodput` as a table."""
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
