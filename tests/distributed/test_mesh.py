"""The device mesh and shardings, on eight fake devices."""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_compiler
from jax.sharding import PartitionSpec as P
from tpu_compiler import needs_libtpu

from maskdiff.distributed import mesh
from maskdiff.errors import UserError


@pytest.fixture(scope='module')
def two_by_two_by_two():
  return mesh.make_mesh(fsdp=2, sequence=2, tensor=2)


def sharded(m, shape, *axes):
  """Returns zeros of this shape after `shard` under jit on the mesh."""
  with jax.set_mesh(m):
    return jax.jit(lambda x: mesh.shard(x, *axes))(jnp.zeros(shape))


@pytest.mark.parametrize(
  'sizes, expected',
  [
    ({}, (1, 8, 1, 1)),
    ({'fsdp': 2, 'tensor': -1}, (1, 2, 1, 4)),
    ({'replica': -1, 'fsdp': 1, 'sequence': 2}, (4, 1, 2, 1)),
    ({'fsdp': 8, 'tensor': -1}, (1, 8, 1, 1)),
  ],
)
def test_axis_of_minus_1_takes_the_remaining_devices(sizes, expected):
  m = mesh.make_mesh(**sizes)
  assert tuple(m.shape.items()) == tuple(zip(mesh.AXES, expected, strict=True))
  assert m.size == 8


def test_mesh_axes_are_auto():
  axis_types = set(mesh.make_mesh().axis_types)
  assert axis_types == {jax.sharding.AxisType.Auto}


def test_mesh_uses_only_the_given_devices():
  devices = jax.devices()[2:4]
  m = mesh.make_mesh(fsdp=-1, devices=devices)
  assert set(m.devices.flat) == set(devices)


@pytest.mark.parametrize(
  'sizes', [{'fsdp': 3}, {'fsdp': 4}, {'fsdp': 16}, {'tensor': 3}]
)
def test_wrong_product_is_refused(sizes):
  with pytest.raises(UserError) as error:
    mesh.make_mesh(**sizes)
  message = str(error.value)
  (name, size), *_ = sizes.items()
  assert f'{name}={size}' in message
  assert 'devices, 8' in message
  assert 'set one axis to -1' in message
  assert '\n' not in message


@pytest.mark.parametrize(
  'sizes', [{'fsdp': 0}, {'fsdp': -2}, {'fsdp': -1, 'tensor': -1}]
)
def test_invalid_sizes_are_refused(sizes):
  with pytest.raises(UserError, match='one may be -1'):
    mesh.make_mesh(**sizes)


def test_rows_are_split_over_replica_and_fsdp():
  m = mesh.make_mesh(replica=2, fsdp=2, tensor=2)
  assert mesh.batch_shards(m) == 4
  assert mesh.batch_sharding(m).shard_shape((8, 6)) == (2, 6)


def test_length_is_split_over_sequence(two_by_two_by_two):
  sharding = mesh.batch_sharding(two_by_two_by_two)
  assert sharding.shard_shape((8, 6)) == (4, 3)


@pytest.mark.parametrize(
  'axes, spec',
  [
    (('embed',), P()),
    (('layers', 'embed'), P()),
    (('vocab', 'embed'), P('tensor', ('fsdp', 'sequence'))),
    (
      ('layers', 'embed', 'mlp'),
      P(None, ('fsdp', 'sequence'), 'tensor'),
    ),
    (
      ('layers', 'heads', 'head_dim', 'embed'),
      P(None, 'tensor', None, ('fsdp', 'sequence')),
    ),
  ],
)
def test_matrices_are_split_and_vectors_are_not(axes, spec):
  assert mesh.param_spec(axes) == spec


def test_indivisible_parameter_is_refused(two_by_two_by_two):
  axes = {'blocks': {'up': ('layers', 'embed', 'mlp')}}
  shapes = {'blocks': {'up': jax.ShapeDtypeStruct((2, 8, 7), jnp.float32)}}
  with pytest.raises(UserError) as error:
    mesh.param_shardings(two_by_two_by_two, axes, shapes)
  message = str(error.value)
  assert 'blocks/up' in message
  assert 'mlp = 7' in message
  assert 'config.mesh.tensor' in message
  shapes = {'blocks': {'up': jax.ShapeDtypeStruct((2, 6, 8), jnp.float32)}}
  both = 'embed = 6 is not divisible by mesh.fsdp x mesh.sequence = 4'
  with pytest.raises(UserError, match=both):
    mesh.param_shardings(two_by_two_by_two, axes, shapes)


