"""Densities of times and weights, against closed forms and enumeration."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from objective_cases import (
  ALL_MASKS,
  CONFIG,
  TINY,
  L,
  check_rows_do_not_depend_on_devices_or_parts,
  enumerated_bound,
  expected_loss,
  make_canvas,
  nll_by_mask,
  nll_of,
  random_tokens,
  strong_params,
)

from maskdiff.config import default
from maskdiff.objectives.schedule import SCHEDULES, Schedule
from maskdiff.objectives.time_density import TimeDensity, Weight
from maskdiff.training import evaluation, step

BELL = TimeDensity('bell', width=0.2, uniform_share=0.1)
U = (np.arange(20_000) + 0.5) / 20_000


def truncated_normal(density):
  start, end = density.interval
  return scipy.stats.truncnorm(
    (start - density.mean) / density.width,
    (end - density.mean) / density.width,
    density.mean,
    density.width,
  )


@pytest.mark.parametrize(
  'density',
  [
    TimeDensity('bell'),
    TimeDensity('bell', mean=0.3, width=0.2, interval=(0.1, 0.9)),
    TimeDensity('bell', mean=1.0, width=0.02),
    TimeDensity('bell', mean=0.5, width=0.01, interval=(0.5, 1.0)),
  ],
  ids=str,
)
def test_bell_is_a_truncated_normal_distribution(density):
  t = np.asarray(density.quantile(jnp.asarray(U, jnp.float32)))
  exact = truncated_normal(density)
  assert (np.diff(t) >= 0).all()
  start, end = density.interval
  assert start <= t.min() and t.max() < end or end == 1.0 > t.max()
  # The table has 1024 bins; a bin of the narrowest bell holds 7%.
  np.testing.assert_allclose(exact.cdf(t), U, atol=0.02)
  assert np.abs(exact.cdf(t) - U).mean() < 0.005


def test_density_is_the_derivative_of_the_cdf():
  for density in (BELL, TimeDensity(interval=(0.2, 0.6))):
    u = np.linspace(0.001, 0.999, 500)
    t = np.asarray(density.quantile(jnp.asarray(u, jnp.float32)), np.float64)
    slope = np.asarray(
      jax.vmap(jax.grad(density.quantile))(jnp.asarray(u, jnp.float32))
    )
    np.testing.assert_allclose(density.density(t) * slope, 1, rtol=1e-2)
  plain = 0.9 * truncated_normal(BELL).pdf(U) + 0.1
  np.testing.assert_allclose(BELL.density(U), plain, rtol=5e-3)


def test_uniform_times_are_the_draws_themselves():
  u = jnp.asarray(U, jnp.float32)
  assert TimeDensity().quantile(u) is u


def test_pairs_stay_antithetic():
  c = dataclasses.replace(CONFIG, time_density=BELL, eps=0.0)
  canvas = make_canvas(
    c, random_tokens(64, 8), jnp.arange(64), jax.random.key(0), 64
  )
  pairs = np.asarray(canvas.mask_ratio).reshape(32, 2)
  np.testing.assert_allclose(pairs.sum(axis=1), 1, atol=1e-4)
  # Each of 32 strata of equal probability below 1/2 has one row.
  lower = np.sort(pairs.min(axis=1))
  edges = np.asarray(BELL.quantile(jnp.arange(33) / 64))
  assert (lower >= edges[:-1] - 1e-6).all()
  assert (lower <= edges[1:] + 1e-6).all()


@pytest.mark.parametrize(
  ('density', 'weight', 'schedule'),
  [
    *itertools.product(
      [TimeDensity(), BELL, TimeDensity(interval=(0.2, 0.8))],
      [Weight(), Weight('power'), Weight('power', 0.5)],
      SCHEDULES,
    )
  ],
  ids=str,
)
def test_expected_weight_of_a_token_is_one(density, weight, schedule):
  schedule, u = Schedule(schedule), jnp.asarray(U, jnp.float32)
  ratio = schedule.mask_ratio((1 - 1e-3) * density.quantile(u) + 1e-3)
  weights = weight.at(schedule, density, 1e-3, density.quantile(u))
  assert np.mean(ratio * weights) == pytest.approx(1, rel=2e-3)


# The bound


@pytest.fixture(scope='module')
def params():
  return strong_params(TINY)


@pytest.fixture(scope='module')
def bound(params):
  return enumerated_bound(params)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_importance_weights_give_the_bound(schedule, params, bound):
  c = dataclasses.replace(
    CONFIG,
    schedule=Schedule(schedule),
    time_density=BELL,
    weight=Weight('importance'),
    eps=0.0,
  )
  assert c.is_bound(0)
  loss = expected_loss(c, nll_of(params), points=2048)
  assert loss == pytest.approx(bound, rel=2e-3)


def test_other_losses_are_not_the_bound(params, bound):
  """Each equals its own sum over all masks, which is not the bound."""
  nll, count = nll_by_mask(params), ALL_MASKS.sum(axis=1)
  for density, weight in [
    (BELL, Weight()),
    (TimeDensity(), Weight('power')),
    (TimeDensity(interval=(0.2, 1.0)), Weight()),
  ]:
    c = dataclasses.replace(
      CONFIG, time_density=density, weight=weight, eps=0.0
    )
    assert not c.is_bound(0)
    t = np.asarray(density.quantile(jnp.asarray(U, jnp.float32)), np.float64)
    t = t[:, None]
    probability = t**count * (1 - t) ** (L - count)
    w = 1 / t if weight.name == 'bound' else 2.0
    expected = (w * probability * nll).sum(axis=1).mean()
    loss = expected_loss(c, nll_of(params), points=2048)
    assert loss == pytest.approx(expected, rel=1e-3)
    assert abs(loss - expected) < 0.2 * abs(loss - bound)


def test_uniform_after_restores_the_bound(params):
  tokens = random_tokens(64, 8)
  draw = lambda c, progress: make_canvas(
    c, tokens, jnp.arange(64), jax.random.key(0), 64, progress
  )
  early = dataclasses.replace(CONFIG, time_density=BELL, weight=Weight('power'))
  plan = dataclasses.replace(early, uniform_after=0.75)
  same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  same(draw(plan, 0.5), draw(early, 0.5))
  same(draw(plan, 0.75), draw(CONFIG, 0.75))
  assert not plan.is_bound(0.7) and plan.is_bound(0.75)
  with pytest.raises(AssertionError):
    same(draw(early, 0.75), draw(CONFIG, 0.75))


SWITCHES = {
  'bell': dict(time_density=TimeDensity('bell', mean=0.4, width=0.2)),
  'interval': dict(time_density=TimeDensity(interval=(0.2, 0.9))),
  'power': dict(weight=Weight('power', 0.5)),
  'importance': dict(time_density=BELL, weight=Weight('importance')),
  'plan': dict(time_density=BELL, weight=Weight('power'), uniform_after=0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize('progress', [0.25, 0.5])
@pytest.mark.parametrize('name', SWITCHES)
def test_rows_do_not_depend_on_devices_or_microbatches(name, progress):
  """A row of 8 devices, or of a part of the batch, has the same canvas."""
  c = dataclasses.replace(CONFIG, **SWITCHES[name])
  draw = lambda rows, numbers: make_canvas(
    c, rows, numbers, jax.random.key(0), 64, progress
  )
  tokens, numbers = random_tokens(64, 16), jnp.arange(64)
  whole = draw(tokens, numbers)
  plain = make_canvas(CONFIG, tokens, numbers, jax.random.key(0), 64)
  same = np.array_equal(whole.weights, plain.weights)
  assert same == (name == 'plan' and progress == 0.5)
  check_rows_do_not_depend_on_devices_or_parts(draw)


def test_evaluation_does_not_depend_on_the_training_objective():
  config = default()
  plain = evaluation.eval_config(step.step_config(config)).objective
  config.update_from_flattened_dict(
    {
      'objective.time_density': 'bell',
      'objective.bell_mean': 0.4,
      'objective.time_interval': (0.1, 0.9),
      'objective.weight': 'power',
      'objective.weight_power': 0.5,
      'objective.eps': 0.1,
      'objective.complementary_masks': True,
      'objective.autoregressive_weight': 0.3,
      'objective.position_power': 2.0,
    }
  )
  other = evaluation.eval_config(step.step_config(config)).objective
  assert other == plain and other.is_bound(0)
