"""Compares the estimated and the measured time of each part of a train step.

The measured times come from a trace (measured.py). The estimate prices the very
program that ran: on a TPU as a plan does (hlo_cost.py), on a GPU as a roofline
(roofline.py), and on other devices not at all. Both have a time for each
instruction, and `row` assigns instructions to the rows of the table. If a trip
count depends on data, the estimate takes the measured one.
"""

import dataclasses
import re
import statistics

from maskdiff.distributed import chips
from maskdiff.model import masks
from maskdiff.planner import (
  hlo,
  hlo_collectives,
  hlo_cost,
  roofline,
)
from maskdiff.planner import measured as measured_lib
from maskdiff.planner.parts import model_part

ENCLOSING = ('while', 'conditional', 'call')
COLLECTIVES = 'collectives'
HOST_COPIES = 'copies to and from the host'
PREFETCHES = 'prefetches'
IDLE = 'no instruction runs'
OVERLAP = 'instructions that overlap'


@dataclasses.dataclass(frozen=True)
class Facts:
  """What the trace and the HLO text of a train step do not say.

  Attributes:
    device_kind: jax.Device.device_kind.
    axes: dict from mesh axis to its size.
    coords: coordinates of each device in the torus of its slice, in mesh order;
      [] if the devices have none.
    slices: slice number of each device.
    steps: number of steps in the trace.
    first_step: number of the first of them, from 1.
    regime: masks.Regime of the rows.
    flops: model FLOPs of a step on all devices, with the logits of every token;
      None if the stage has no count.
    share_done: share of `flops` that the step computes; None if unknown.
    warnings: lines for the table.
  """

  device_kind: str
  axes: dict
  coords: list
  slices: list
  steps: int
  first_step: int
  regime: masks.Regime = masks.BIDIRECTIONAL
  flops: float | None = None
  share_done: float | None = None
  warnings: tuple = ()

  def to_json(self):
    """Returns a dict of JSON values."""
    regime = {
      'make': self.regime.make.__name__,
      'sizes': list(self.regime.sizes),
    }
    changes = {'regime': regime, 'warnings': list(self.warnings)}
    return dataclasses.asdict(self) | changes


def from_json(values):
  """Returns the Facts of `Facts.to_json`."""
  regime = values['regime']
  return Facts(
    **values
    | {
      'regime': masks.Regime(
        getattr(masks, regime['make']), tuple(regime['sizes'])
      )
    }
  )


def compare(text, profile, facts):
  """Returns estimated and measured times as a dict of JSON values.

  Args:
    text: HLO text of the train step.
    profile: jax.profiler.ProfileData with facts.steps steps.
    facts: Facts.

  Returns:
    Dict with `facts`; `rows`, a list of dicts with part, estimated_s and
    measured_s per step; `step_s`, `estimated_s`, `period_s`, `devices`, the
    utilizations `mfu` and `mfu_estimated`, `programs` (seconds per step of
    other programs) and `warnings`. An estimate is None without one.

  Raises:
    UserError: the trace has no instructions of the program.
  """
  module = hlo.parse(text)
  instructions = {
    i.name: (computation, i)
    for computation, body in module.computations.items()
    for i in body.values()
  }
  enclosing = [n for n, (_, i) in instructions.items() if i.op in ENCLOSING]
  measured = measured_lib.measure(profile, module.name, facts.steps, enclosing)
  estimated, notes = estimate(module, facts, measured)
  rows = {}
  for column, seconds in enumerate((estimated or {}, measured.instructions)):
    for name, value in seconds.items():
      part = row(module, instructions, name)
      rows.setdefault(part, [0.0, 0.0])[column] += value
  overlap = measured.busy_s - sum(measured.instructions.values())
  if overlap < -1e-3 * measured.step_s:
    rows[OVERLAP] = [0.0, overlap]
  rows[IDLE] = [0.0, measured.step_s - measured.busy_s]
  total = None if estimated is None else sum(estimated.values())
  peak = chips.PEAK_FLOPS.get(facts.device_kind)
  used = lambda seconds: (
    facts.flops / (seconds * peak * len(facts.slices))
    if facts.flops and peak and seconds
    else None
  )
  return {
    'facts': facts.to_json(),
    'rows': [
      {
        'part': part,
        'estimated_s': None if estimated is None else e,
        'measured_s': m,
      }
      for part, (e, m) in sorted(rows.items(), key=lambda r: -r[1][1])
    ],
    'step_s': measured.step_s,
    'estimated_s': total,
    'period_s': measured.period_s,
    'devices': measured.devices,
    'mfu': used(measured.step_s),
    'mfu_estimated': used(total),
    'programs': measured.programs,
    'warnings': [*facts.warnings, *measured.warnings, *notes],
  }


