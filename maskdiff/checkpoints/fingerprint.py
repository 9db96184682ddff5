"""Fingerprints of arrays that do not depend on where their parts lie.

Storage may flip a bit, and what reads a checkpoint need not notice. A
fingerprint is taken of the arrays on the devices before they are saved, and
again after they are restored, on whatever mesh.
"""

import math

import jax
import jax.numpy as jnp

_UINT = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def fingerprint(x, first=0):
  """A uint32 of all bits of an array, in their places.

  The elements, mixed with their positions, are added up modulo 2^32: sums of
  integers are the same in any order. Since the mixing is one to one, a change
  of any single element of up to 4 bytes changes the sum; other changes go
  unnoticed once in 2^32 times.

  Args:
    x: array of any shape, of a dtype with 1, 2, 4 or 8 bytes.
    first: if x is a part of an array, the place of its first row there. The
      parts along the first axis add up to the whole, modulo 2^32.

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
  """The bits of a part of an array, mixed with their places in the whole.

  Args:
    bits: of the part.
    start: of each axis, the index in the whole at which the part begins.

  Returns:
    uint32 of the shape of the bits.
  """
  position = jnp.full(bits.shape, bits.ndim, jnp.uint32)
  for axis, begin in enumerate(start):
    # Axis by axis: there are arrays of more than 2^32 elements.
    index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    index += jnp.asarray(begin, jnp.uint32)
    position = _mix(position * jnp.uint32(0x9E3779B1) + index)
  return _mix(bits.astype(jnp.uint32) ^ position)


def _mix(x):
  """A bijection of uint32 that leaves no bit as it was (MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _sum(x, first):
  bits = _bits(x)
  start = (first, *[0] * bits.ndim)[: bits.ndim]
  return jnp.sum(_mixed(bits, start), dtype=jnp.uint32)


def _sum_on_cpu(x, first):
  """Tile by tile: XLA vectorizes sums of two arrays there, but no reduction.

  A tile of a megabyte stays in the caches and is enough for some cores. Of a
  sharded array every device makes the tiles of the whole, so that this is for
  one device.
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
  """Cuts an array into tiles and adds them up.

  Args:
    x: array.
    size: int, elements of a tile at most.
    function: from (bits of a tile, where it begins) to as many uint32s.

  Returns:
    uint32s of the shape of a tile.
  """
  tile = []
  for n in reversed(x.shape):  # the last axes whole, of one more a part
    tile.insert(0, min(n, max(size // math.prod(tile), 1)))
  counts = [-(-n // t) for n, t in zip(x.shape, tile, strict=True)]

  def add(i, total):
    at = jnp.unravel_index(i, counts)
    # The last tile of an axis begins earlier where it would not fit.
    start = [
      jnp.minimum(j * t, n - t)
      for j, t, n in zip(at, tile, x.shape, strict=True)
    ]
    # The bits are sliced, since XLA makes signalling NaNs of bfloat16 quiet in
    # slices; and they depend on the step, since it would copy them all once.
    whole, _ = jax.lax.optimization_barrier((x, i))
    part = function(jax.lax.dynamic_slice(_bits(whole), start, tile), start)
    for axis, (j, t) in enumerate(zip(at, tile, strict=True)):
      if x.shape[axis] % t:
        index = jax.lax.broadcasted_iota(jnp.int32, part.shape, axis)
        part = jnp.where(start[axis] + index >= j * t, part, 0)
    return total + part

  zeros = jnp.zeros(tile, jnp.uint32)
  return jax.lax.fori_loop(0, math.prod(counts), add, zeros)


@jax.jit
def fingerprints(tree):
  """The fingerprint of every array of a tree, a tree of uint32 scalars.

  The arrays are free to be donated as soon as this returns.
  """
  return jax.tree.map(fingerprint, tree)
