"""Prices the collectives of a compiled TPU program: bytes, mesh axes, seconds.

The compiler has no estimate for collectives. They are priced as rings over the
links of the torus that their groups span. The time is the number of bytes that
a device receives, divided by the bandwidth of those links, plus a latency: one
of the collective, and one per hop. A group is described by the mesh axes along
which its devices differ, so that a plan states the cost of each axis.

Some forms in the text of the TPU compiler are misleading:

- A reduce-scatter is often a custom fusion around an all-reduce and a
  dynamic-slice (`calls=%all-reduce-scatter`). Its emitter is that of true
  reduce-scatter instructions, SingleInputAllReduceScatterFusion, and it writes
  only the slice to memory. So it is priced as a reduce-scatter, which moves
  half of the bytes of an all-reduce. If a *separate* fusion slices the result,
  the all-reduce moves all bytes and is priced as an all-reduce.
- An all-gather may be an all-reduce of a buffer that is zero except for the
  device's own part. It is priced as an all-reduce.
- Between slices a collective is a pair of send and recv over the host network
  (`_xla_megascale_transfer_type`). The program addresses only the devices of
  one slice.
"""

import dataclasses
import math
import re

import numpy as np

from maskdiff.distributed.chips import Chip
from maskdiff.planner import hlo

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# Latency of a collective within a slice, besides that of its hops. Small
# messages between neighbouring chips take 4.5 to 5.5 us in lax.ppermute on v5p,
# and 5.6 to 5.9 us on v6e (measured in marin-community/marin, issue 6736).
ICI_START_S = 4e-6
# Latency of a hop between neighbouring chips ("How to Scale Your Model", TPUs).
ICI_HOP_S = 1e-6
# Assumed latency of a transfer between slices.
DCN_LATENCY_S = 50e-6


@dataclasses.dataclass(frozen=True)
class Machine:
  """The TPU of a plan: a chip, a torus and the devices in mesh order.

  The devices of a chip have the same coordinates.
  """

  chip: Chip
  shape: tuple  # chips along each axis of the torus of a slice
  axes: dict  # mesh axis -> size, outermost first
  coords: tuple  # coordinates of each device in the torus of its slice
  slices: tuple  # slice number of each device

  @property
  def num_slices(self):
    return len(set(self.slices))


@dataclasses.dataclass(frozen=True)
class Transfer:
  """One execution of a collective on one device."""

  kind: str  # of KINDS
  axes: str  # mesh axes of the group, e.g. 'fsdp' or 'replica+fsdp'
  network: str  # ici | dcn
  dtype: str
  nbytes: float  # received by the device
  seconds: float


def base_kind(op):
  """Returns the kind of a collective without -start and -done, or None."""
  kind = re.sub(r'-(start|done)$', '', op)
  return kind if kind in KINDS else None


def inside(module, computation):
  """Returns the collectives that a computation and its callees start."""
  collectives = []
  for i in module.computations.get(computation, {}).values():
    if base_kind(i.op) and not i.op.endswith('-done'):
      collectives.append(i)
    elif i.op in ('fusion', 'call', 'async-start'):
      called = i.attribute('calls') or i.attribute('to_apply')
      collectives += inside(module, called)
  return collectives


def is_reduce_scatter(module, fusion):
  """Returns whether a fusion is an all-reduce that writes only a slice."""
  called = fusion.attribute('calls') or ''
  root = module.roots.get(called)
  return (
    'AllReduceScatterFusion' in fusion.attributes
    or 'all-reduce-scatter' in called
  ) and root is not None


def transfer(module, machine, i, scattered=False):
  """Returns the bytes and seconds of a collective.

  Args:
    module: hlo.Module.
    machine: Machine.
    i: Instruction, not a '-done'.
    scattered: whether i is an all-reduce that writes only a slice.

  Returns:
    Transfer.
  """
  kind = 'reduce-scatter' if scattered else base_kind(i.op)
  positions = mesh_positions(machine, group(module, machine, i), module)
  size = len(positions)
  full = _result_bytes(i)
  if kind == 'reduce-scatter' and not scattered:
    full *= size
  share = (size - 1) / size
  nbytes = {
    'all-reduce': 2 * share * full,
    'collective-permute': full,
  }.get(kind, share * full)
  arrays = hlo.arrays(i.type)
  dtype = arrays[0].dtype if arrays else ''
  axes = axes_of(machine, positions)
  if len({machine.slices[p] for p in positions}) > 1:
    seconds = nbytes / machine.chip.dcn_bandwidth + DCN_LATENCY_S
    return Transfer(kind, axes, 'dcn', dtype, nbytes, seconds)
  return Transfer(
    kind, axes, 'ici', dtype, nbytes, _ici_s(machine, kind, positions, nbytes)
  )


