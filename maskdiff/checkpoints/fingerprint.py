"""Hashes of arrays that do not depend on how the arrays are sharded.

Storage can flip a bit without an error from the code that reads a checkpoint.
Fingerprints are therefore computed on the devices before arrays are saved, and
again after they are restored, possibly on another mesh.
"""

import math

import jax
import jax.numpy as jnp

_UINT = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def fingerprint(x, first=0):
  """Hashes all bits of an array and their positions.

  Each element is mixed with its position, and the results are summed modulo
  2^32. Integer sums do not depend on the order. The mixing is a bijection, so
  a change of any single element of up to 4 bytes changes the sum. Any other
  change goes unnoticed with probability 2^-32.

  Args:
    x: array of any shape, of a dtype with 1, 2, 4 or 8 bytes.
    first: if x is a slice of an array along axis 0, the index at which the
      slice begins. The fingerprints of all slices add up to the fingerprint of
      the array, modulo 2^32.

  Returns:
    uint32 scalar.
  """
  x = jnp.asarray(x)
  if x.dtype == bool:
    x = x.astype(jnp.uint8)
  first = jnp.uint32(first)
  return jax.lax.platform_dependent(x, first, cpu=_sum_on_cpu, default=_sum)


def _bits(x):
  return jax.lax.bitcast_convert_type(x, _UINT[x.dtype.itemsize])


def _mixed(bits, start):
  """Mixes the bits of a slice of an array with their positions in the array.

  Args:
    bits: unsigned integers, the slice.
    start: for each axis, the index in the array at which the slice begins.

  Returns:
    uint32 of the shape of `bits`.
  """
  position = jnp.full(bits.shape, bits.ndim, jnp.uint32)
  for axis, begin in enumerate(start):
    # Axis by axis, because arrays may have more than 2^32 elements.
    index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index += jnp.asarray(begin, jnp.uint32)
    position = _mix(position * jnp.uint32(0x9E3779B1) + index)
  return _mix(bits.astype(jnp.uint32) ^ position)


def _mix(x):
  """Bijection of uint32 in which every bit affects all bits (MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _sum(x, first):
  bits = _bits(x)
  start = (first, *[0] * bits.ndim)[: bits.ndim]
  return jnp.sum(_mixed(bits, start), dtype=jnp.uint32)


def _sum_on_cpu(x, first):
  """`_sum` tile by tile, which is faster on a CPU.

  On CPUs XLA vectorizes the sum of two arrays, but not a reduction. A tile of
  a megabyte fits into the caches and keeps several cores busy. If the array is
  sharded, every device computes all tiles.
  """
  if x.size <= 2**18:
    return _sum(x, first)
  if x.dtype.itemsize == 8:
    x = _bits(x)

  def mixed(part, start):
    return _mixed(part, (first + start[0].astype(jnp.uint32), *start[1:]))

  x = _sum_of_tiles(x, 2**18, mixed)
  x = _sum_of_tiles(x, 2**12, lambda part, start: part)
  return jnp.sum(x, dtype=jnp.uint32)


def _sum_of_tiles(x, size, function):
  """Cuts an array into tiles and sums the tiles elementwise.

  Args:
    x: array.
    size: int, largest number of elements of a tile.
    function: from (bits of a tile, its start index for each axis) to uint32 of
      the shape of the tile.

  Returns:
    uint32 of the shape of a tile.
  """
  tile = []
  for n in reversed(x.shape):  # whole last axes, then a part of one axis
    tile.insert(0, min(n, max(size // math.prod(tile), 1)))
  counts = [-(-n // t) for n, t in zip(x.shape, tile, strict=True)]

  def add(i, total):
    tile_index = jnp.unravel_index(i, counts)
    # The last tile of an axis starts earlier if it would not fit.
    start = [
      jnp.minimum(j * t, n - t)
      for j, t, n in zip(tile_index, tile, x.shape, strict=True)
    ]
    # Bits are sliced, because XLA quiets signalling NaNs in slices of bfloat16.
    # The barrier makes the bits depend on i; otherwise XLA would copy x whole.
    whole, _ = jax.lax.optimization_barrier((x, i))
    part = function(jax.lax.dynamic_slice(_bits(whole), start, tile), start)
    for axis, (j, t) in enumerate(zip(tile_index, tile, strict=True)):
      if x.shape[axis] % t:
        index = jax.lax.broadcasted_iota(jnp.int32, part.shape, axis)
        part = jnp.where(start[axis] + index >= j * t, part, 0)
    return total + part

  zeros = jnp.zeros(tile, jnp.uint32)
  return jax.lax.fori_loop(0, math.prod(counts), add, zeros)


@jax.jit
def fingerprints(tree):
  """Returns the fingerprint of every array of a tree, as uint32 scalars.

  The arrays may be donated as soon as this function returns.
  """
  # A state has several arrays of each shape, and jit traces each shape once.
  return jax.tree.map(jax.jit(fingerprint), tree)
