"""The mesh and how arrays lie on it. Eight fake devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from maskdiff import mesh
from maskdiff.errors import UserError


@pytest.fixture(scope='module')
def two_by_two_by_two():
  return mesh.make_mesh(fsdp=2, sequence=2, tensor=2)


def placed(m, shape, *axes):
  """An array of this shape after `shard` under jit on the mesh."""
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
def test_an_axis_of_minus_1_takes_what_is_left(sizes, expected):
  m = mesh.make_mesh(**sizes)
  assert tuple(m.shape.items()) == tuple(zip(mesh.AXES, expected, strict=True))
  assert m.size == 8


def test_mesh_axes_are_auto():
  axis_types = set(mesh.make_mesh().axis_types)
  assert axis_types == {jax.sharding.AxisType.Auto}


def test_mesh_uses_only_the_devices_given():
  devices = jax.devices()[2:4]
  m = mesh.make_mesh(fsdp=-1, devices=devices)
  assert set(m.devices.flat) == set(devices)


@pytest.mark.parametrize(
  'sizes', [{'fsdp': 3}, {'fsdp': 4}, {'fsdp': 16}, {'tensor': 3}]
)
def test_wrong_product_names_the_sizes_and_the_fix(sizes):
  with pytest.raises(UserError) as error:
    mesh.make_mesh(**sizes)
  message = str(error.value)
  (name, size), *_ = sizes.items()
  assert f'{name}={size}' in message
  assert '8 devices' in message
  assert 'set one axis to -1' in message
  assert '\n' not in message


@pytest.mark.parametrize(
  'sizes', [{'fsdp': 0}, {'fsdp': -2}, {'fsdp': -1, 'tensor': -1}]
)
def test_impossible_sizes_are_refused(sizes):
  with pytest.raises(UserError, match='one of them may be -1'):
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
    (('vocab', 'embed'), P('tensor', 'fsdp')),
    (('layers', 'embed', 'mlp'), P(None, 'fsdp', 'tensor')),
    (
      ('layers', 'heads', 'head_dim', 'embed'),
      P(None, 'tensor', None, 'fsdp'),
    ),
  ],
)
def test_matrices_are_split_and_vectors_are_not(axes, spec):
  assert mesh.param_spec(axes) == spec


def test_an_indivisible_parameter_is_named_with_its_axis(two_by_two_by_two):
  axes = {'blocks': {'up': ('layers', 'embed', 'mlp')}}
  shapes = {'blocks': {'up': jax.ShapeDtypeStruct((2, 8, 7), jnp.float32)}}
  with pytest.raises(UserError) as error:
    mesh.param_shardings(two_by_two_by_two, axes, shapes)
  message = str(error.value)
  assert 'blocks/up' in message
  assert 'mlp = 7' in message
  assert 'config.mesh.tensor' in message


def test_shard_outside_a_mesh_is_the_identity():
  x = jnp.arange(6.0).reshape(2, 3)
  assert mesh.shard(x, 'batch', 'length') is x


def test_shard_places_activations_by_their_axes(two_by_two_by_two):
  x = placed(two_by_two_by_two, (4, 6, 8), 'batch', 'length', 'mlp')
  assert x.sharding.shard_shape(x.shape) == (2, 3, 4)
  x = placed(two_by_two_by_two, (4, 6, 2, 8), 'batch', None, 'heads', None)
  assert x.sharding.shard_shape(x.shape) == (2, 6, 1, 8)


def test_shard_leaves_indivisible_dimensions_whole(two_by_two_by_two):
  x = placed(two_by_two_by_two, (3, 6, 7), 'batch', 'length', 'mlp')
  assert x.sharding.shard_shape(x.shape) == (3, 3, 7)


def test_shard_does_not_change_values(two_by_two_by_two):
  x = jnp.arange(24.0).reshape(4, 6)
  with jax.set_mesh(two_by_two_by_two):
    y = jax.jit(lambda x: mesh.shard(x, 'batch', 'length'))(x)
  np.testing.assert_array_equal(x, y)


def test_shard_wants_an_axis_per_dimension(two_by_two_by_two):
  with pytest.raises(ValueError, match='1 axes'):
    placed(two_by_two_by_two, (4, 6), 'batch')
