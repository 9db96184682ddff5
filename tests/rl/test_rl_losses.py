"""Divergence, clipping, and the losses without golden files."""

import dataclasses
import itertools
import math

import golden_rl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from policy_cases import SLOTS, drawn, look_up, made_batch, small

from maskdiff.rl import clipped, divergence, table
from maskdiff.rl.policy_loss import LogProbs
from maskdiff.rl.units import Units

# Divergence


def test_estimates_and_gradients_of_the_divergence():
  """Exact for three outcomes: sums over outcomes replace the samples."""
  logits = jnp.array([0.3, -0.5, 1.1])
  reference = jax.nn.log_softmax(jnp.array([-0.2, 0.4, 0.1]))
  kl = lambda p, q: (jnp.exp(p) * (p - q)).sum()
  exact = lambda x: kl(jax.nn.log_softmax(x), reference)
  backward = lambda x: kl(reference, jax.nn.log_softmax(x))
  p = jnp.exp(jax.nn.log_softmax(logits))
  mean = lambda estimate: (
    lambda x: (p * estimate(jax.nn.log_softmax(x) - reference)).sum()
  )
  close = logits + 0.01 * jnp.arange(3)
  near = lambda x: (
    p * divergence.k2(jax.nn.log_softmax(logits) - jax.nn.log_softmax(x))
  ).sum()
  functions = {
    'exact': exact,
    'backward': backward,
    **{name: mean(f) for name, f in divergence.ESTIMATES.items()},
  }
  value, slope = jax.jit(
    lambda x: (
      {name: f(x) for name, f in functions.items()},
      {name: jax.grad(f)(x) for name, f in functions.items()},
    )
  )(logits)
  for name in ('k1', 'k3'):
    np.testing.assert_allclose(value[name], value['exact'], rtol=1e-5)
  for name, expected in (('k2', slope['exact']), ('k3', slope['backward'])):
    np.testing.assert_allclose(slope[name], expected, atol=1e-6)
  np.testing.assert_allclose(slope['k1'], np.zeros(3), atol=1e-6)
  exact_near = kl(jax.nn.log_softmax(logits), jax.nn.log_softmax(close))
  np.testing.assert_allclose(near(close), exact_near, rtol=0.02)


@pytest.mark.parametrize(
  'name, kl', [('espo', 'k1'), ('espo', 'k3'), ('d1', 'k1')]
)
def test_divergence_of_answers_and_of_tokens(name, kl):
  batch, rng = made_batch(), np.random.default_rng(3)
  s = dataclasses.replace(small(name), kl=kl, kl_weight=0.5, clip_low=math.inf)
  s = dataclasses.replace(s, clip_high=math.inf)
  queries = drawn(name, s, batch, np.arange(4))
  new, reference = rng.normal(size=(2, *queries.masked.shape)).astype(
    np.float32
  )
  value, metrics, _ = golden_rl.loss(
    name, s, LogProbs(new, None, reference), queries, batch,
    np.zeros(4, np.float32), pads=False,
  )  # fmt: skip
  weight = np.array(queries.weight)[..., None] * np.array(queries.scored)
  gap = (weight * (new - reference)).sum(axis=0)
  if name == 'espo':  # of the sum over tokens, then per token
    gap = gap.sum(axis=1)
    expected = np.mean(divergence.ESTIMATES[kl](gap)) / SLOTS
  else:
    expected = np.mean(divergence.ESTIMATES[kl](gap[batch.counted]))
  assert metrics['kl'] == pytest.approx(float(expected), rel=1e-5)
  assert value == pytest.approx(0.5 * float(expected), rel=1e-5)


# Clipping


