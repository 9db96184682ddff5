"""Bytes and times of collectives, computed by hand."""

import itertools
import math

import pytest

from maskdiff.distributed import chips
from maskdiff.planner import hlo, hlo_collectives
from maskdiff.planner.hlo_collectives import (
  ICI_HOP_S,
  ICI_START_S,
  Machine,
)

V5P, V5E = chips.by_kind('TPU v5p'), chips.by_kind('TPU v5e')
IRONWOOD = chips.by_kind('TPU7x')
MB = 1024 * 1024


def machine(chip, shape, axes, num_slices=1):
  """Returns a machine whose devices are in order of their coordinates.

  The first coordinate changes fastest.
  """
  reversed_coords = itertools.product(*map(range, reversed(shape)))
  coords = tuple(tuple(reversed(c)) for c in reversed_coords)
  slices = [s for s in range(num_slices) for _ in coords]
  return Machine(chip, shape, axes, coords * num_slices, tuple(slices))


def axes(replica=1, fsdp=1, sequence=1, tensor=1):
  return {
    'replica': replica,
    'fsdp': fsdp,
    'sequence': sequence,
    'tensor': tensor,
  }


def module_of(lines, partitions):
  """Returns a program of these instructions."""
  return hlo.parse(
    f'HloModule jit_f, num_partitions={partitions}\n'
    'ENTRY %main (x: f32[8]) -> f32[8] {\n'
    '  %x = f32[8] parameter(0)\n' + lines + '\n}\n'
  )


def transfer(line, target, partitions=None):
  module = module_of(line, partitions or len(target.slices))
  (i,) = [i for i in module.computations['main'].values() if i.name != 'x']
  return hlo_collectives.transfer(module, target, i)


CUBE = machine(V5P, (4, 4, 4), axes(fsdp=64))
# A torus of 4 x 4 x 4 has two links in each of three directions.
CUBE_BANDWIDTH = 6 * V5P.link_bandwidth
CUBE_HOPS_S = 6 * ICI_HOP_S


@pytest.mark.parametrize(
  'line, kind, nbytes, phases',
  [
    ('%g = bf16[64,8192] all-gather(%x)', 'all-gather', MB * 63 / 64, 1),
    ('%g = bf16[64,8192] all-reduce(%x)', 'all-reduce', 2 * MB * 63 / 64, 2),
    ('%g = bf16[8192] reduce-scatter(%x)', 'reduce-scatter', MB * 63 / 64, 1),
    ('%g = bf16[64,8192] all-to-all(%x)', 'all-to-all', MB * 63 / 64, 1),
    (
      '%g = (bf16[32,8192], bf16[32,8192]) all-reduce(%x, %x)',
      'all-reduce',
      2 * MB * 63 / 64,
      2,
    ),
    (
      '%g = (bf16[1,8192], bf16[64,8192]) all-gather-start(%x)',
      'all-gather',
      MB * 63 / 64,
      1,
    ),
    (
      '%g = ((bf16[8192], bf16[8192]), (bf16[32,8192], bf16[32,8192])) '
      'all-gather-start(%x, %x)',
      'all-gather',
      MB * 63 / 64,
      1,
    ),
    (
      '%g = (bf16[32,8192], bf16[32,8192]) all-reduce-start(%x, %x)',
      'all-reduce',
      2 * MB * 63 / 64,
      2,
    ),
  ],
)
def test_bytes_received_and_time_on_a_torus(line, kind, nbytes, phases):
  result = transfer('  ' + line + ', replica_groups={}', CUBE)
  assert (result.kind, result.dtype, result.network) == (kind, 'bf16', 'ici')
  assert result.axes == 'fsdp'
  assert result.nbytes == pytest.approx(nbytes)
  assert result.seconds == pytest.approx(
    nbytes / CUBE_BANDWIDTH + ICI_START_S + phases * CUBE_HOPS_S
  )


def test_permutation_uses_one_link():
  result = transfer(
    '  %p = (bf16[64,8192], bf16[64,8192], u32[], u32[]) '
    'collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}',
    CUBE,
  )
  assert result.kind == 'collective-permute'
  assert result.nbytes == MB
  latency = ICI_START_S + ICI_HOP_S
  assert result.seconds == pytest.approx(MB / V5P.link_bandwidth + latency)


@pytest.mark.parametrize(
  'kib, microseconds', [(1, (4.5, 5.5)), (16, (4.5, 5.5)), (65536, (742, 821))]
)
def test_permutation_takes_as_long_as_measured(kib, microseconds):
  """On v5p, marin issue 6736: 4.5 to 5.5 us up to 16 KiB; 64 MiB in 782 us."""
  line = (
    f'  %p = bf16[{kib * 512}] collective-permute(%x), '
    'source_target_pairs={{0,1},{1,0}}'
  )
  low, high = microseconds
  assert low < transfer(line, CUBE).seconds * 1e6 < high