def test_shard_outside_a_mesh_is_the_identity():
  x = jnp.arange(6.0).reshape(2, 3)
  assert mesh.shard(x, 'batch', 'length') is x


def test_shard_splits_activations_by_their_axes(two_by_two_by_two):
  x = sharded(two_by_two_by_two, (4, 6, 8), 'batch', 'length', 'mlp')
  assert x.sharding.shard_shape(x.shape) == (2, 3, 4)
  x = sharded(two_by_two_by_two, (4, 6, 2, 8), 'batch', None, 'heads', None)
  assert x.sharding.shard_shape(x.shape) == (2, 6, 1, 8)


def test_shard_does_not_split_indivisible_dimensions(two_by_two_by_two):
  x = sharded(two_by_two_by_two, (3, 6, 7), 'batch', 'length', 'mlp')
  assert x.sharding.shard_shape(x.shape) == (3, 3, 7)


def test_shard_does_not_change_values(two_by_two_by_two):
  x = jnp.arange(24.0).reshape(4, 6)
  with jax.set_mesh(two_by_two_by_two):
    y = jax.jit(lambda x: mesh.shard(x, 'batch', 'length'))(x)
  np.testing.assert_array_equal(x, y)


def test_shard_needs_one_axis_per_dimension(two_by_two_by_two):
  with pytest.raises(ValueError, match='1 axes'):
    sharded(two_by_two_by_two, (4, 6), 'batch')


# Several slices


def fake_slices(number, shape=(2, 2, 2), platform='tpu', kind='TPU v5'):
  """Returns devices like those of a multislice TPU job, in shuffled order."""
  devices = [
    types.SimpleNamespace(
      id=index,
      platform=platform,
      device_kind=kind,
      process_index=index // 4,
      slice_index=index // math.prod(shape),
      core_on_chip=0,
      coords=tuple(np.unravel_index(index % math.prod(shape), shape)),
    )
    for index in range(number * math.prod(shape))
  ]
  return [*devices[::2], *devices[1::2]]


def slices_of_replicas(m):
  """Returns the set of slices of each replica."""
  return [{d.slice_index for d in replica.flat} for replica in m.devices]


@pytest.fixture(autouse=True)
def meshes_of_fakes(monkeypatch):
  """Replaces Mesh, which needs real devices, by an array and its shape."""
  real = jax.sharding.Mesh

  def make(devices, names, axis_types):
    if isinstance(devices.flat[0], jax.Device):
      return real(devices, names, axis_types=axis_types)
    shape = dict(zip(names, devices.shape, strict=True))
    return types.SimpleNamespace(devices=devices, shape=shape)

  monkeypatch.setattr(jax.sharding, 'Mesh', make)


@pytest.mark.parametrize(
  'slices, sizes, expected',
  [
    (2, dict(replica=2), (2, 8, 1, 1)),
    (2, dict(replica=4), (4, 4, 1, 1)),
    (2, dict(replica=-1, fsdp=4, tensor=2), (2, 4, 1, 2)),
    (2, dict(replica=2, sequence=2, tensor=4), (2, 1, 2, 4)),
    (3, dict(replica=3), (3, 8, 1, 1)),
    (3, dict(replica=-1, fsdp=1), (24, 1, 1, 1)),
    (1, dict(), (1, 8, 1, 1)),
  ],
)
def test_only_replicas_span_slices(slices, sizes, expected):
  m = mesh.make_mesh(**sizes, devices=fake_slices(slices))
  assert m.devices.shape == expected
  assert sorted(d.id for d in m.devices.flat) == list(range(slices * 8))
  per_slice = expected[0] // slices
  assert slices_of_replicas(m) == [
    {s} for s in range(slices) for _ in range(per_slice)
  ]


@pytest.mark.parametrize(
  'slices, sizes',
  [(2, {}), (2, dict(replica=1, tensor=2)), (3, dict(replica=2, fsdp=12))],
)
def test_unequal_replicas_per_slice_are_refused(slices, sizes):
  with pytest.raises(UserError) as error:
    mesh.make_mesh(**sizes, devices=fake_slices(slices))
  message = str(error.value)
  assert f'{slices} slices of 8' in message
  assert f'--config.mesh.replica={slices} or a multiple' in message
  assert '\n' not in message


