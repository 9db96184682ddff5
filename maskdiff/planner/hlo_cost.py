"""Estimates the time of a compiled TPU program from its HLO text.

The estimate has four parts; the compiler prices only the first:

- *Cycles*: the compiler's `estimated_cycles` of each scheduled instruction,
  times the trip counts of the enclosing loops, over the clock rate. They are
  optimistic: large matrix products reach 96% to 98% of the peak.
- *Rows*: gathers and scatters are priced by their rows (hlo_rows.py). Other
  large operations without an estimate are listed as not priced.
- *Kernels*: attention kernels are priced by their matrix products
  (hlo_kernels.py). All other kernels are listed as not priced.
- *Transfers*: collectives (hlo_collectives.py), copies to and from the host,
  and prefetches into VMEM queue on their links in the order of the schedule.
  The exposed time is the time that the program waits for them: the whole time
  of a synchronous transfer, and the remaining time of an asynchronous transfer
  when its result is read.

If the trip count of a loop depends on data, the caller supplies an expected
count. Without it the loop counts once and is listed as unresolved.

These forms of asynchronous transfers are recognized: x-start/x-done; custom
fusions named async-collective-start.N and -done.N, whose collective runs inside
the fusions between them; calls on another thread (async-start); and send/recv
between slices. Collectives of one network are priced one after the other, which
is pessimistic if they use different links.
"""

import collections
import collections.abc
import dataclasses
import re

from maskdiff.model import masks
from maskdiff.planner import (
  hlo,
  hlo_collectives,
  hlo_kernels,
  hlo_loops,
  hlo_rows,
)
from maskdiff.planner.hlo_clock import Clock

# Smaller arrays in the type of an asynchronous copy are indices and semaphores.
SMALL_BYTES = 1024
# Instructions without a price and with a larger result than this are listed.
LARGE_BYTES = 2**20
COMPUTES = ('fusion', 'sort', 'dot', 'convolution')
# These instructions run no TensorCore code, so their estimates are ignored.
NOT_RUN = ('parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast')


@dataclasses.dataclass
class Operation:
  """Total time of all instructions with the same op_name."""

  op_name: str  # or the instruction's name without its number
  seconds: float = 0.0
  count: float = 0.0


@dataclasses.dataclass
class Traffic:
  """Totals of all collectives of one kind along the same mesh axes."""

  kind: str
  axes: str
  network: str
  dtype: str
  count: float = 0.0
  sync_count: float = 0.0
  nbytes: float = 0.0  # received per device
  seconds: float = 0.0


@dataclasses.dataclass
class Cost:
  """Estimated time of one run of a program on one device."""

  cycles: float = 0.0
  cycles_s: float = 0.0
  rows_s: float = 0.0  # gathers and scatters
  kernel_s: float = 0.0
  kernel_flops: float = 0.0
  kernel_mxu_s: float = 0.0  # second price; not part of total_s
  total_s: float = 0.0
  # Queue (ici, dcn, host_in, host_out, prefetch) -> seconds: of waiting for
  # transfers, and of all transfers.
  exposed_s: dict = dataclasses.field(default_factory=collections.Counter)
  busy_s: dict = dataclasses.field(default_factory=collections.Counter)
  host_bytes: float = 0.0
  operations: dict = dataclasses.field(default_factory=dict)
  # Instruction -> seconds that it computes or waits; they add up to total_s.
  instructions: dict = dataclasses.field(default_factory=collections.Counter)
  traffic: dict = dataclasses.field(default_factory=dict)
  loops: list = dataclasses.field(default_factory=list)  # (op_name, trips, how)
  # Op names of loops that are counted once because their trip count is unknown.
  unresolved: list = dataclasses.field(default_factory=list)
  # Instructions without a price -> how often they run.
  unpriced: dict = dataclasses.field(default_factory=collections.Counter)


def price(
  module,
  machine,
  expected_trips=None,
  regime=masks.BIDIRECTIONAL,
  branch_shares=None,
):
  """Estimates the time of one run of a program on one device.

  Args:
    module: hlo.Module.
    machine: hlo_collectives.Machine.
    expected_trips: (op_name) -> the expected trip count of a loop whose trip
      count depends on data, or None.
    regime: masks.Regime of the rows, which determines the tiles that attention
      kernels skip.
    branch_shares: (op_name) -> how often each branch of a conditional runs,
      shares that add up to 1, for False before True; or None: equally often.

  Returns:
    Cost.
  """
  expected_trips = expected_trips or (lambda op_name: None)
  branch_shares = branch_shares or (lambda op_name: None)
  p = _Pricing(module, machine, expected_trips, regime, branch_shares, Cost())
  p.cost.total_s = _run(p, module.entry, 1.0)
  p.cost.cycles_s = p.cost.cycles / machine.chip.clock_hz
  return p.cost


