"""Exact quantities of the enumerable policy, by independent computations."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_mask import elbo

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))
import enumerable as e  # noqa: E402
import policy_gradients  # noqa: E402

RING = jnp.asarray(e.REWARDS['ring'])
PARAMS = e.random_params(0.7)
TABLE = jax.jit(e.table)(PARAMS)


def test_bound_is_the_mean_over_all_masks():
  t = np.array(TABLE)
  np.testing.assert_allclose(
    e.bound(TABLE), [elbo(answer) for answer in t], rtol=1e-5
  )
  # Jensen: the bound is below the log-likelihood, which sums to 1.
  assert (e.log_likelihood(TABLE) > e.bound(TABLE)).all()
  assert jnp.exp(e.log_likelihood(TABLE)).sum() == pytest.approx(1, abs=1e-5)


def test_log_likelihood_follows_the_sampler_mask_by_mask():
  """The probability of each set of filled slots, from one step to the next."""
  t = np.exp(np.array(TABLE, np.float64))
  reached = np.zeros((len(t), 2**e.LENGTH))
  reached[:, -1] = 1
  for mask in range(2**e.LENGTH - 1, 0, -1):
    slots = [j for j in range(e.LENGTH) if mask >> j & 1]
    for j in slots:
      p = t[:, mask, j] / len(slots)
      reached[:, mask ^ 1 << j] += reached[:, mask] * p
  np.testing.assert_allclose(
    np.exp(e.log_likelihood(TABLE)), reached[:, 0], rtol=1e-4
  )


def test_policy_gradient_is_that_of_the_expected_reward():
  """Along a direction of the parameters, by finite differences."""
  random = np.random.default_rng(0)
  direction = jax.tree.map(
    lambda x: np.float32(random.normal(size=x.shape)), PARAMS
  )

  @jax.jit
  def at(step):
    params = jax.tree.map(lambda x, d: x + step * d, PARAMS, direction)
    return e.expected_reward(e.table(params), RING)

  @jax.jit
  def exact():
    t, pull = jax.vjp(e.table, PARAMS)
    (gradient,) = pull(e.surrogate_gradient(t, RING, e.log_likelihood))
    products = jax.tree.map(jnp.vdot, gradient, direction)
    return sum(jax.tree.leaves(products))

  step = 3e-3
  assert exact() == pytest.approx(
    float(at(step) - at(-step)) / (2 * step), rel=2e-2
  )


@pytest.mark.parametrize(
  'name, score', [('reinforce', e.bound), ('d1', e.all_masked)]
)
def test_mean_gradient_of_batches_is_that_of_their_score(name, score):
  """Of d1, up to the number of slots, over which its mean is."""
  values = policy_gradients.case('methods', name)
  s = policy_gradients.settings(values)
  v = True, False, 'leave_one_out', 'none', 'reward'

  @jax.jit
  def batches(keys):
    of_batch = lambda key: policy_gradients.batch_gradient(
      name, s, v, TABLE, TABLE, TABLE, RING, key
    )[0]
    return jax.vmap(of_batch)(keys)

  found = np.array(batches(jax.random.split(jax.random.key(0), 500)))
  exact = np.array(e.surrogate_gradient(TABLE, RING, score))
  exact /= {'reinforce': 1, 'd1': e.LENGTH}[name]
  # Along fixed directions, to four standard errors of the mean.
  random = np.random.default_rng(0).normal(size=(8, exact.size))
  for direction in [*random, exact.ravel()]:
    along = found.reshape(len(found), -1) @ direction
    error = float(along.std(ddof=1)) / len(along) ** 0.5
    assert along.mean() == pytest.approx(
      exact.ravel() @ direction, abs=4 * error
    )
