"""Measures a program in a trace: its steps and their instructions."""

import bisect
import collections
import dataclasses
import itertools
import statistics
from typing import NamedTuple

from maskdiff.errors import UserError
from maskdiff.planner.trace import devices, self_times


@dataclasses.dataclass(frozen=True)
class Measured:
  """Times of a program, means over the devices and steps of a trace.

  Attributes:
    devices: number of devices.
    steps: number of steps of each device.
    step_s: seconds from the first to the last instruction of a step.
    period_s: seconds from the start of a step to that of the next; None for a
      single step.
    busy_s: seconds of a step in which an instruction ran.
    instructions: name -> seconds per step, without those of events inside.
    counts: name -> number of events per step.
    programs: name -> seconds per step of other programs.
    warnings: list of lines.
  """

  devices: int
  steps: int
  step_s: float
  period_s: float | None
  busy_s: float
  instructions: dict
  counts: dict
  programs: dict
  warnings: list


def measure(profile, module, steps, enclosing=()):
  """Returns the Measured times of a program in a trace.

  Args:
    profile: jax.profiler.ProfileData.
    module: name of the program, such as jit_train_step.
    steps: number of runs that each device has in the trace.
    enclosing: names of instructions whose time is that of the instructions
      that they call: loops, conditionals and calls.

  Raises:
    UserError: the trace has no events of the program.
  """
  enclosing, found = set(enclosing), []
  for name, lines in devices(profile).items():
    runs = _runs(lines, module, steps)
    if runs:
      found.append(_Device(name, runs, _others(lines, module)))
  if not found:
    raise UserError(
      f'the trace has no instructions of {module}: this device has no profiler '
      'that JAX can read'
    )
  warnings = [
    f'the trace of {d.name} has {len(d.runs)} of {steps} steps'
    for d in found
    if len(d.runs) != steps
  ]
  runs = [run for d in found for run in d.runs]
  instructions, counts, busy = collections.Counter(), collections.Counter(), 0.0
  for run in runs:
    for event, seconds in itertools.chain(*map(self_times, run.lines)):
      if event.name not in enclosing:
        instructions[event.name] += seconds / len(runs)
      counts[event.name] += 1 / len(runs)
    busy += run.busy(enclosing) / len(runs)
  programs = collections.Counter()
  for d in found:
    programs.update({k: s / len(runs) for k, s in d.others.items()})
  periods = [
    (b.start - a.start) * 1e-9
    for d in found
    for a, b in zip(d.runs, d.runs[1:], strict=False)
  ]
  return Measured(
    devices=len(found),
    steps=len(found[0].runs),
    step_s=statistics.fmean((r.end - r.start) * 1e-9 for r in runs),
    period_s=statistics.fmean(periods) if periods else None,
    busy_s=busy,
    instructions=dict(instructions),
    counts=dict(counts),
    programs=dict(programs),
    warnings=warnings,
  )


class _Device(NamedTuple):
  name: str
  runs: list  # of the program, in their order
  others: dict  # name of another program -> seconds


@dataclasses.dataclass
class _Run:
  """One run of a program on one device."""

  start: float
  end: float
  lines: list  # lists of events, sorted by their start

  def busy(self, enclosing):
    """Returns the seconds in which at least one instruction ran."""
    events = [e for line in self.lines for e in line if e.name not in enclosing]
    total, reached = 0.0, float('-inf')
    for e in sorted(events, key=lambda e: e.start):
      total += max(0.0, e.end - max(e.start, reached))
      reached = max(reached, e.end)
    return total * 1e-9


def _runs(lines, module, steps):
  """Returns the _Runs of a program on one device, in their order."""
  if lines.programs:
    return _runs_of_programs(lines, module)
  events = [[e for e in line if e.module == module] for line in lines.lines]
  every = sorted((e for line in events for e in line), key=lambda e: e.start)
  if not every:
    return []
  if any(e.run is None for e in every):
    bounds = _first_events(every, steps)
    find = lambda e: bisect.bisect_right(bounds, e.start) - 1
  else:
    find = lambda e: e.run
  runs = collections.defaultdict(lambda: [[] for _ in events])
  for i, line in enumerate(events):
    for event in sorted(line, key=lambda e: e.start):
      runs[find(event)][i].append(event)
  found = [
    _Run(
      min(line[0].start for line in of_run if line),
      max(e.end for line in of_run for e in line),
      of_run,
    )
    for of_run in runs.values()
  ]
  return sorted(found, key=lambda r: r.start)


def _runs_of_programs(lines, module):
  found = [
    _Run(p.start, p.end, [[]])
    for p in sorted(lines.programs, key=lambda p: p.start)
    if p.name == module
  ]
  starts = [r.start for r in found]
  for event in sorted(
    (e for line in lines.lines for e in line), key=lambda e: e.start
  ):
    i = bisect.bisect_right(starts, event.start) - 1
    if i >= 0 and event.start < found[i].end:
      found[i].lines[0].append(event)
  return found


def _first_events(events, steps):
  """Returns the start of the first event of each run of a program.

  Every run repeats the same instructions. One that runs once in each divides
  the events; those before it in the first run are before it in all.

  Args:
    events: all Events of the program on a device, sorted by their start.
    steps: number of runs.
  """
  counts = collections.Counter(e.name for e in events)
  first = next(
    (i for i, e in enumerate(events) if counts[e.name] == steps), None
  )
  if first is None:
    return [events[0].start]
  indices = [i for i, e in enumerate(events) if e.name == events[first].name]
  return [events[i - first].start for i in indices]


def _others(lines, module):
  """Returns the seconds of all other programs of a device, by their name."""
  found = collections.Counter()
  if lines.programs:
    for p in lines.programs:
      if p.name != module:
        found[p.name] += (p.end - p.start) * 1e-9
    return found
  for line in lines.lines:
    for event, seconds in self_times(line):
      if event.module != module:
        found[event.module or 'copies and other work'] += seconds
  return found
