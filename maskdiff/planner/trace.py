"""Reads a trace of jax.profiler: the time of each instruction of a program.

A trace has planes with lines of events. Where the instructions of a compiled
program are depends on the device (openxla/xla, tsl/profiler/utils/
xplane_schema.cc and xla/backends/profiler/gpu/cupti_collector.cc):

- TPU: plane /device:TPU:0 of each device has a line 'XLA Modules' with an event
  for each run of a program, such as jit_train_step(123), and a line 'XLA Ops'
  whose events are instructions. A loop encloses the events of its body. The
  name of an event may be the whole text of the instruction. The line
  'Async XLA Ops' repeats transfers that overlap with others; it is not read.
- GPU: plane /device:GPU:0 has a line for each stream, such as
  'Stream #7(Compute)'. Its events are kernels; the stats hlo_op and hlo_module
  name instruction and program. The kernels of a command buffer have no hlo_op
  of their own (openxla/xprof, issue 3070), so profiles run without them.
- CPU: plane /host:CPU has a line for each thread. Events of instructions have
  the same stats, the device_ordinal and the run_id of the program.
"""

import bisect
import collections
import dataclasses
import re
import statistics
from typing import NamedTuple

from maskdiff.errors import UserError

_DEVICE = re.compile(r'/device:(TPU|GPU):\d+')
HOST = '/host:CPU'
# Names of an event that is the text of an instruction, or a run of a program.
_INSTRUCTION = re.compile(r'%?([\w.\-]+)')


class Event(NamedTuple):
  """An instruction or a program that ran on a device; times in nanoseconds."""

  name: str
  module: str  # name of the program; '' if the line 'XLA Modules' says it
  run: int | None  # differs between runs of a program; None if unknown
  start: float
  end: float


class Lines(NamedTuple):
  """Events of one device."""

  programs: list  # runs of programs; [] if the trace has none
  lines: list  # lists of events, one per stream or thread


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


def devices(profile):
  """Returns the Lines of each device of a jax.profiler.ProfileData, by name."""
  found, host = {}, []
  for plane in profile.planes:
    if _DEVICE.fullmatch(plane.name):
      read = _tpu_lines if 'TPU' in plane.name else _gpu_lines
      found[plane.name] = read(plane)
    elif plane.name == HOST:
      host = list(plane.lines)
  found = {k: v for k, v in found.items() if any(v.lines)}
  return found or _cpu_lines(host)


def _tpu_lines(plane):
  programs, instructions = [], []
  for line in plane.lines:
    if line.name == 'XLA Modules':
      programs = [_event(e, e.name.split('(')[0]) for e in line.events]
    elif line.name == 'XLA Ops':
      instructions = [_event(e) for e in line.events]
  return Lines(programs, [instructions])


def _gpu_lines(plane):
  # Other lines are derived from those of the streams.
  streams = [x for x in plane.lines if x.name.startswith('Stream')]
  return Lines(
    [], [[_with_stats(e, dict(e.stats)) for e in x.events] for x in streams]
  )


def _cpu_lines(lines):
  found = collections.defaultdict(lambda: Lines([], []))
  for line in lines:
    events = collections.defaultdict(list)
    for event in line.events:
      stats = dict(event.stats)
      if 'hlo_op' in stats:
        device = f'/device:CPU:{stats.get("device_ordinal", 0)}'
        events[device].append(_with_stats(event, stats))
    for device, of_device in events.items():
      found[device].lines.append(of_device)
  return dict(found)


def _event(event, name=None):
  name = name or _INSTRUCTION.match(event.name)[1]
  return Event(
    name, '', None, event.start_ns, event.start_ns + event.duration_ns
  )


def _with_stats(event, stats):
  # Copies between host and device, for example, belong to no program.
  return Event(
    str(stats.get('hlo_op', event.name)),
    str(stats.get('hlo_module', '')),
    stats.get('run_id'),
    event.start_ns,
    event.start_ns + event.duration_ns,
  )


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
    f'{d.name} has {len(d.runs)} steps in the trace instead of {steps}'
    for d in found
    if len(d.runs) != steps
  ]
  runs = [run for d in found for run in d.runs]
  instructions, counts, busy = collections.Counter(), collections.Counter(), 0.0
  for run in runs:
    for event, seconds in run.self_times():
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

  def self_times(self):
    """Yields each event and its seconds without those of events inside."""
    for line in self.lines:
      yield from self_times(line)

  def busy(self, enclosing):
    """Returns the seconds in which at least one instruction ran."""
    events = [e for line in self.lines for e in line if e.name not in enclosing]
    total, reached = 0.0, float('-inf')
    for e in sorted(events, key=lambda e: e.start):
      total += max(0.0, e.end - max(e.start, reached))
      reached = max(reached, e.end)
    return total * 1e-9


def self_times(line):
  """Yields (event, seconds without those of events inside) of one line.

  Args:
    line: list of Events; each two are disjoint or one is inside the other.
  """
  open_events = []  # [event, nanoseconds], each inside the previous one
  for event in sorted(line, key=lambda e: (e.start, -e.end)):
    while open_events and open_events[-1][0].end <= event.start:
      done, left = open_events.pop()
      yield done, left * 1e-9
    if open_events:
      open_events[-1][1] -= min(event.end, open_events[-1][0].end) - event.start
    open_events.append([event, event.end - event.start])
  yield from ((event, left * 1e-9) for event, left in open_events)


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
