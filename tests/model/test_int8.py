"""Products in 8-bit integers, against their definition in NumPy."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from test_products import EQUATIONS, SIZES

from maskdiff.model import blocks, int8, masks, products, transformer
from maskdiff.model.lora import LoraConfig

MODEL = tiny.model(quantization='int8')
F = np.float32


def letters(equation):
  operands, result = equation.split('->')
  return (*operands.split(','), result)


def arrays(equation, dtype):
  """Returns activations, matrix and a gradient, of very different tokens."""
  random = np.random.default_rng(0)
  draw = lambda of: random.normal(size=[SIZES[a] for a in of]).astype(F)
  x, w, g = map(draw, letters(equation))
  x[0] *= 1e3
  g[1] *= 1e-6
  return x.astype(dtype), w, g.astype(dtype)


def reference_quantize(x, of, inner):
  """Returns integers, int64, and scales that broadcast with them."""
  x = x.astype(F)
  axes = tuple(of.index(a) for a in inner)
  largest = np.abs(x).max(axes, keepdims=True)
  integers = np.rint(x * (F(127) / largest)).astype(np.int64)
  assert np.abs(integers).max() == 127
  return integers, largest * F(1 / 127)


def times(y, of_y, scale, of):
  """Returns y times scales whose axes have other letters and an order."""
  order = [of.index(a) for a in of_y if a in of]
  rest = [i for i in range(len(of)) if i not in order]
  assert all(scale.shape[i] == 1 for i in rest)
  scale = scale.transpose(order + rest).squeeze(
    tuple(range(len(order), len(of)))
  )
  missing = [i for i, a in enumerate(of_y) if a not in of]
  return (y * np.expand_dims(scale, missing)).astype(F)


def reference_forward(equation, x, w):
  of_x, of_w, result = letters(equation)
  inner = set(of_x) & set(of_w)
  x_int, x_scale = reference_quantize(x, of_x, inner)
  w_int, w_scale = reference_quantize(w, of_w, inner)
  y = np.einsum(equation, x_int, w_int).astype(F)
  y = times(y, result, x_scale, of_x)
  return times(y, result, w_scale, of_w).astype(x.dtype)


def reference_d_x(equation, w, g):
  of_x, of_w, result = letters(equation)
  inner = set(of_x) & set(of_w)
  w_int, w_scale = reference_quantize(w, of_w, inner)
  scaled = times(g.astype(F), result, w_scale, of_w)
  g_int, g_scale = reference_quantize(scaled, result, set(result) & set(of_w))
  d_x = np.einsum(f'{result},{of_w}->{of_x}', g_int, w_int).astype(F)
  return times(d_x, of_x, g_scale, result).astype(g.dtype)


def product(equation, x, w):
  of_x, of_w, _ = letters(equation)
  axes = tuple(i for i, a in enumerate(of_w) if a in of_x)
  return int8.product(equation, x, int8.quantize_matrix(w, axes, x.dtype))


@pytest.mark.parametrize(
  'dtype', [F, ml_dtypes.bfloat16], ids=lambda d: d.__name__
)
@pytest.mark.parametrize('equation', EQUATIONS)
def test_values_and_gradients_are_those_of_the_definition(equation, dtype):
  x, w, g = arrays(equation, dtype)
  y, backward = jax.vjp(functools.partial(product, equation), x, w)
  np.testing.assert_array_equal(y, reference_forward(equation, x, w))
  d_x, d_w = backward(g)
  np.testing.assert_array_equal(d_x, reference_d_x(equation, w, g))
  # That of the product without quantization.
  plain = lambda w: products.product(equation, x, w.astype(dtype))
  np.testing.assert_array_equal(d_w, jax.vjp(plain, jnp.asarray(w))[1](g)[0])
  assert (y.dtype, d_x.dtype, d_w.dtype) == (dtype, dtype, F)


def test_the_largest_error_is_half_a_step_per_operand():
  """The bound on the error of a sum of n products of rounded operands."""
  random = np.random.default_rng(0)
  x = random.normal(size=(1, 64, 256)).astype(F)
  w = random.normal(size=(256, 32)).astype(F)
  error = np.abs(product('bld,df->blf', x, w) - (x.astype(float) @ w))
  half = lambda a, axis: np.abs(a).max(axis, keepdims=True) / 254
  bound = half(x, 2) * np.abs(w).sum(0) + np.abs(x).sum(
    2, keepdims=True
  ) * half(w, 0)
  bound += 256 * half(x, 2) * half(w, 0)
  assert (error <= bound * (1 + 1e-5)).all()
  assert error.max() > 0.01 * bound.max()


def test_zeros_stay_zeros_and_nan_spreads():
  w = jnp.zeros((6, 8))
  x = jnp.zeros((1, 3, 6)).at[0, 1, 2].set(1.0).at[0, 2, 4].set(jnp.nan)
  y = product('bld,df->blf', x, w)
  np.testing.assert_array_equal(y[0, :2], 0)
  assert jnp.isnan(y[0, 2]).all()


def test_only_matrices_of_layers_are_quantized():
  model = tiny.model(lora=LoraConfig(rank=2), qk_norm=True, qkv_bias=True)
  network = transformer.bind(model, tiny_params(model))
  weights = blocks.stacked(network.blocks, 'bfloat16', 'int8')
  quantized = {n for n, w in weights.items() if isinstance(w, int8.Int8Matrix)}
  assert quantized == {'q', 'k', 'v', 'o', 'gate', 'up', 'down'}
  assert weights['o'].integers.dtype == jnp.int8
  assert weights['o'].scale.shape == (2, 16)
  assert weights['q'].scale.shape == (2, 2, 8)
  plain = blocks.stacked(network.blocks, 'bfloat16')
  assert not any(isinstance(w, int8.Int8Matrix) for w in plain.values())


def tiny_params(model):
  return transformer.init(model, jax.random.key(0))


def hidden(model, params):
  tokens = jnp.arange(24).reshape(2, 12) % 7
  labels = masks.bidirectional(jnp.ones(tokens.shape, bool))
  return transformer.bind(model, params)(tokens, labels)


def loss(model, params):
  target = jnp.arange(16) % 3 - 1.0
  return jnp.mean((hidden(model, params) - target) ** 2)


def test_gradients_of_a_network_are_near_those_without_quantization():
  params = tiny.strong_params()
  found = jax.grad(functools.partial(loss, MODEL))(params)
  expected = jax.grad(functools.partial(loss, tiny.MODEL))(params)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    if np.linalg.norm(b):
      cosine = np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
      assert 0.98 < cosine < 1 - 1e-9


@pytest.mark.parametrize('remat', ['none', 'minimal', 'full'])
def test_remat_changes_no_gradient(remat):
  model = tiny.model(quantization='int8', remat=remat)
  params = tiny.strong_params()
  found = jax.jit(jax.grad(functools.partial(loss, model)))(params)
  expected = jax.jit(jax.grad(functools.partial(loss, MODEL)))(params)
  for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(b)


def test_gradient_descent_lowers_the_loss():
  @jax.jit
  def step(params):
    value, gradient = jax.value_and_grad(functools.partial(loss, MODEL))(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), value

  params, values = tiny_params(MODEL), []
  for _ in range(8):
    params, value = step(params)
    values.append(value)
  assert all(b < a for a, b in zip(values, values[1:], strict=False))


def test_without_quantization_no_integers_of_8_bits():
  text = lambda model: (
    jax.jit(functools.partial(hidden, model))
    .lower(tiny.strong_params())
    .as_text()
  )
  assert 'xi8>' in text(MODEL)
  assert 'xi8>' not in text(tiny.MODEL)
