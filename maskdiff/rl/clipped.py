"""The clipped policy gradient, and the means of published losses."""

import jax.numpy as jnp


def objective(s, units, mean):
  """Returns the loss -mean(min(r A, clip(r) A)).

  Where the clip binds, the gradient is 0; elsewhere it is that of r A, also if
  the ratio lies on a bound. A minimum of a clip would split the gradient of
  ties in JAX: at r = 1 and a clip of 0 it would be 0.625 A.

  Ratios computed by two programs may differ from 1 by rounding. With a clip of
  0, half of the gradients of the first inner step would then be lost. Call
  `policy_loss.loss` without old log-probabilities at the first inner step: its
  ratios are exactly 1.

  Args:
    s: Settings.
    units: Units.
    mean: one of the functions below.

  Returns:
    float32 scalar.
  """
  clipped = is_clipped(s, units)
  # The ratio of a clipped unit may overflow, and 0 x inf is not 0.
  ratio = jnp.exp(jnp.where(clipped, 0, units.log_ratio))
  bound = jnp.where(units.advantages > 0, 1 + s.clip_high, 1 - s.clip_low)
  return -mean(jnp.where(clipped, bound, ratio) * units.advantages, units)


def is_clipped(s, units):
  """Returns where the clip binds, so that a unit has no gradient."""
  ratio = jnp.exp(units.log_ratio)
  above = (units.advantages > 0) & (ratio > 1 + s.clip_high)
  below = (units.advantages < 0) & (ratio < 1 - s.clip_low)
  return units.where & (above | below)


def ratio_metrics(s, units):
  """Returns metrics of the ratios to the policy that sampled.

  Returns:
    dict of float32 scalars: `clip_fraction`, and mean, standard deviation,
    least and largest `ratio_*`; 1 if there are no units.
  """
  where, ratio = units.where, jnp.exp(units.log_ratio)
  exist, number = where.any(), jnp.maximum(where.sum(), 1)
  mean = lambda x: jnp.where(where, x, 0).sum() / number
  average = jnp.where(exist, mean(ratio), 1)
  return {
    'clip_fraction': mean(is_clipped(s, units)),
    'ratio_mean': average,
    'ratio_std': jnp.sqrt(mean((ratio - average) ** 2)),
    'ratio_min': jnp.where(exist, jnp.where(where, ratio, jnp.inf).min(), 1),
    'ratio_max': jnp.where(exist, jnp.where(where, ratio, 0).max(), 1),
  }


# Means: (values of units, Units) -> scalar.


def over_answers(x, units):
  """Mean over answers (ESPO). An answer without tokens counts, with value 0."""
  return jnp.where(units.where, x, 0).sum() / len(x)


def over_tokens(x, units):
  """Mean over all tokens of the batch, so that long answers weigh more (d1)."""
  total = jnp.where(units.where, x, 0).sum()
  return total / jnp.maximum(units.where.sum(), 1)


def over_slots(x, units):
  """Mean over the tokens of an answer, then over all answers."""
  per_row = jnp.where(units.where, x, 0).sum(axis=1, keepdims=True)
  return (per_row / jnp.maximum(units.slots, 1)).sum() / len(x)


def over_informative_answers(x, units):
  """Mean over tokens, then over answers whose advantage is not 0 (JustGRPO).

  As in JustGRPO's grpo.py, their number is increased by 1e-5.
  """
  number = (units.advantages != 0).sum()
  return over_slots(x, units) * len(x) / (number + 1e-5)


def over_copies(x, units):
  """Mean over the scored tokens of a copy, then over copies that have some."""
  number = jnp.maximum(units.where.sum(axis=2), 1)
  return _mean_of_copies(x, units, number)


def sums_over_copies(x, units):
  """Sum over the scored tokens of a copy, then the mean over copies.

  The divergence of TraceRL with full attention has this scale (rl_llada.py).
  """
  return _mean_of_copies(x, units, 1)


def slots_over_copies(x, units):
  """As `sums_over_copies`, divided by the tokens of the answer (rl_sdar.py)."""
  return _mean_of_copies(x, units, jnp.maximum(units.slots[..., 0], 1))


def _mean_of_copies(x, units, number):
  of_copies = jnp.where(units.where, x, 0).sum(axis=2) / number
  exist = units.where.any(axis=2).sum()
  return of_copies.sum() / jnp.maximum(exist, 1)