def test_gradient_of_clipped_ratios():
  """Each sign of the advantage, below, on and above both bounds."""
  ratio = np.float32([0.7, 0.8, 1.0, 1.2, 1.3])
  log_ratio, a = map(
    np.float32,
    zip(*itertools.product(np.log(ratio), (1.0, -2.0)), strict=True),
  )
  # Bounds that equal the ratios exactly, in float32.
  s = table.settings('espo', clip_low=0.2, clip_high=0.2)
  exp = np.array(jnp.exp(log_ratio))
  s = dataclasses.replace(
    s, clip_low=float(1 - exp[2]), clip_high=float(exp[6] - 1)
  )

  def of(log_ratio):
    ones = jnp.ones(len(a))
    units = Units(log_ratio, log_ratio, None, 1.0, ones > 0, a, ones)
    return clipped.objective(s, units, clipped.over_answers) * len(a)

  value, found = jax.value_and_grad(of)(log_ratio)
  keeps = np.where(a > 0, exp <= exp[6], exp >= exp[2])
  np.testing.assert_allclose(found, np.where(keeps, -exp * a, 0), rtol=1e-6)
  bounded = np.clip(exp, exp[2], exp[6])
  assert value == pytest.approx(-np.minimum(exp * a, bounded * a).sum())


def test_overflowing_ratio_that_is_clipped_has_gradient_0():
  units = lambda x: Units(
    x, x, None, 1.0, jnp.array([True]), np.float32([1]), 1
  )
  loss = lambda x: clipped.objective(
    table.settings('espo'), units(x), clipped.over_answers
  )
  assert jax.grad(lambda x: loss(x[None]))(200.0) == 0


# JustGRPO


def test_justgrpo_divides_by_answers_with_an_advantage():
  """As its code: the sum over tokens, / slots / (number + 1e-5)."""
  batch, s = made_batch(), small('justgrpo')
  queries = drawn('justgrpo', s, batch, np.arange(4))
  new = look_up(queries).astype(np.float32)
  a = np.float32([1.5, 0, -0.5, 0])
  value, _, derivative = golden_rl.loss(
    'justgrpo', s, LogProbs(new), queries, batch, a, pads=False
  )
  assert value == pytest.approx(-a.sum() / (2 + 1e-5), rel=1e-6)
  of_rows = derivative.sum(axis=(0, 2))
  np.testing.assert_allclose(of_rows, -a / (2 + 1e-5), rtol=1e-6)


# StableDRL


def test_stable_drl_weighs_by_clipped_ratios():
  batch, s = made_batch(), small('stable_drl')
  queries = drawn('stable_drl', s, batch, np.arange(4))
  rng = np.random.default_rng(4)
  new, old = rng.normal(size=(2, *queries.masked.shape)).astype(np.float32)
  a = np.float32([1.0, 2.0, 0.5, 3.0])  # the score is the lower bound
  value, _, _ = golden_rl.loss(
    'stable_drl', s, LogProbs(new, old), queries, batch, a, pads=False
  )
  weight = np.array(queries.weight)[..., None] * np.array(queries.scored)
  bound = lambda x: (weight * x).sum(axis=(0, 2))
  w = np.minimum(np.exp(bound(new) - bound(old)), s.max_ratio)
  expected = -(w / w.sum() * a * bound(new)).sum()
  assert value == pytest.approx(expected, rel=1e-5)


# VRPO


def test_loss_of_preferences_is_the_same_with_bounds_per_token():
  """Its term of the chosen answer is divided by the tokens once."""
  batch = made_batch()
  s = small('vrpo')
  queries = drawn('vrpo', s, batch, np.arange(4))
  rng = np.random.default_rng(5)
  new, reference = rng.normal(size=(2, *queries.masked.shape))
  log_probs = LogProbs(np.float32(new), reference=np.float32(reference))
  found = [
    golden_rl.loss(
      'vrpo',
      dataclasses.replace(s, per_token=per_token),
      log_probs,
      queries,
      batch,
      np.zeros(4, np.float32),
      pads=False,
    )[0]
    for per_token in (False, True)
  ]
  assert s.chosen_weight and found[0] == pytest.approx(found[1], rel=1e-6)
