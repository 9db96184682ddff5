"""Layers without weights: RMS norm, rotary positions, embedding lookup."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maskdiff.distributed.mesh import BATCH_AXES, shard


@jax.named_scope('network(normalisation)')
def rms_norm(x, gain, eps):
  """x / rms(x) * gain along the last axis, computed in float32, like x."""
  f = x.astype(jnp.float32)
  f *= jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
  return (f * gain).astype(x.dtype)


@jax.named_scope('network(rotary positions)')
def rope(pos, head_dim, theta, scaling=()):
  """Cosines and sines of rotary position embedding (arXiv 2104.09864).

  Args:
    pos: [B, L] int32.
    head_dim: K.
    theta: base of the wavelengths.
    scaling: TransformerConfig.rope_scaling.

  Returns:
    A pair of [B, 1, L, K] float32: the cosines, twice, and the sines, negative
    in the first half.
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
  if scaling:
    frequency = slow_down(frequency, *scaling)
  angle = pos[:, None, :, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  join = functools.partial(jnp.concatenate, axis=-1)
  return join([cos, cos]), join([-sin, sin])


def slow_down(frequency, factor, low, high, length):
  """Llama 3.1's frequencies for contexts longer than the first training.

  Those that turn less than `low` times over the length trained on before are
  divided by the factor, those that turn more than `high` times stay, and in
  between the two are mixed. No paper has the rule, only the published code.

  Args:
    frequency: [K/2], radians per position.
    factor: like the rest, of TransformerConfig.rope_scaling.
    low: turns.
    high: turns.
    length: tokens.
  """
  turns = length * frequency / (2 * jnp.pi)
  keep = jnp.clip((turns - low) / (high - low), 0, 1)
  return frequency * (keep + (1 - keep) / factor)


@jax.custom_vjp
def rotate(x, rotation):
  """Rotates pairs (i, i + K/2) of the last axis in float32; x is [B, H, L, K].

  This is the rotate-half convention of Llama and LLaDA. The halves are swapped
  by a product with a permutation, exact since every sum has one term, because
  K/2 is half of a TPU's lanes and slices of it are slow. The gradient is the
  inverse rotation; left to autodiff that product would be one of float32.
  """
  cos, sin = rotation
  half = x.shape[-1] // 2
  swap = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=1)
  other = jnp.einsum(
    'bhlk,kj->bhlj',
    x,
    swap,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


def _rotate_forward(x, rotation):
  return rotate(x, rotation), rotation


def _rotate_backward(rotation, d_x):
  cos, sin = rotation
  return rotate(d_x, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table, tokens, dtype):
  """Rows of the embedding table in `dtype`, [B, L, D].

  About half of the tokens of a batch are the mask, so the gradient of its row
  is a sum over thousands of positions: it is added up in float32 whatever the
  compute dtype.

  Args:
    table: [V, D] float32.
    tokens: [B, L] int32.
    dtype: of the result.
  """
  return shard(table.astype(dtype), None, None)[tokens]


def _lookup_forward(table, tokens, dtype):
  # The residual only tells the backward pass the size of the table.
  return lookup(table, tokens, dtype), (tokens, jnp.zeros_like(table[:, :0]))


def _lookup_backward(dtype, residuals, d_rows):
  del dtype
  tokens, table = residuals
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape['tensor']
  size = table.shape[0] // parts  # vocabulary rows of this part

  def add_up(tokens, d_rows, part):
    local = tokens - part * size
    local = jnp.where(local < 0, size, local)  # out of range: dropped
    zeros = jnp.zeros((size, d_rows.shape[-1]), jnp.float32)
    return zeros.at[local].add(d_rows.astype(jnp.float32), mode='drop')

  def on_device(tokens, d_rows):
    d_table = add_up(tokens, d_rows, jax.lax.axis_index('tensor'))
    d_table = jax.lax.psum_scatter(
      d_table, 'fsdp', scatter_dimension=1, tiled=True
    )
    # Reduced in every microbatch, as in cross_entropy.py.
    d_table = jax.lax.optimization_barrier(d_table)
    return jax.lax.psum(d_table, ('replica', 'sequence'))

  if mesh.empty:
    return add_up(tokens, d_rows, 0), None
  rows = P(BATCH_AXES, 'sequence')
  d_table = jax.shard_map(
    on_device,
    in_specs=(rows, P(BATCH_AXES, 'sequence', None)),
    out_specs=P('tensor', 'fsdp'),
    check_vma=False,  # the sum over `tensor` is by construction, not by psum
  )(tokens, d_rows)
  return d_table, None


lookup.defvjp(_lookup_forward, _lookup_backward)
