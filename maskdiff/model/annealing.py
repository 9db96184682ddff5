"""Attention that is annealed from causal to bidirectional.

DiffuLLaMA (arXiv 2410.17891) turns an autoregressive network into a masked
diffusion network. A pair of a query and a later key is open with a probability
that grows during the training. Each training step draws one mask, which all
rows, layers and heads share.

A kernel holds no [L, L] mask. It has one number per query, and a hash of the
number and the position of the key decides whether the pair is open. The 32 bits
of a number:

  position   16 bits, of the query
  threshold   8 bits; about threshold / LEVELS of the later keys are open
  salt        8 bits, drawn at every step

A query with threshold 0 sees no later key, and one with threshold LEVELS sees
all of them.
"""

import jax
import jax.numpy as jnp

from maskdiff.config.objective import MAX_ANNEALED_LENGTH

LEVELS = 255


def draw(key, length, share):
  """Draws the numbers of the queries of a training step.

  The threshold of a query is share x LEVELS, rounded up or down at random, so
  that the expected share of open pairs is exact.

  Args:
    key: PRNG key.
    length: L, at most MAX_ANNEALED_LENGTH.
    share: float32 scalar in [0, 1], expected share of open pairs.

  Returns:
    [L] int32.
  """
  salt_key, threshold_key = jax.random.split(key)
  salt = jax.random.randint(salt_key, (length,), 0, 256, jnp.int32)
  u = jax.random.uniform(threshold_key, (length,))
  # Rounding may give 255 + u = 256.
  threshold = jnp.minimum(jnp.floor(share * LEVELS + u), LEVELS)
  position = jnp.arange(length, dtype=jnp.int32)
  return (salt << 24) | (threshold.astype(jnp.int32) << 16) | position


def position(number):
  """Returns the positions of queries with these numbers."""
  return number & (MAX_ANNEALED_LENGTH - 1)


def is_open(number, key):
  """Returns whether a hash opens the pairs of queries and later keys.

  Args:
    number: int32 array of JAX or NumPy, numbers of queries.
    key: int32 array that broadcasts with `number`, positions of keys.

  Returns:
    bool array. It has no meaning for keys that are not later than the query.
  """
  # The mixing function is lowbias32 (Chris Wellons, Hash Prospector). Products
  # wrap around. `>>` keeps the sign, which `&` removes.
  x = number + key * 0x1E3779B1
  x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
  x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
  uniform = (x >> 16) & 0xFFFF
  # threshold / LEVELS against uniform / 2^16
  return uniform * LEVELS < (number & 0xFF0000)
