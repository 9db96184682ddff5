"""Products of activations and weights, in the form that a CPU computes fast.

XLA's compiler for CPUs fuses the transposition of an operand with the
elementwise code before it, which then is not vectorized, and reads a transposed
matrix with a slower kernel. Gradients by weights, which contract tokens, need
both. Here, products in float32 on one CPU device are of matrices, and operands
are transposed on their own. Others get the einsum as it is.

docs/speed.md has the gains. There, derivatives are for reverse mode only.
"""

import jax
import jax.numpy as jnp

from maskdiff.distributed.mesh import device_kind, on_one_cpu

TOKENS = 'bl'  # letters of the dimensions of tokens


def product(equation, x, w):
  """Returns the einsum of activations and a matrix of a layer.

  Args:
    equation: such as 'bld,dhk->bhlk'. The letters b and l are those of tokens.
    x: activations.
    w: the matrix.
  """
  if x.dtype != jnp.float32 or not on_one_cpu():
    return jnp.einsum(equation, x, w)
  operands, result = equation.split('->')
  of_x, of_w = operands.split(',')
  inner = ''.join(a for a in of_x if a in of_w)
  outer = ''.join(a for a in of_w if a not in inner)
  sizes = dict(zip(of_x + of_w, x.shape + w.shape, strict=True))
  rows = transposed(x, of_x, TOKENS + inner)
  rows = rows.reshape(sizes['b'] * sizes['l'], -1)
  matrix = w.transpose([of_w.index(a) for a in inner + outer])
  y = _dot(rows, matrix.reshape(rows.shape[1], -1))
  y = y.reshape([sizes[a] for a in TOKENS + outer])
  return transposed(y, TOKENS + outer, result)


def transposed(x, letters, order):
  """Returns x with its dimensions in another order, computed on its own."""
  x = jax.lax.optimization_barrier(x)
  return x.transpose([letters.index(a) for a in order])


def rows_first(x):
  """Returns the transpose of tokens x features, as an operand of a product."""
  x = x.T
  # Without the barrier a slower kernel would read x in place.
  return jax.lax.optimization_barrier(x) if device_kind() == 'cpu' else x


@jax.custom_vjp
def _dot(x, w):
  """Returns x w of [T, I] and [I, O]."""
  return x @ w


def _dot_forward(x, w):
  return x @ w, (x, w)


def _dot_backward(operands, gradient):
  x, w = operands
  gradient = jax.lax.optimization_barrier(gradient)
  return gradient @ w.T, rows_first(x) @ gradient


_dot.defvjp(_dot_forward, _dot_backward)
