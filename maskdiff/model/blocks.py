"""Declarations of weights: shape, logical axes and initial scale.

transformer.py lists the letters of the shapes (N, D, H, ...).
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from maskdiff.model import int8, lora


def weight(rngs, shape, axes, std):
  """Declares a weight, initialized to std times a normal cut to [-3, 3]."""
  value = std * jax.random.truncated_normal(rngs.params(), -3, 3, shape)
  return nnx.Param(value, axes=axes)


def scale(shape, axes):
  """Declares the gain of an RMS norm, initialized to 1."""
  return nnx.Param(jnp.ones(shape), axes=axes)


def zeros(shape, axes):
  """Declares a bias, initialized to 0."""
  return nnx.Param(jnp.zeros(shape), axes=axes)


class Blocks(nnx.Module):
  """The weights of all N layers, stacked on a leading axis."""

  def __init__(self, c, rngs):
    N, D, H, G = c.layers, c.embed, c.heads, c.kv_heads
    K, F = c.head_dim, c.mlp
    into = D**-0.5
    out = 0.0 if c.zero_outputs else (2 * N) ** -0.5
    vector = ('layers', 'embed')
    kv = ('layers', 'embed', 'kv_heads', 'head_dim')
    self.norm1 = scale((N, D), vector)
    self.q = weight(
      rngs, (N, D, H, K), ('layers', 'embed', 'heads', 'head_dim'), into
    )
    self.k = weight(rngs, (N, D, G, K), kv, into)
    self.v = weight(rngs, (N, D, G, K), kv, into)
    if c.qkv_bias:  # flat, like vectors: neither sharded nor decayed
      self.q_bias = zeros((N, H * K), ('layers', 'heads'))
      self.k_bias = zeros((N, G * K), ('layers', 'kv_heads'))
      self.v_bias = zeros((N, G * K), ('layers', 'kv_heads'))
    if c.qk_norm:
      self.q_norm = scale((N, K), ('layers', 'head_dim'))
      self.k_norm = scale((N, K), ('layers', 'head_dim'))
    self.o = weight(
      rngs,
      (N, H, K, D),
      ('layers', 'heads', 'head_dim', 'embed'),
      out * (H * K) ** -0.5,
    )
    self.norm2 = scale((N, D), vector)
    self.gate = weight(rngs, (N, D, F), ('layers', 'embed', 'mlp'), into)
    self.up = weight(rngs, (N, D, F), ('layers', 'embed', 'mlp'), into)
    self.down = weight(
      rngs, (N, F, D), ('layers', 'mlp', 'embed'), out * F**-0.5
    )
    for matrix in c.lora.matrices:
      self._add_adapters(matrix, c.lora.rank, rngs)

  def _add_adapters(self, matrix, rank, rngs):
    """Declares the adapters of a matrix; their product is 0."""
    of = getattr(self, matrix)
    layers, *sizes = of[...].shape
    inputs, outputs = lora.split_axes(matrix, sizes)
    of_inputs, of_outputs = lora.split_axes(matrix, of.axes[1:])
    a = weight(
      rngs,
      (layers, *inputs, rank),
      ('layers', *of_inputs, 'rank'),
      (3 * math.prod(inputs)) ** -0.5,  # as PEFT, which draws uniformly
    )
    b = zeros((layers, rank, *outputs), ('layers', 'rank', *of_outputs))
    setattr(self, f'{matrix}_a', a)
    setattr(self, f'{matrix}_b', b)


def stacked(blocks, dtype, quantization='none'):
  """Returns the weights of layers as a dict, with matrices in a dtype.

  Args:
    blocks: Blocks.
    dtype: compute dtype. Norms and biases stay in float32.
    quantization: with 'int8', the matrices are Int8Matrix; adapters are not.
  """

  def one(name, w):
    if quantization == 'int8' and name in lora.TARGETS.values():
      inputs, _ = lora.split_axes(name, range(1, w.ndim))
      return int8.quantize_matrix(w, inputs, dtype)
    return w.astype(dtype) if w.ndim > 2 else w

  weights = nnx.to_pure_dict(nnx.state(blocks))
  return {name: one(name, w) for name, w in weights.items()}