def estimate(module, facts, measured):
  """Returns {instruction: seconds per step} or None, and lines about it.

  Args:
    module: hlo.Module.
    facts: Facts.
    measured: measured.Measured, for trip counts that depend on data.
  """
  kind = facts.device_kind
  found = trips(module, measured.counts)
  if chip := chips.by_kind(kind):
    cost = hlo_cost.price(module, machine(chip, facts), found.get, facts.regime)
    return cost.instructions, _notes(cost)
  if kind in chips.GPU_BANDWIDTH:
    gpu = roofline.Gpu(chips.PEAK_FLOPS[kind], chips.GPU_BANDWIDTH[kind])
    guess = roofline.estimate(module, gpu, found.get)
    return guess.instructions, [
      'the estimate of a GPU is a lower bound: products at the peak, bytes at '
      'the bandwidth of its memory, collectives without a price',
      *_notes(guess),
    ]
  if kind == 'cpu':
    return None, []
  return None, [
    f'no estimate: the peak of {kind!r} is not in maskdiff/distributed/chips.py'
  ]


def _notes(estimate):
  return [
    f'the trip count of the loop {name} is unknown; it is counted once'
    for name in estimate.unresolved
  ]


def machine(chip, facts):
  """Returns the hlo_collectives.Machine of the devices of a run."""
  axes = zip(*facts.coords, strict=True)
  first, last = zip(*((min(a), max(a)) for a in axes), strict=True)
  size = chip.torus_axes
  return hlo_collectives.Machine(
    chip=chip,
    shape=tuple(b - a + 1 for a, b in zip(first, last, strict=True))[:size],
    axes=facts.axes,
    coords=tuple(
      tuple(c - a for c, a in zip(coords, first, strict=True))[:size]
      for coords in facts.coords
    ),
    slices=tuple(facts.slices),
  )


def trips(module, counts):
  """Returns the measured trip counts of loops, by the op_name of the loop.

  A computation runs as often as most of its instructions.

  Args:
    module: hlo.Module.
    counts: number of events of each instruction per step.
  """
  runs = {module.entry: 1.0}
  for name, body in module.computations.items():
    found = [round(counts[i], 3) for i in body if i in counts]
    if found and name != module.entry:
      runs[name] = statistics.mode(found)
  return {
    loop.op_name: runs[body] / runs[outside]
    for body, (outside, loop) in module.loops.items()
    if body == loop.attribute('body') and body in runs and outside in runs
  }


def row(module, instructions, name):
  """Returns the row of the table that an instruction belongs to.

  Args:
    module: hlo.Module.
    instructions: dict from names to (computation, hlo.Instruction).
    name: of an instruction; it may be unknown.
  """
  if name not in instructions:
    stem = re.sub(r'[.\d]+$', '', name)
    return COLLECTIVES if _is_collective(stem) else f'not in the text: {stem}'
  computation, i = instructions[name]
  start = _start(module.computations[computation], i)
  called = start.attribute('calls') or start.attribute('to_apply') or ''
  asynchronous = start.op.endswith('-start')
  if (
    _is_collective(start.op)
    or start.op in ('send', 'recv')
    or i.name.startswith('async-collective-')
    or (asynchronous or start.op == 'fusion' and 'async' not in called + name)
    and hlo_collectives.inside(module, called)
  ):
    return COLLECTIVES
  if asynchronous:
    return HOST_COPIES if 'S(5)' in start.type else PREFETCHES
  described = hlo.describing(module, i)
  return model_part(described.op_name or re.sub(r'(\.\d+)+$', '', name))


def _is_collective(op):
  return hlo_collectives.base_kind(op) is not None


def _start(body, i):
  """Returns the instruction that starts the transfer that `i` waits for."""
  while i.op.endswith(('-done', '-update')) and i.operands[0] in body:
    i = body[i.operands[0]]
  return i
