"""Products of activations and weights equal the einsum, on one CPU and many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import products

SIZES = dict(b=2, l=5, d=6, f=8, h=3, g=2, k=4)
EQUATIONS = [
  'bld,dhk->bhlk',
  'bld,dgk->bglk',
  'bhlk,hkd->bld',
  'bld,df->blf',
  'blf,fd->bld',
]


def arrays(equation):
  """Returns activations, matrix and a gradient by the result."""
  random = np.random.default_rng(0)
  draw = lambda letters: random.normal(size=[SIZES[a] for a in letters])
  operands, result = equation.split('->')
  return [jnp.float32(draw(s)) for s in (*operands.split(','), result)]


@pytest.mark.parametrize('equation', EQUATIONS)
def test_values_and_gradients_are_those_of_the_einsum(equation):
  x, w, gradient = arrays(equation)
  found, of_found = jax.vjp(lambda x, w: products.product(equation, x, w), x, w)
  expected, of_expected = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  for a, b in zip(of_found(gradient), of_expected(gradient), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_matrices_are_of_tokens_on_one_cpu_only():
  x, w, _ = arrays(EQUATIONS[0])
  product = lambda x, w: products.product(EQUATIONS[0], x, w)
  assert 'optimization_barrier' in str(jax.make_jaxpr(product)(x, w))
  with jax.set_mesh(mesh_lib.make_mesh()):
    assert 'optimization_barrier' not in str(jax.make_jaxpr(product)(x, w))


def test_rows_are_a_batch_under_vmap():
  x, w, _ = arrays(EQUATIONS[3])
  product = lambda w: products.product(EQUATIONS[3], x, w)
  found = jax.vmap(product)(jnp.stack([w, 2 * w]))
  np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-5)