@dataclasses.dataclass(frozen=True)
class _Pricing:
  module: hlo.Module
  machine: hlo_collectives.Machine
  expected_trips: collections.abc.Callable
  regime: masks.Regime
  branch_shares: collections.abc.Callable
  cost: Cost


def _run(p, computation, weight):
  """Returns the seconds of one run of a computation.

  `weight` is the number of times that the program runs the computation.
  """
  clock = Clock()
  for i in p.module.computations[computation].values():
    if i.op == 'while':
      trips = _trips(p, computation, i)
      clock.now += trips * _run(p, i.attribute('body'), weight * trips)
    elif i.op == 'call':
      clock.now += _run(p, i.attribute('to_apply'), weight)
    elif i.op == 'conditional':
      branches = hlo.branches(p.module, i)
      equal = [1 / len(branches)] * len(branches)
      shares = p.branch_shares(i.op_name) or equal
      for branch, share in zip(branches, shares, strict=True):
        clock.now += share * _run(p, branch, weight * share)
    elif i.op == 'custom-call' and 'tpu_custom_call' in i.attributes:
      _kernel(p, clock, i, weight)
    elif not _communicates(p, clock, i, weight):
      if i.cycles:
        _compute(p, clock, i, weight)
      elif not _moves_rows(p, clock, computation, i, weight):
        if i.op in COMPUTES and hlo.nbytes(i.type) > LARGE_BYTES:
          _note_unpriced(p, i, weight)
  return clock.now


def _trips(p, computation, loop):
  count, how = hlo_loops.trips(p.module, computation, loop, p.expected_trips)
  if how == 'unresolved':
    p.cost.unresolved.append(loop.op_name or loop.name)
  p.cost.loops.append((loop.op_name or loop.name, count, how))
  return count


def _compute(p, clock, i, weight):
  """Prices an instruction by the compiler's estimate."""
  if not i.cycles or i.op in NOT_RUN:
    return
  seconds = i.cycles / p.machine.chip.clock_hz
  clock.now += seconds
  p.cost.cycles += i.cycles * weight
  _note_operation(p, i, seconds, weight)


def _moves_rows(p, clock, computation, i, weight):
  """Prices gathers and scatters; returns False for other instructions."""
  rows = hlo_rows.of(p.module, computation, i)
  if not rows.count:
    return False
  seconds = hlo_rows.seconds(p.machine.chip, rows)
  clock.now += seconds
  p.cost.rows_s += seconds * weight
  _note_operation(p, i, seconds, weight)
  return True


def _note_operation(p, i, seconds, weight):
  source = hlo.describing(p.module, i)
  name = source.op_name or _stem(i.name)
  operation = p.cost.operations.setdefault(name, Operation(name))
  operation.seconds += seconds * weight
  operation.count += weight
  p.cost.instructions[i.name] += seconds * weight


def _note_unpriced(p, i, weight):
  p.cost.unpriced[_stem(i.name)] += weight


def _stem(name):
  """Returns the name of an instruction without its numbers."""
  return re.sub(r'(\.(\d+|clone))+$', '', name)


def _kernel(p, clock, i, weight):
  """Prices a Pallas kernel if it is an attention kernel."""
  if i.cycles:
    _compute(p, clock, i, weight)
    return
  flops = hlo_kernels.attention_flops(
    p.module, i, p.regime, p.machine.chip.name
  )
  if flops is None:
    _note_unpriced(p, i, weight)
    return
  seconds = hlo_kernels.seconds(p.machine.chip, flops)
  clock.now += seconds
  p.cost.kernel_s += seconds * weight
  p.cost.kernel_flops += flops * weight
  mxu_s = hlo_kernels.mxu_seconds(p.machine.chip, i, flops)
  p.cost.kernel_mxu_s += mxu_s * weight
  _note_operation(p, i, seconds, weight)