def test_group_of_one_device_moves_nothing():
  result = transfer(
    '  %g = bf16[64,8192] all-reduce(%x), replica_groups={{0},{1}}', CUBE
  )
  assert (result.axes, result.nbytes, result.seconds) == ('', 0, 0)


def test_open_axis_has_half_of_the_bandwidth():
  grid = machine(V5E, (2, 4), axes(fsdp=8))
  result = transfer(
    '  %g = bf16[64,8192] all-gather(%x), replica_groups={}', grid
  )
  assert result.seconds == pytest.approx(
    MB * 7 / 8 / (2 * V5E.link_bandwidth) + ICI_START_S + 4 * ICI_HOP_S
  )
  ring = machine(V5E, (16, 16), axes(fsdp=256))
  result = transfer(
    '  %g = bf16[64,8192] all-gather(%x), replica_groups={}', ring
  )
  assert result.seconds == pytest.approx(
    MB * 255 / 256 / (4 * V5E.link_bandwidth) + ICI_START_S + 16 * ICI_HOP_S
  )


def ironwood(shape, axes):
  """Returns a machine with two devices per chip, one after the other."""
  one = machine(IRONWOOD, shape, axes)
  coords = tuple(c for c in one.coords for _ in range(2))
  return Machine(IRONWOOD, shape, axes, coords, slices=(0,) * len(coords))


def test_two_devices_share_the_links_of_their_chip():
  target = ironwood((4, 4, 4), axes(fsdp=128))
  result = transfer('  %g = bf16[64,8192] all-gather(%x)', target)
  assert result.nbytes == pytest.approx(MB * 127 / 128)
  assert result.seconds == pytest.approx(
    MB * 127 / 128 / (3 * IRONWOOD.link_bandwidth) + ICI_START_S + CUBE_HOPS_S
  )


@pytest.mark.parametrize(
  'line, nbytes',
  [
    ('%g = bf16[64,8192] all-gather(%x), replica_groups={{0,1}}', MB / 2),
    (
      '%p = bf16[64,8192] collective-permute(%x), '
      'source_target_pairs={{0,1},{1,0}}',
      MB,
    ),
  ],
)
def test_two_devices_of_a_chip_have_a_connection(line, nbytes):
  result = transfer('  ' + line, ironwood((2, 2, 1), axes(fsdp=4, tensor=2)))
  assert result.axes == 'tensor'
  assert result.nbytes == nbytes
  moved_s = nbytes / (6 * IRONWOOD.link_bandwidth)
  assert moved_s < result.seconds < moved_s + 6e-6


def test_mesh_axis_uses_the_links_along_it():
  # fsdp is slowest: over y and z; tensor over the 4 chips of x.
  target = machine(V5P, (4, 4, 4), axes(fsdp=16, tensor=4))
  line = '  %g = bf16[64,8192] all-gather(%x), replica_groups='
  tensor = transfer(line + '[16,4]<=[64]', target)
  assert tensor.axes == 'tensor'
  assert tensor.seconds == pytest.approx(
    MB * 3 / 4 / (2 * V5P.link_bandwidth) + ICI_START_S + 2 * ICI_HOP_S
  )
  fsdp = transfer(line + '[4,16]<=[16,4]T(1,0)', target)
  assert fsdp.axes == 'fsdp'
  assert fsdp.seconds == pytest.approx(
    MB * 15 / 16 / (4 * V5P.link_bandwidth) + ICI_START_S + 4 * ICI_HOP_S
  )


@pytest.mark.parametrize(
  'groups, ids',
  [
    ('replica_groups={{0,2,4,6},{1,3,5,7}}', [0, 2, 4, 6]),
    ('replica_groups=[2,4]<=[8]', [0, 1, 2, 3]),
    ('replica_groups=[2,4]<=[4,2]T(1,0)', [0, 2, 4, 6]),
    ('replica_groups=[4,2]<=[2,2,2]T(2,0,1)', [0, 2]),
    ("replica_groups=mesh['a'=8] {'a'}", list(range(8))),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
    ("replica_groups=mesh['a'=8,'b'=1] {'a','b'}", list(range(8))),
    ("replica_groups=mesh['a'=8] {'a':(1)2}", [0, 4]),
    ("replica_groups=mesh['a'=8] {'a':(2)4}", [0, 1, 2, 3]),
    ('replica_groups={}', list(range(8))),
    ('source_target_pairs={{0,3},{3,0}}', [0, 3]),
  ],
)
def test_groups_in_every_notation(groups, ids):
  target = machine(V5E, (2, 4), axes(fsdp=8))
  module = module_of(f'  %g = f32[8] all-reduce(%x), {groups}', 8)
  i = module.computations['main']['g']
  assert sorted(hlo_collectives.group(module, target, i)) == ids


