"""Fingerprints cover all bits of an array and do not depend on sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from maskdiff.checkpoints.fingerprint import fingerprint, fingerprints

DTYPES = ['float32', 'bfloat16', 'int32', 'uint32', 'bool', 'int8', 'float16']
SHAPES = [(), (1,), (7,), (8, 16), (13, 5, 3), (2, 3, 4, 5), (0, 3)]
MASK = 2**32 - 1


def bits_of(x):
  x = np.asarray(x)
  return x.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def mix(x):
  x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
  x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
  return x ^ (x >> 16)


def reference(x):
  """Computes the fingerprint with Python integers, element by element."""
  total = 0
  for index, value in np.ndenumerate(bits_of(x)):
    position = len(index)
    for i in index:
      position = mix((position * 0x9E3779B1 + i) & MASK)
    total += mix(int(value) ^ position)
  return total & MASK


def noise(shape, dtype, seed=0):
  """Random bits, including NaNs, infinities and denormals."""
  random = np.random.default_rng(seed)
  dtype = jnp.dtype(dtype)
  if dtype.kind == 'b':
    return random.integers(2, size=shape).astype(bool)
  raw = random.bytes(int(np.prod(shape)) * dtype.itemsize)
  return np.frombuffer(raw, dtype).reshape(shape).copy()


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_fingerprint_equals_the_python_reference(shape, dtype):
  x = noise(shape, dtype)
  assert int(fingerprint(x)) == reference(x)


@pytest.mark.parametrize(
  'shape', [(300_001,), (3, 419, 217), (2, 200_003)], ids=str
)
def test_tiled_fingerprint_equals_the_python_reference(shape):
  x = noise(shape, 'bfloat16')
  assert int(jax.jit(fingerprint)(x)) == reference(x)


def test_fingerprint_is_stable_across_versions():
  """Old checkpoints must still verify."""
  x = jnp.arange(1000, dtype=jnp.float32).reshape(10, 100)
  tree = {'a': x, 'b': x.astype(jnp.bfloat16), 'c': x[0] > 5}
  found = {k: int(v) for k, v in fingerprints(tree).items()}
  assert found == {'a': 1018675246, 'b': 8935460, 'c': 1626297293}


@pytest.mark.parametrize(
  ('shape', 'dtype'),
  [
    ((8, 24, 16), 'float32'),
    ((8, 24, 16), 'bfloat16'),
    ((8, 24, 16), 'int32'),
    ((8, 24, 16), 'bool'),
    ((8, 24, 1480), 'float32'),
  ],
)
def test_fingerprint_does_not_depend_on_the_mesh(shape, dtype):
  x = noise(shape, dtype)
  expected = int(fingerprint(x))
  for sizes, spec in [
    ((8, 1), P('a')),
    ((8, 1), P(None, 'a')),
    ((2, 4), P('a', 'b')),
    ((2, 4), P(('b', 'a'), None, None)),
    ((2, 2), P(None, 'b', 'a')),
    ((4, 2), P('b', None, 'a')),
    ((4, 2), P()),
  ]:
    mesh = jax.make_mesh(
      sizes,
      ('a', 'b'),
      axis_types=(AxisType.Auto,) * 2,
      devices=jax.devices()[: sizes[0] * sizes[1]],
    )
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    assert int(fingerprints([placed])[0]) == expected, (sizes, spec)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'int8'])
def test_flipped_bit_changes_the_fingerprint(dtype):
  x = noise((64, 40), dtype)
  take = jax.jit(fingerprint)
  original = int(take(x))
  random = np.random.default_rng(1)
  for _ in range(200):
    damaged = x.copy()
    bits = bits_of(damaged).reshape(-1)
    at = random.integers(bits.size)
    bits[at] ^= bits.dtype.type(1 << random.integers(8 * x.dtype.itemsize))
    assert int(take(damaged)) != original


def test_any_change_of_an_element_changes_the_fingerprint():
  """All 2^16 values give different fingerprints."""
  values = jnp.arange(2**16, dtype=jnp.uint16)
  rows = jnp.zeros((2**16, 3), jnp.uint16).at[:, 1].set(values)
  assert len(np.unique(jax.jit(jax.vmap(fingerprint))(rows))) == 2**16


def test_moved_elements_change_the_fingerprint():
  x = noise((32, 16), 'float32')
  moved = [
    x[::-1],
    x[:, ::-1],
    np.roll(x, 1),
    np.roll(x, 1, axis=0),
    x[[1, 0, *range(2, 32)]],
    x[:, [1, 0, *range(2, 16)]],
    x.reshape(16, 32),
    x.reshape(-1),
    x.reshape(16, 32).T,
  ]
  found = {int(fingerprint(y)) for y in [x, *moved]}
  assert len(found) == len(moved) + 1


@pytest.mark.parametrize('dtype', ['bool', 'int32', 'float32'])
def test_swapped_elements_change_the_fingerprint(dtype):
  """Values are few and small, as in counters and masks."""
  x = np.random.default_rng(0).integers(2, size=(16, 32)).astype(dtype)
  take = jax.jit(fingerprint)
  original, random = int(take(x)), np.random.default_rng(1)
  for _ in range(100):
    a, b = (tuple(random.integers((16, 32))) for _ in range(2))
    swapped = x.copy()
    swapped[a], swapped[b] = x[b], x[a]
    assert (int(take(swapped)) != original) == (x[a] != x[b])


def test_signed_zeros_and_nans_have_different_fingerprints():
  same = [[0.0, 1.0], [-0.0, 1.0], [np.nan, 1.0], [-np.nan, 1.0]]
  found = {int(fingerprint(np.float32(x))) for x in same}
  assert len(found) == len(same)


def test_fingerprint_needs_little_memory():
  for shape in [(4096, 512), (12, 333, 571), (2_000_003,)]:
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    memory = jax.jit(fingerprint).lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < x.size * 4 / 4, shape