def _communicates(p, clock, i, weight):
  """Prices an instruction that moves data; returns False if it does not."""
  fused = i.op == 'fusion' and re.match(
    r'async-collective-(start|done)(.*)', i.name
  )
  if fused:
    _fused_collective(p, clock, i, weight, *fused.groups())
  elif 'xla_megascale' in i.attributes and i.op in ('send', 'recv'):
    _between_slices(p, clock, i, weight)
  elif i.op in ('send', 'recv', 'send-done'):
    pass  # host callbacks, and sends that no instruction waits for
  elif i.op.endswith('-done'):
    _wait(p, clock, i.name, i.operands[0], weight)
  elif i.op.endswith('-update'):
    clock.ends[i.name] = clock.ends.get(i.operands[0], ('', clock.now))
  elif hlo_collectives.base_kind(i.op):
    transfer = hlo_collectives.transfer(p.module, p.machine, i)
    _move(p, clock, i.name, [transfer], weight, not i.op.endswith('-start'))
  elif i.op.endswith('-start'):
    _start(p, clock, i, weight)
  elif i.op == 'fusion':
    return _synchronous_fusion(p, clock, i, weight)
  else:
    return False
  return True


def _move(p, clock, name, transfers, weight, sync):
  """Queues collectives on their networks and waits for synchronous ones."""
  for t in transfers:
    key = t.kind, t.axes, t.network, t.dtype
    row = p.cost.traffic.setdefault(key, Traffic(*key))
    row.count += weight
    row.sync_count += weight if sync else 0
    row.nbytes += t.nbytes * weight
    row.seconds += t.seconds * weight
    p.cost.busy_s[t.network] += t.seconds * weight
    clock.begin(name, t.network, t.seconds)
    if sync:
      _wait(p, clock, name, name, weight)


def _wait(p, clock, waiting, name, weight):
  """Lets the instruction `waiting` wait for a transfer."""
  queue, waited = clock.wait(name)
  if waited:
    p.cost.exposed_s[queue] += waited * weight
    p.cost.instructions[waiting] += waited * weight


def _fused_collective(p, clock, i, weight, end, number):
  """Prices a collective that runs in the fusions between start and done."""
  if end == 'start':
    transfers = [
      hlo_collectives.transfer(p.module, p.machine, c)
      for c in hlo_collectives.inside(p.module, i.attribute('calls'))
    ]
    _move(p, clock, f'fused{number}', transfers, weight, sync=False)
  else:
    _wait(p, clock, i.name, f'fused{number}', weight)
  _compute(p, clock, i, weight)


def _synchronous_fusion(p, clock, i, weight):
  """Prices a fusion around a synchronous collective; else returns False.

  Fusions that continue an asynchronous collective have `async` in their names.
  They are ordinary compute here: the collective was priced at its start.
  """
  called = i.attribute('calls') or ''
  if 'async' in called.replace('-', '_') or 'async-' in i.name:
    return False
  collectives = hlo_collectives.inside(p.module, called)
  if not collectives:
    return False
  scattered = hlo_collectives.is_reduce_scatter(p.module, i)
  transfers = [
    hlo_collectives.transfer(
      p.module, p.machine, c, scattered and c.op == 'all-reduce'
    )
    for c in collectives
  ]
  _move(p, clock, i.name, transfers, weight, sync=True)
  _compute(p, clock, i, weight)
  return True


def _between_slices(p, clock, i, weight):
  """Prices a collective between slices, from the send to the recv-done."""
  label = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', i.attributes)
  label = 'dcn ' + (label[1] if label else i.name)
  if i.op == 'send':
    transfer = hlo_collectives.between_slices(p.machine, i)
    _move(p, clock, label, [transfer], weight, sync=False)
  if label in clock.ends:
    clock.ends[i.name] = clock.ends[label]


def _start(p, clock, i, weight):
  """Prices the start of an asynchronous copy or a call on another thread."""
  called = i.attribute('calls') or i.attribute('to_apply')
  collectives = hlo_collectives.inside(p.module, called) if called else []
  if collectives:
    transfers = [
      hlo_collectives.transfer(p.module, p.machine, c) for c in collectives
    ]
    _move(p, clock, i.name, transfers, weight, sync=False)
    return
  # The type lists the source and the copy. The smaller one is what moves: the
  # source may be a whole buffer of which one slice is copied.
  sizes = [a.nbytes for a in hlo.arrays(i.type) if a.nbytes >= SMALL_BYTES]
  size = min(sizes, default=0)
  chip = p.machine.chip
  if 'S(5)' in i.type:
    queue, bandwidth = _direction(i), chip.host_bandwidth
    p.cost.host_bytes += size * weight
  else:
    queue, bandwidth = 'prefetch', chip.hbm_bandwidth
  p.cost.busy_s[queue] += size / bandwidth * weight
  clock.begin(i.name, queue, size / bandwidth)


def _direction(i):
  """Returns the queue of a host copy; the two directions overlap."""
  parts = hlo.elements(i.type)
  # copy-start returns (destination, source, context), others (operands,
  # destination, context).
  destination = parts[0 if i.op == 'copy-start' else 1]
  return 'host_out' if 'S(5)' in destination else 'host_in'
