"""Noise schedules and time sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff.objectives.schedule import (
  SCHEDULES,
  TIME_SAMPLINGS,
  Schedule,
  sample_times,
)

ALL = [*map(Schedule, SCHEDULES), Schedule('polynomial', power=3.5)]
STRATIFIED = ('antithetic', 'stratified')
NUM_KEYS = 2000


@functools.partial(jax.jit, static_argnums=(0, 2))
def draw(sampling, rows, batch):
  keys = jax.random.split(jax.random.key(3), NUM_KEYS)
  return jax.vmap(lambda key: sample_times(sampling, key, rows, batch))(keys)


def times(sampling, batch, rows=None):
  """Returns [NUM_KEYS, b], times of the rows; by default of all rows."""
  rows = np.arange(batch) if rows is None else np.asarray(rows)
  # Always 64 rows, so that few programs are compiled for all tests.
  return np.asarray(draw(sampling, np.resize(rows, 64), batch))[:, : len(rows)]


def distance_to_uniform(sample):
  """Returns the Kolmogorov-Smirnov distance to the uniform CDF."""
  sample = np.sort(sample.ravel().astype(np.float64))
  n = len(sample)
  above = np.arange(1, n + 1) / n - sample
  below = sample - np.arange(n) / n
  return max(above.max(), below.max())


@pytest.mark.parametrize('schedule', ALL, ids=str)
def test_weight_is_minus_alpha_prime_over_one_minus_alpha(schedule):
  alpha = lambda t: 1 - schedule.mask_ratio(t)
  t = jnp.linspace(0.01, 0.99, 99)
  exact = -jax.vmap(jax.grad(alpha))(t) / schedule.mask_ratio(t)
  np.testing.assert_allclose(schedule.weight(t), exact, rtol=1e-5)


@pytest.mark.parametrize('schedule', ALL, ids=str)
def test_mask_ratio_rises_from_0_to_1(schedule):
  ratio = np.asarray(schedule.mask_ratio(jnp.linspace(0.0, 1.0, 101)))
  np.testing.assert_allclose(ratio[[0, -1]], [0, 1], atol=1e-6)
  assert (np.diff(ratio) > 0).all()


@pytest.mark.parametrize(
  'schedule, t, alpha, weight',
  [
    (Schedule('linear'), 0.25, 0.74995, -3.99840032),
    (Schedule('linear'), 0.5, 0.5, -1.9996),
    (Schedule('linear'), 1.0, 1e-4, -0.99989999),
    (Schedule('cosine'), 0.25, 0.61729310, -3.79124690),
    (Schedule('cosine'), 0.5, 0.29293464, -1.57057417),
    (Schedule('polynomial', power=2), 0.25, 0.93741250, -7.98721789),
    (Schedule('polynomial', power=2), 0.5, 0.74995, -3.99840032),
  ],
  ids=str,
)
def test_schedules_are_those_of_md4(schedule, t, alpha, weight):
  """MD4 maps alpha into [eps, 1 - eps]: alpha = (1 - 2 eps) a + eps.

  With our a = 1 - m and a' = -w m, MD4's weight alpha' / (1 - alpha) is
  -(1 - 2 eps) w m / (1 - alpha). The numbers were computed with MD4's code.
  """
  eps = 1e-4
  m, w = float(schedule.mask_ratio(t)), float(schedule.weight(t))
  squeezed = (1 - 2 * eps) * (1 - m) + eps
  np.testing.assert_allclose(squeezed, alpha, atol=1e-6)
  np.testing.assert_allclose(
    -(1 - 2 * eps) * w * m / (1 - squeezed), weight, rtol=1e-5
  )


@pytest.mark.parametrize('schedule', ALL, ids=str)
def test_time_inverts_the_mask_ratio(schedule):
  t = jnp.asarray([0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
  found = schedule.time(schedule.mask_ratio(t))
  # Near 1 the cosine is flat.
  np.testing.assert_allclose(found, t, rtol=2e-4)


def test_weights_are_exact_at_small_times():
  """In float32 against closed forms in float64, at the smallest time."""
  t = np.array([1e-3])
  for name, expected in {
    'log': 1 / ((1 + t) * np.log1p(t)),
    'cosine_bd3lm': np.pi
    / 2
    * np.sin(np.pi / 2 * t)
    / (1 - np.cos(np.pi / 2 * t)),
  }.items():
    found = Schedule(name).weight(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize('sampling', TIME_SAMPLINGS)
def test_pooled_times_are_uniform(sampling):
  t = times(sampling, 64)
  n = t.size
  assert abs(t.mean() - 1 / 2) < 5 * np.sqrt(1 / 12 / n)
  assert abs(t.var() - 1 / 12) < 5 * np.sqrt(1 / 180 / n)
  assert distance_to_uniform(t) < 2 / np.sqrt(n)


@pytest.mark.parametrize('sampling', TIME_SAMPLINGS)
@pytest.mark.parametrize('batch', [6, 64])
def test_times_are_in_0_1(sampling, batch):
  t = times(sampling, batch)
  assert t.min() >= 0
  assert t.max() < 1


@pytest.mark.parametrize('sampling', STRATIFIED)
def test_rounding_does_not_reach_1(sampling, monkeypatch):
  """At the top of the last stratum a sum may round up to 1."""
  monkeypatch.setattr(
    jax.random, 'uniform', lambda key: jnp.float32(1 - 2.0**-24)
  )
  rows = jnp.arange(4096)
  assert sample_times(sampling, jax.random.key(0), rows, 4096).max() < 1


@pytest.mark.parametrize('sampling', TIME_SAMPLINGS)
def test_times_of_each_row_are_uniform(sampling):
  """A source that always supplies the same rows sees every mask ratio."""
  t = times(sampling, 6)
  for row in range(6):
    assert distance_to_uniform(t[:, row]) < 2 / np.sqrt(NUM_KEYS)


@pytest.mark.parametrize('sampling', STRATIFIED)
@pytest.mark.parametrize('batch', [6, 64])
def test_each_stratum_holds_one_time(sampling, batch):
  strata = np.floor(times(sampling, batch) * batch).astype(int)
  expected = np.broadcast_to(np.arange(batch), strata.shape)
  np.testing.assert_array_equal(np.sort(strata, axis=1), expected)


@pytest.mark.parametrize('sampling', STRATIFIED)
def test_times_within_a_stratum_are_uniform(sampling):
  offset = np.mod(times(sampling, 64) * 64, 1)
  # Half of the samples are independent: antithetic rows mirror each other.
  assert distance_to_uniform(offset) < 2 / np.sqrt(offset.size / 2)


def test_antithetic_pairs_sum_to_one():
  t = times('antithetic', 64)
  np.testing.assert_allclose(t[:, 0::2] + t[:, 1::2], 1, atol=1e-6)


@pytest.mark.parametrize('sampling', TIME_SAMPLINGS)
def test_times_of_a_row_do_not_depend_on_the_other_rows(sampling):
  rows = [9, 2, 3, 63]
  np.testing.assert_array_equal(
    times(sampling, 64, rows), times(sampling, 64)[:, rows]
  )


@pytest.mark.parametrize('sampling', TIME_SAMPLINGS)
def test_keys_give_different_times(sampling):
  t = times(sampling, 64)
  assert (t[0] != t[1]).all()
