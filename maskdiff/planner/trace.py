"""Reads the events of a trace of jax.profiler.

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

import collections
import re
from typing import NamedTuple

_DEVICE = re.compile(r'/device:(TPU|GPU):\d+')
HOST = '/host:CPU'
# The name in an event that is an instruction, or its whole text.
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
  found = _INSTRUCTION.match(event.name)
  name = name or (found[1] if found else event.name)
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
