"""The chunked cross entropy of masked positions equals the dense one."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_cases import (
  MESHES,
  SELECTED,
  D,
  T,
  V,
  array_sizes,
  assert_close,
  dense_nll,
  example,
  set_mesh,
)

from maskdiff.model.cross_entropy import cross_entropy


def dense(hidden, head, targets, weights, exclude, chunk):
  """Cross entropy with all logits at once, differentiated by JAX."""
  del chunk
  nll = dense_nll(hidden, head, targets, weights != 0, exclude)
  return jnp.sum(weights * nll), nll


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def evaluate(function, arrays, exclude=None, chunk=8):
  """Returns (loss, nll), (gradient by hidden, gradient by head)."""
  return jax.value_and_grad(function, argnums=(0, 1), has_aux=True)(
    *arrays, exclude, chunk
  )


CONFIDENCE = 2.5


def dense_with_confidence(hidden, head, targets, weights, exclude, chunk):
  """As `dense`, plus the entropy of the correct predictions."""
  loss, nll = dense(hidden, head, targets, weights, exclude, chunk)
  kept = jnp.delete(head, exclude, axis=1, assume_unique_indices=True)
  logits = jnp.einsum('bld,dv->blv', hidden, kept)
  entropy = jax.scipy.special.entr(jax.nn.softmax(logits)).sum(axis=-1)
  right = logits.argmax(axis=-1) == targets
  return loss + CONFIDENCE * jnp.sum(weights * right * entropy), nll


def with_confidence(*args):
  return cross_entropy(*args, CONFIDENCE)


def on_mesh(sizes, arrays, *args):
  """Evaluates the chunked loss on a mesh of these sizes."""
  with set_mesh(sizes):
    return evaluate(cross_entropy, arrays, *args)


@pytest.mark.parametrize('weights', SELECTED)
def test_loss_nll_and_gradients_equal_the_dense_ones(weights):
  arrays = example(weights)
  assert_close(evaluate(cross_entropy, arrays), evaluate(dense, arrays))


@pytest.mark.parametrize('chunk', [1, 5, 16, T, 1000])
def test_loss_does_not_depend_on_the_chunk_size(chunk):
  """The chunk divides the tokens, the weighted tokens or neither."""
  arrays = example('random')
  assert_close(
    evaluate(cross_entropy, arrays, None, chunk), evaluate(dense, arrays)
  )


def test_excluded_token_has_no_probability_and_no_gradient():
  arrays = example()
  actual = evaluate(cross_entropy, arrays, V - 1)
  assert_close(actual, evaluate(dense, arrays, V - 1))
  (loss, _), (_, d_head) = actual
  assert not np.asarray(d_head[:, V - 1]).any()
  assert loss < evaluate(cross_entropy, arrays)[0][0]


@pytest.mark.parametrize('exclude', [None, V - 1])
@pytest.mark.parametrize('sizes', MESHES.values(), ids=MESHES)
def test_loss_on_a_mesh_equals_the_dense_one(sizes, exclude):
  """The chunk of 5 does not divide the tokens of any device."""
  arrays = example('random')
  expected = evaluate(dense, arrays, exclude)
  assert_close(on_mesh(sizes, arrays, exclude, 5), expected)


@pytest.mark.parametrize('weights', ['none', 'one', 'one_row', 'all'])
def test_devices_may_have_different_shares_of_the_loss(weights):
  arrays = example(weights)
  actual = on_mesh(dict(fsdp=2, sequence=2, tensor=2), arrays)
  assert_close(actual, evaluate(dense, arrays))


def test_devices_need_not_divide_the_length():
  """Windows of drafts have any number of tokens."""
  hidden, head, *tokens = example('random')
  arrays = hidden[:, :-1], head, *(x[:, :-1] for x in tokens)
  actual = on_mesh(dict(fsdp=4, sequence=2), arrays)
  assert_close(actual, evaluate(dense, arrays))


def test_loss_without_weights_is_exactly_zero():
  for leaf in jax.tree.leaves(evaluate(cross_entropy, example('none'))):
    np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize('chunk', [8, 5])
def test_positions_without_weight_have_no_influence(chunk):
  """The chunk of 5 leaves a last chunk that is not full."""
  hidden, head, targets, weights = example()
  poisoned = jnp.where((weights == 0)[..., None], jnp.nan, hidden)
  assert_close(
    evaluate(cross_entropy, (poisoned, head, targets, weights), None, chunk),
    evaluate(dense, (hidden, head, targets, weights)),
  )


@pytest.mark.parametrize('sizes', [None, MESHES['fsdp2_sequence2_tensor2']])
def test_entropy_of_correct_predictions_equals_the_dense_one(sizes):
  """The excluded token, the last, has no part in the entropy."""
  hidden, head, targets, weights = example('random')
  logits = jnp.einsum('bld,dv->blv', hidden, head).at[..., V - 1].set(-jnp.inf)
  # A third of the predictions is right.
  right = np.random.default_rng(1).random(targets.shape) < 1 / 3
  targets = jnp.where(right, logits.argmax(axis=-1), targets)
  arrays = (hidden, head, targets, weights)
  with set_mesh(sizes) if sizes else contextlib.nullcontext():
    actual = evaluate(with_confidence, arrays, V - 1, 5)
  expected = evaluate(dense_with_confidence, arrays, V - 1)
  assert_close(actual, expected)
  without = evaluate(dense, arrays, V - 1)
  assert expected[0][0] > without[0][0] + 1


def test_gradients_scale_with_the_cotangent():
  arrays = example()
  scaled = lambda *args: (-3.0 * cross_entropy(*args)[0], ())
  _, expected = evaluate(dense, arrays)
  _, actual = evaluate(scaled, arrays)
  assert_close(actual, jax.tree.map(lambda g: -3.0 * g, expected))


def test_nll_has_no_gradient():
  only_nll = lambda *args: (jnp.sum(cross_entropy(*args)[1]), ())
  for gradient in jax.tree.leaves(evaluate(only_nll, example())[1]):
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize('sizes', [None, MESHES['fsdp2_sequence2_tensor2']])
def test_bfloat16_states_give_a_float32_gradient_of_the_head(sizes):
  """The error is that of 8 bits of mantissa: no sum is in bfloat16."""
  hidden, head, targets, weights = example('all', jnp.bfloat16)
  arrays = (hidden, head, targets, weights)
  (loss, nll), (d_hidden, d_head) = (
    on_mesh(sizes, arrays) if sizes else evaluate(cross_entropy, arrays)
  )
  assert loss.dtype == nll.dtype == d_head.dtype == jnp.float32
  assert d_hidden.dtype == jnp.bfloat16
  rounded = head.astype(jnp.bfloat16).astype(jnp.float32)
  exact = evaluate(
    dense, (hidden.astype(jnp.float32), rounded, targets, weights)
  )
  assert_close((loss, nll), exact[0], 1e-5)
  assert_close((d_hidden, d_head), exact[1], 2**-8)


def sizes_in_loss_and_gradients(function, chunk):
  gradients = lambda *arrays: jax.value_and_grad(
    function, argnums=(0, 1), has_aux=True
  )(*arrays, None, chunk)
  return set(array_sizes(jax.make_jaxpr(gradients)(*example()).jaxpr))


@pytest.mark.parametrize('sizes', [None, MESHES['fsdp2_sequence2_tensor2']])
def test_no_array_holds_all_logits(sizes):
  with set_mesh(sizes) if sizes else contextlib.nullcontext():
    found = sizes_in_loss_and_gradients(cross_entropy, chunk=4)
  assert 4 * V in found  # the search includes the loop
  assert max(found) <= max(T * D, D * V) < T * V


def test_dense_loss_holds_all_logits():
  assert T * V in sizes_in_loss_and_gradients(dense, None)
