"""Products of the layers in 8-bit integers, of dynamically quantized operands.

An operand becomes integers from -127 to 127 and float32 scales, one for each
slice along the axes that the product contracts: for each token of activations
and of gradients, and for each output of a matrix. The largest magnitude of a
slice becomes 127. Products of the integers are summed exactly, in int32.

The forward product and the gradient by the activations are such products. The
latter takes the matrix of the forward product: its scales are multiplied into
the gradient before that is quantized. The gradient by the matrix has the
operands and the dtype of training without quantization, because it sums over
tokens, whose gradients differ in magnitude: a token masked at time t has the
weight 1/t. This is SwitchBack (arXiv 2304.13013) with a scale for each output
of a matrix instead of one for the matrix. Rounding has the derivative 1, and
is to nearest everywhere.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.distributed.mesh import shard
from maskdiff.model import products

SMALLEST = 1e-30  # least magnitude that becomes 127, for slices of zeros


class Int8Matrix(NamedTuple):
  """A matrix of a layer, or stacked matrices of all layers.

  Attributes:
    integers: int8, in the shape of the matrix.
    scale: float32, in the shape of the outputs.
    matrix: the matrix in the compute dtype. Products do not read it; it
      receives the gradient.
  """

  integers: jax.Array
  scale: jax.Array
  matrix: jax.Array


def quantize(x, axes):
  """Returns integers, int8, and scales, float32 without these axes."""
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
  largest = jnp.maximum(largest, SMALLEST)
  integers = jnp.round(x * (127 / largest)).astype(jnp.int8)
  return integers, jnp.squeeze(largest * np.float32(1 / 127), axes)


def quantize_matrix(w, axes, dtype):
  """Returns the Int8Matrix of a float32 matrix.

  Args:
    w: the matrix, or stacked matrices.
    axes: tuple, its axes of inputs.
    dtype: compute dtype.
  """
  integers, scale = quantize(jax.lax.stop_gradient(w), axes)
  # Gathered once, not by each layer.
  scale = shard(scale, *[None] * scale.ndim)
  return Int8Matrix(integers, scale, w.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(equation, x, w):
  """Returns the einsum of activations and an Int8Matrix, in the dtype of x.

  Args:
    equation: as for products.product.
    x: activations.
    w: Int8Matrix.
  """
  operands, result = equation.split('->')
  y = _rows_quantized(equation, x, w.integers)
  return (y * _aligned(w.scale, operands.split(',')[1], result)).astype(x.dtype)


def _rows_quantized(equation, x, integers):
  """Returns the einsum of quantized x and integers, in float32."""
  operands, result = equation.split('->')
  of_x, of_w = operands.split(',')
  axes = tuple(i for i, a in enumerate(of_x) if a in of_w)
  of_scale = [a for a in of_x if a not in of_w]
  x, scale = quantize(x, axes)
  y = jnp.einsum(equation, x, integers, preferred_element_type=jnp.int32)
  return y.astype(jnp.float32) * _aligned(scale, of_scale, result)


def _aligned(scale, letters, result):
  """Returns scales with an axis for each letter of a result, in its order."""
  missing = [i for i, a in enumerate(result) if a not in letters]
  return jnp.expand_dims(scale, missing)


def _forward(equation, x, w):
  # The matrix is left out, so that nothing gathers or stores it.
  return product(equation, x, w), (x, w.integers, w.scale)


def _backward(equation, residuals, gradient):
  x, integers, scale = residuals
  operands, result = equation.split('->')
  of_x, of_w = operands.split(',')
  scaled = gradient.astype(jnp.float32) * _aligned(scale, of_w, result)
  d_x = _rows_quantized(f'{result},{of_w}->{of_x}', scaled, integers)
  of_matrix = functools.partial(products.product, equation, x)
  (d_matrix,) = jax.vjp(of_matrix, jnp.zeros_like(integers, x.dtype))[1](
    gradient
  )
  return d_x.astype(x.dtype), Int8Matrix(None, None, d_matrix)


product.defvjp(_forward, _backward)
