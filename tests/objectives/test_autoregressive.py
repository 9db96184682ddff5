"""The autoregressive baseline against its definition."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import (
  CONFIG,
  TINY,
  L,
  canvas_of,
  log_probabilities,
  loss,
  make_canvas,
  random_tokens,
  strong_params,
  without_mask,
)

from maskdiff.data.rows import Rows
from maskdiff.model import masks
from maskdiff.objectives import autoregressive

AR = dataclasses.replace(CONFIG, name='autoregressive')


@pytest.fixture(scope='module')
def params():
  return strong_params(TINY)


def test_loss_is_that_of_the_next_token(params):
  """bos x0 x1 x2 predict x0 x1 x2 x3 with a lower triangular mask."""
  tokens, canvas = canvas_of(AR, length=L)
  total, nll = loss(AR, TINY, params, canvas)
  bos = jnp.full((64, 1), AR.bos_id)
  inputs = jnp.concatenate([bos, tokens[:, :3]], axis=1)
  ones = jnp.ones((64, L), jnp.int32)
  pos = jnp.arange(L) * ones
  causal = masks.Labels(doc=0 * ones, pos=pos, block=-ones, reach=pos + 1)
  log_p = without_mask(log_probabilities(TINY, params, inputs, causal))
  expected = -np.take_along_axis(log_p, np.asarray(tokens)[..., None], -1)
  np.testing.assert_allclose(nll, expected[..., 0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
  assert canvas.num_tokens.sum() == 64 * L


@pytest.mark.parametrize(
  'answer', [(1,), (1, 3), (2, 3), (0, 1, 2, 3)], ids=str
)
def test_loss_is_the_exact_nll_of_the_answer(answer, params):
  """The likelihoods of all answers to a prompt sum to 1."""
  every = np.array(list(itertools.product(range(3), repeat=len(answer))))
  tokens = np.tile([2, 0, 1, 1], (3**L, 1))  # one shape for all answers
  tokens[: len(every), answer] = every
  marked = np.zeros(tokens.shape, bool)
  marked[:, answer] = True
  canvas = autoregressive.make_canvas(
    AR, Rows(jnp.asarray(tokens, jnp.int32), answer=marked), None, None, None
  )
  np.testing.assert_array_equal(canvas.weights, marked)
  np.testing.assert_array_equal(canvas.num_tokens, len(answer))
  total, nll = loss(AR, TINY, params, canvas)
  np.testing.assert_allclose(total, np.sum(nll), rtol=1e-5)
  likelihood = np.exp(-np.asarray(nll, np.float64).sum(axis=1))[: len(every)]
  assert likelihood.sum() == pytest.approx(1, rel=1e-5)
  assert likelihood.std() > 0.01


@pytest.mark.parametrize('i', range(L))
def test_output_depends_only_on_earlier_tokens(i, params):
  def outputs(tokens):
    canvas = make_canvas(AR, tokens, jnp.arange(64), jax.random.key(0), 64)
    return log_probabilities(TINY, params, canvas.inputs, canvas.labels)

  tokens = random_tokens(64, L)
  later = outputs(tokens.at[:, i:].set((tokens[:, i:] + 1) % 3))
  np.testing.assert_array_equal(later[:, i], outputs(tokens)[:, i])
  if i > 0:
    before = outputs(tokens.at[:, i - 1].set((tokens[:, i - 1] + 1) % 3))
    assert (before[:, i] != outputs(tokens)[:, i]).any()
