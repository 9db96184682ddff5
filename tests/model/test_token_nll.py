"""The nll per token and its gradients equal the dense ones."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import (
  MESHES,
  SELECTED,
  B,
  D,
  L,
  T,
  V,
  array_sizes,
  assert_close,
  dense_nll,
  equations,
  set_mesh,
)
from loss_cases import example as weighted_example

from maskdiff.model.cross_entropy import cross_entropy
from maskdiff.model.token_nll import LOG_NORMALIZERS, token_nll
from maskdiff.planner.parts import part

SIZES = MESHES['fsdp2_sequence2_tensor2']


def clipped_ratio(nll):
  """Returns a loss as in ESPO: ratios of row likelihoods, some clipped."""
  ratio = jnp.exp(-nll.sum(axis=1) / L + 3.0)
  advantage = jnp.where(jnp.arange(B) % 2, 1.0, -0.5)
  clipped = jnp.clip(ratio, 0.8, 1.2)
  return -jnp.minimum(ratio * advantage, clipped * advantage).sum()


# Losses that are functions of nll, [B, L].
LOSSES = {
  'clipped_ratio': clipped_ratio,
  'preference': lambda nll: jax.nn.softplus(
    (nll[::2].sum(axis=1) - nll[1::2].sum(axis=1)) / 5
  ).sum(),
  'exp_of_difference': lambda nll: jnp.exp(
    nll[::2].mean(axis=1) - nll[1::2].mean(axis=1)
  ).sum(),
  'logsumexp': lambda nll: jax.nn.logsumexp(-nll.sum(axis=1) / 4),
  'per_token': lambda nll: jnp.sum(jnp.sin(jnp.arange(T)) * nll.reshape(-1)),
}


def example(selected='half', dtype=jnp.float32):
  """Returns hidden, head, targets and where."""
  hidden, head, targets, weights = weighted_example(selected, dtype)
  return hidden, head, targets, weights != 0


def dense(hidden, head, targets, where, exclude, chunk):
  del chunk
  return dense_nll(hidden, head, targets, where, exclude)


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 4))
def evaluate(function, loss, arrays, exclude=None, chunk=8):
  """Returns (loss, nll), (gradient by hidden, gradient by head)."""

  def with_nll(*args):
    nll = function(*args)
    return LOSSES[loss](nll), nll

  return jax.value_and_grad(with_nll, argnums=(0, 1), has_aux=True)(
    *arrays, exclude, chunk
  )


@pytest.mark.parametrize('loss', LOSSES)
def test_gradients_of_functions_of_row_sums_equal_the_dense_ones(loss):
  arrays = example('random')
  expected = evaluate(dense, loss, arrays)
  assert all(np.abs(g).max() > 1e-4 for g in expected[1])
  assert_close(evaluate(token_nll, loss, arrays), expected)


@pytest.mark.parametrize('selected', SELECTED)
def test_any_positions_can_be_selected(selected):
  arrays = example(selected)
  assert_close(
    evaluate(token_nll, 'logsumexp', arrays),
    evaluate(dense, 'logsumexp', arrays),
  )


@pytest.mark.parametrize('chunk', [1, 5, 1000])
def test_chunk_size_has_no_effect(chunk):
  arrays = example('random')
  assert_close(
    evaluate(token_nll, 'logsumexp', arrays, None, chunk),
    evaluate(dense, 'logsumexp', arrays),
  )


def test_nll_without_selected_tokens_is_exactly_zero():
  (_, nll), gradients = evaluate(token_nll, 'per_token', example('none'))
  for leaf in (nll, *gradients):
    np.testing.assert_array_equal(leaf, 0)


def test_excluded_token_has_no_probability_and_no_gradient():
  arrays = example()
  actual = evaluate(token_nll, 'logsumexp', arrays, V - 1)
  assert_close(actual, evaluate(dense, 'logsumexp', arrays, V - 1))
  (_, nll), (_, d_head) = actual
  assert not np.asarray(d_head[:, V - 1]).any()
  assert nll.sum() < evaluate(token_nll, 'logsumexp', arrays)[0][1].sum()


def test_nll_equals_that_of_cross_entropy_bit_for_bit():
  hidden, head, targets, where = example('random')
  weights = where.astype(jnp.float32)
  _, expected = cross_entropy(hidden, head, targets, weights, V - 1, 5)
  nll = token_nll(hidden, head, targets, where, V - 1, 5)
  np.testing.assert_array_equal(nll, expected)


@pytest.mark.parametrize('sizes', MESHES.values(), ids=MESHES)
def test_gradients_on_a_mesh_equal_the_dense_ones(sizes):
  """The chunk of 5 does not divide the tokens of any device."""
  arrays = example('random')
  with set_mesh(sizes):
    actual = evaluate(token_nll, 'clipped_ratio', arrays, V - 1, 5)
  assert_close(actual, evaluate(dense, 'clipped_ratio', arrays, V - 1))


@pytest.mark.parametrize('selected', ['none', 'one', 'one_row', 'all'])
def test_devices_may_have_different_numbers_of_selected_tokens(selected):
  arrays = example(selected)
  with set_mesh(SIZES):
    actual = evaluate(token_nll, 'clipped_ratio', arrays)
  assert_close(actual, evaluate(dense, 'clipped_ratio', arrays))


def test_tokens_that_are_not_selected_have_no_influence():
  """The chunk of 5 leaves a last chunk that is not full."""
  hidden, head, targets, where = example()
  poisoned = jnp.where(where[..., None], hidden, jnp.nan)
  cotangent = jnp.ones((B, L))
  nll, backward = jax.vjp(
    lambda *x: token_nll(*x, targets, where, None, 5), poisoned, head
  )
  expected, dense_backward = jax.vjp(
    lambda *x: dense_nll(*x, targets, where, None), hidden, head
  )
  assert_close(nll, expected)
  # The cotangent of a token that is not selected has no effect either.
  poisoned_cotangent = jnp.where(where, cotangent, jnp.nan)
  assert_close(backward(poisoned_cotangent), dense_backward(cotangent))


def test_backward_pass_skips_tokens_whose_cotangent_is_zero():
  """NaN states of row 3 have no influence if the loss does not depend on it."""
  hidden, head, targets, where = example('all')
  poisoned = hidden.at[3].set(jnp.nan)
  _, backward = jax.vjp(
    lambda *x: token_nll(*x, targets, where, None, 5), poisoned, head
  )
  _, dense_backward = jax.vjp(
    lambda *x: dense_nll(*x, targets, where, None), hidden, head
  )
  cotangent = jnp.ones((B, L)).at[3].set(0)
  d_hidden, d_head = backward(cotangent)
  assert_close((d_hidden, d_head), dense_backward(cotangent))
  np.testing.assert_array_equal(d_hidden[3], 0)


@pytest.mark.parametrize('sizes', [None, SIZES])
def test_bfloat16_states_give_a_float32_gradient_of_the_head(sizes):
  """The error is that of 8 bits of mantissa: no sum is in bfloat16."""
  hidden, head, targets, where = example('all', jnp.bfloat16)
  with set_mesh(sizes) if sizes else contextlib.nullcontext():
    (_, nll), (d_hidden, d_head) = evaluate(
      token_nll, 'per_token', (hidden, head, targets, where)
    )
  assert nll.dtype == d_head.dtype == jnp.float32
  assert d_hidden.dtype == jnp.bfloat16
  rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
  exact = evaluate(
    dense, 'per_token', (hidden.astype(jnp.float32), rounded, targets, where)
  )
  assert_close(nll, exact[0][1], 1e-5)
  assert_close((d_hidden, d_head), exact[1], 2**-8)


def test_other_numbers_of_selected_tokens_compile_nothing():
  function = jax.jit(
    jax.grad(lambda *args: LOSSES['logsumexp'](token_nll(*args, None, 8)))
  )
  for selected in ('half', 'one', 'all'):
    jax.block_until_ready(function(*example(selected)))
  assert function._cache_size() == 1


def test_gradient_by_all_arguments_is_allowed():
  """Integer and bool arguments have the cotangent type float0."""
  arrays = example()
  gradients = jax.grad(
    lambda *args: token_nll(*args, None, 8).sum(),
    argnums=(0, 1, 2, 3),
    allow_int=True,
  )(*arrays)
  assert gradients[2].dtype == gradients[3].dtype == jax.dtypes.float0
  assert_close(
    gradients[:2],
    jax.grad(lambda *args: dense_nll(*args, None).sum(), (0, 1))(*arrays),
  )


@pytest.mark.slow
def test_vmap_and_checkpoint_give_the_same_gradients():
  hidden, head, targets, where = example('random')
  heads = jnp.stack([head, -head])

  def loss(function, heads, hidden):
    of_head = lambda head: function(hidden, head, targets, where, None)
    return LOSSES['preference'](jax.vmap(of_head)(heads).sum(axis=0))

  chunked = jax.checkpoint(functools.partial(token_nll, chunk=8))
  assert_close(
    jax.value_and_grad(loss, (1, 2))(chunked, heads, hidden),
    jax.value_and_grad(loss, (1, 2))(dense_nll, heads, hidden),
  )


def gradients(function, loss, *args):
  return jax.grad(lambda *arrays: loss(function(*arrays, *args)), (0, 1))


@pytest.mark.parametrize('sizes', [None, SIZES])
def test_no_array_holds_all_logits(sizes):
  function = gradients(token_nll, LOSSES['clipped_ratio'], None, 4)
  with set_mesh(sizes) if sizes else contextlib.nullcontext():
    traced = jax.jit(function).trace(*example())
    text = traced.lower().compile().as_text()
  found = set(array_sizes(traced.jaxpr.jaxpr))
  assert 4 * V in found  # the search includes the loop
  assert max(found) <= max(T * D, D * V) < T * V
  compiled = {
    math.prod(map(int, shape.split(',')))
    for shape in re.findall(r'\b(?:f32|bf16)\[([\d,]+)\]', text)
  }
  assert 4 * V in compiled
  assert max(compiled) < T * V


def products(function, *arrays):
  """Returns the number of matrix products of a function."""
  jaxpr = jax.make_jaxpr(function)(*arrays).jaxpr
  return sum(e.primitive.name == 'dot_general' for e in equations(jaxpr))


def test_four_products_with_the_head_where_cross_entropy_has_three():
  arrays = example()
  mine = gradients(token_nll, LOSSES['logsumexp'], None, 8)
  assert products(mine, *arrays) == 4
  other = gradients(cross_entropy, lambda outputs: outputs[0], None, 8)
  assert products(other, *weighted_example()) == 3


def test_policy_that_saves_log_normalizers_repeats_no_product():
  """By default `jax.checkpoint` repeats the forward loop."""
  save = jax.checkpoint_policies.save_only_these_names(LOG_NORMALIZERS)
  for policy, count in ((None, 5), (save, 4)):
    function = jax.checkpoint(
      functools.partial(token_nll, exclude=None, chunk=8), policy=policy
    )
    value_and_gradients = jax.value_and_grad(
      lambda *arrays, f=function: f(*arrays).sum(), (0, 1)
    )
    compiled = jax.jit(value_and_gradients).lower(*example()).compile()
    assert len(re.findall(r' = \S+ dot\(', compiled.as_text())) == count


@pytest.mark.parametrize('sizes', [None, SIZES])
def test_every_matrix_product_has_a_part(sizes):
  function = gradients(token_nll, jnp.sum, None, 8)
  with set_mesh(sizes) if sizes else contextlib.nullcontext():
    text = jax.jit(function).lower(*example()).as_text(debug_info=True)
  names = [
    name
    for name in set(re.findall(r'loc\("([^"]+)"', text))
    if name.endswith('dot_general')
  ]
  assert {part(name) for name in names} == {
    'loss: logits',
    'loss: gradient of hidden states',
    'loss: gradient of the head',
  }