def between_slices(machine, send):
  """Returns the Transfer of a send, one half of a collective between slices."""
  kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', send.attributes)
  kind = kind[1].lower().replace('_', '-')
  array = hlo.arrays(send.type)[0]
  share = (machine.num_slices - 1) / machine.num_slices
  nbytes = array.nbytes * {'all-reduce': 2 * share, 'all-to-all': share}.get(
    kind, 1
  )
  # The group is the first device with these coordinates in every slice.
  first, group = machine.coords[0], {}
  for p, (coords, part) in enumerate(
    zip(machine.coords, machine.slices, strict=True)
  ):
    if coords == first:
      group.setdefault(part, p)
  positions = list(group.values())
  seconds = nbytes / machine.chip.dcn_bandwidth + DCN_LATENCY_S
  axes = axes_of(machine, positions)
  return Transfer(kind, axes, 'dcn', array.dtype, nbytes, seconds)


def _result_bytes(i):
  """Returns the bytes of the result of a collective on one device."""
  parts = hlo.elements(i.type)
  # The start of an asynchronous collective returns (operands, results,
  # context), except that of all-reduce, which returns the results.
  if i.op.endswith('-start') and i.op != 'all-reduce-start' and len(parts) > 1:
    return hlo.nbytes(parts[1])
  return hlo.nbytes(i.type)


def group(module, machine, i):
  """Returns the device numbers of the first group of a collective.

  The text writes groups as lists, as a reshaped and transposed range
  ([2,4]<=[4,2]T(1,0)), or as axes of a mesh that it declares. A collective
  without groups has one group of all devices. The group of a permutation is its
  first pair of source and target.
  """
  all_devices = list(range(module.num_partitions))
  text = i.attributes
  match = re.search(
    r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)', text
  )
  if match:
    return [int(n) for n in match[1].split(',')]
  match = re.search(
    r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text
  )
  if match:
    shape, dims, order = (
      [int(n) for n in part.split(',')] if part else None
      for part in match.groups()
    )
    ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
    return ids.reshape(-1, shape[-1])[0].tolist()
  match = re.search(r'replica_groups=mesh\[(.*?)\](.*?)\{(.*?)\}', text)
  if match:
    return _mesh_group(*match.groups())
  return all_devices


def _mesh_group(mesh, order, names):
  """Returns the first group along axes of a mesh, e.g. 'a'=2,'b'=4 and 'b'."""
  sizes = {n: int(s) for n, s in re.findall(r"'?(\w+)'?=(\d+)", mesh)}
  ids = np.arange(math.prod(sizes.values()))
  match = re.search(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', order)
  if match:  # the device numbers are permuted
    dims = [int(n) for n in match[1].split(',')]
    order = [int(n) for n in match[2].split(',')] if match[2] else None
    ids = ids.reshape(dims).transpose(order)
  # A part of an axis: 'a':(2)4 is axis a without its first factor of 2.
  used = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", names)
  parts = {n: (int(b or 1), int(s or sizes[n])) for n, b, s in used}
  dims, index = [], []
  for name, size in sizes.items():
    before, inside = parts.get(name, (1, 1))
    dims += [before, inside, size // before // inside]
    index += [0, slice(None), 0] if name in parts else [0, 0, slice(None, 1)]
  return ids.reshape(dims)[tuple(index)].reshape(-1).tolist()


def mesh_positions(machine, ids, module):
  """Returns the positions in the mesh of device numbers of a program.

  A program for several slices numbers only the devices of its own slice.
  """
  if module.num_partitions == len(machine.slices):
    return ids
  own = [p for p, s in enumerate(machine.slices) if s == machine.slices[0]]
  return [own[n] for n in ids]


def axes_of(machine, positions):
  """Returns the mesh axes along which positions differ, joined by '+'."""
  shape = tuple(machine.axes.values())
  indices = np.unravel_index(positions, shape)
  names = [
    name
    for name, index in zip(machine.axes, indices, strict=True)
    if len(set(index.tolist())) > 1
  ]
  return '+'.join(names)


def _ici_s(machine, kind, positions, nbytes):
  """Returns the seconds of a collective within a slice."""
  if len(positions) < 2:
    return 0.0
  chip = machine.chip
  if kind == 'collective-permute':
    coords = [machine.coords[p] for p in positions[:2]]
    link = chip.link_bandwidth / chip.devices
    bandwidth = chip.pair_bandwidth if coords[0] == coords[1] else link
    return nbytes / bandwidth + ICI_START_S + ICI_HOP_S
  bandwidth, hops = 0.0, 0
  for axis, size in enumerate(machine.shape):
    extent = len({machine.coords[p][axis] for p in positions})
    if extent == 1:
      continue
    # A group over a whole axis with wrap-around links uses both directions.
    ring = extent == size and size % chip.wrap_multiple == 0
    bandwidth += chip.link_bandwidth * (2 if ring else 1)
    hops += extent // 2 if ring else extent - 1
  phases = 2 if kind == 'all-reduce' else 1
  # The two devices of a chip share its links. Each is assumed to receive all of
  # its data over them, also what the other device receives.
  bandwidth /= chip.devices
  bandwidth = bandwidth or chip.pair_bandwidth  # a group within a chip
  return nbytes / bandwidth + ICI_START_S + phases * hops * ICI_HOP_S