def test_groups_along_several_mesh_axes():
  target = machine(V5E, (2, 4), axes(replica=2, fsdp=2, tensor=2))
  line = '  %g = f32[8] all-reduce(%x), replica_groups='
  assert transfer(line + '{{0,1,4,5}}', target).axes == 'replica+tensor'
  assert transfer(line + '{{0,2},{1,3}}', target).axes == 'fsdp'
  assert transfer(line + '{}', target).axes == 'replica+fsdp+tensor'


def test_group_over_slices_uses_the_data_centre_network():
  target = machine(V5P, (2, 2, 1), axes(replica=2, fsdp=4), num_slices=2)
  result = transfer(
    '  %g = bf16[64,8192] all-reduce(%x), replica_groups=[4,2]<=[2,4]T(1,0)',
    target,
  )
  assert (result.network, result.axes, result.nbytes) == ('dcn', 'replica', MB)
  assert result.seconds == pytest.approx(
    MB / V5P.dcn_bandwidth + hlo_collectives.DCN_LATENCY_S
  )


def test_device_numbers_count_within_a_slice():
  target = machine(V5P, (2, 2, 1), axes(replica=2, fsdp=4), num_slices=2)
  line = '  %g = bf16[64,8192] all-gather(%x), replica_groups={{0,1,2,3}}'
  result = transfer(line, target, partitions=4)
  assert (result.network, result.axes) == ('ici', 'fsdp')


def test_send_between_slices():
  target = machine(V5P, (2, 2, 1), axes(replica=4, fsdp=4), num_slices=4)
  module = module_of(
    '  %s = (bf16[64,8192]{1,0}, u32[], token[]) send(%x), channel_id=8, '
    'is_host_transfer=true, frontend_attributes={'
    '_xla_host_transfer_handler_name="xla_megascale_runtime",'
    '_xla_megascale_transfer_type="ALL_REDUCE"}',
    partitions=4,
  )
  send = module.computations['main']['s']
  result = hlo_collectives.between_slices(target, send)
  assert (result.kind, result.network) == ('all-reduce', 'dcn')
  assert result.axes == 'replica'
  assert result.nbytes == MB * 2 * 3 / 4


SCATTERED = """HloModule jit_f, num_partitions=64
%all-reduce-scatter.1 (in: bf16[64,8192]) -> bf16[1,8192] {
  %in = bf16[64,8192] parameter(0)
  %sum = bf16[64,8192] all-reduce(%in), replica_groups={}
  %id = u32[] partition-id()
  ROOT %mine = bf16[1,8192] dynamic-slice(%sum, %id)
}

ENTRY %main (x: bf16[64,8192]) -> bf16[1,8192] {
  %x = bf16[64,8192] parameter(0)
  ROOT %f = bf16[1,8192] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_all_reduce_scatter_fusion_is_a_reduce_scatter():
  module = hlo.parse(SCATTERED)
  fusion = module.roots['main']
  assert hlo_collectives.is_reduce_scatter(module, fusion)
  (inner,) = hlo_collectives.inside(module, fusion.attribute('calls'))
  result = hlo_collectives.transfer(module, CUBE, inner, scattered=True)
  assert result.kind == 'reduce-scatter'
  assert result.nbytes == pytest.approx(MB * 63 / 64)
  whole = hlo_collectives.transfer(module, CUBE, inner)
  assert whole.nbytes == pytest.approx(2 * result.nbytes)


def test_collectives_inside_called_computations():
  module = hlo.parse(SCATTERED)
  assert [i.name for i in hlo_collectives.inside(module, 'main')] == ['sum']
  assert hlo_collectives.inside(module, 'nothing') == []


def test_kinds_of_ops():
  assert hlo_collectives.base_kind('all-gather-start') == 'all-gather'
  assert hlo_collectives.base_kind('all-reduce-done') == 'all-reduce'
  assert hlo_collectives.base_kind('copy-start') is None


def test_machine_of_the_tests_is_a_torus():
  assert len(CUBE.coords) == math.prod(CUBE.shape)
  assert CUBE.coords[:3] == ((0, 0, 0), (1, 0, 0), (2, 0, 0))
  assert CUBE.num_slices == 1