def test_slices_of_different_sizes_are_refused():
  devices = [d for d in fake_slices(2) if d.id < 12]
  with pytest.raises(UserError, match='2 slices of 4, 8'):
    mesh.make_mesh(replica=2, devices=devices)


def test_fsdp_axis_may_span_gpu_nodes():
  devices = fake_slices(2, platform='gpu', kind='NVIDIA H100 80GB HBM3')
  m = mesh.make_mesh(devices=devices)
  assert m.devices.shape == (1, 16, 1, 1)
  assert [d.id for d in m.devices.flat] == list(range(16))


@pytest.mark.filterwarnings('ignore:a mesh of')
@pytest.mark.parametrize('number', [1, 3, 6])
def test_any_number_of_devices_makes_a_mesh(number):
  assert mesh.make_mesh(devices=jax.devices()[:number]).size == number
  part_of_a_slice = fake_slices(1)[:number]
  assert mesh.make_mesh(devices=part_of_a_slice).devices.size == number


def test_axis_may_be_part_of_a_physical_axis():
  """jax.make_mesh supports this for 64 chips of v5e, but not of v5p."""
  devices = fake_slices(1, (4, 4, 4))
  m = mesh.make_mesh(replica=2, tensor=2, devices=devices)
  assert m.devices.shape == (2, 16, 1, 2)
  assert sorted(d.id for d in m.devices.flat) == list(range(64))


ODD = [(0, 0, 0), (1, 0, 0), (0, 1, 0)]  # three chips of a square


def test_arbitrary_order_of_tpus_gives_a_warning():
  devices = [d for d in fake_slices(1) if d.coords in ODD]
  with pytest.warns(UserWarning, match='fsdp=3.*use all devices of a slice'):
    mesh.make_mesh(devices=devices)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
  'devices',
  [
    fake_slices(1),
    fake_slices(1, (4, 4, 4)),
    [d for d in fake_slices(1) if d.coords in ODD[:2]],
    [d for d in fake_slices(1) if d.id in (0, 7)],  # opposite corners
    fake_slices(1, (3, 1, 1), platform='gpu', kind='NVIDIA L4'),
    jax.devices()[:3],
  ],
  ids=['cube', 'pod', 'neighbours', 'corners', 'gpus', 'cpus'],
)
def test_adjacent_or_few_devices_give_no_warning(devices):
  mesh.make_mesh(devices=devices)


TOPOLOGIES = """
import json, sys
import jax
from jax.experimental import mesh_utils, topologies
from maskdiff.distributed import mesh

for name, slices, sizes in json.loads(sys.argv[1]):
  more = {'num_slices': slices} if slices > 1 else {}
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name=name, **more
  ).devices
  m = mesh.make_mesh(**sizes, devices=devices)
  assert set(m.devices.flat) == set(devices), name
  assert [len({getattr(d, 'slice_index', 0) for d in replica.flat})
          for replica in m.devices] == [1] * m.shape['replica'], name
  if slices > 1:
    inside = (m.shape['replica'] // slices, *m.devices.shape[1:])
    hybrid = mesh_utils.create_hybrid_device_mesh(
      inside, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
    )
    assert (hybrid == m.devices).all(), name
"""


@pytest.mark.slow
@needs_libtpu
def test_meshes_of_real_topologies():
  """Includes odd sizes. Several slices must equal JAX's hybrid mesh."""
  cases = [
    ('v5p:4x4x4', 2, dict(replica=2)),
    ('v5p:4x4x4', 2, dict(replica=4)),
    ('v5p:4x4x4', 2, dict(replica=2, tensor=2)),
    ('v5p:4x4x4', 1, dict(replica=2)),
    ('v5p:2x2x1', 3, dict(replica=-1, fsdp=2)),
    ('v5e:4x4', 3, dict(replica=3, sequence=2, tensor=4)),
    ('v6e:4x4', 2, dict(replica=4)),
    ('v5p:2x2x3', 1, dict(tensor=3)),
    ('v5p:4x4x20', 1, dict(tensor=4)),
    ('v4:2x2x3', 1, dict(tensor=2)),
  ]
  tpu_compiler.run(TOPOLOGIES, json.dumps(cases))
