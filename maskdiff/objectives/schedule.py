"""Noise schedules alpha(t), loss weights, and the sampling of times t.

At t = 0 the row is clean; at t = 1 every token is masked. `alpha(t)` is the
probability that a token is not masked, so `1 - alpha(t)` is the mask ratio. The
weight of a masked token in the negative evidence lower bound is
-alpha'(t) / (1 - alpha(t)) (MD4, arXiv 2406.04329, eq. 4). It is 1/t for the
linear schedule (LLaDA, arXiv 2502.09992, eq. 3).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.config import CHOICES


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A noise schedule. Only the polynomial schedule uses `power`.

  The mask ratio of any schedule may be raised to an `exponent`. The methods
  take and return arrays of the same shape, of JAX or NumPy.
  """

  name: str = 'linear'
  power: float = 2.0
  exponent: float = 1.0

  def mask_ratio(self, t):
    """Returns 1 - alpha(t), the probability that a token is masked."""
    ratio = {
      'linear': lambda: t,
      'polynomial': lambda: t**self.power,
      # 1 - alpha of MD4's cosine schedule, cos(pi/2 (1 - t)).
      'cosine': lambda: module_of(t).sin(np.pi / 2 * t),
      # BD3-LM's schedules (arXiv 2503.09573). The second is 1 - cos(pi/2 t),
      # without cancellation at small t.
      'log': lambda: module_of(t).log1p(t) / math.log(2),
      'cosine_bd3lm': lambda: 2 * module_of(t).sin(np.pi / 4 * t) ** 2,
    }[self.name]()
    return ratio if self.exponent == 1 else ratio**self.exponent

  def time(self, mask_ratio):
    """Returns the time t of a mask ratio; inverts `mask_ratio`."""
    if self.exponent != 1:
      mask_ratio = mask_ratio ** (1 / self.exponent)
    return {
      'linear': lambda: mask_ratio,
      'polynomial': lambda: mask_ratio ** (1 / self.power),
      'cosine': lambda: 2 / jnp.pi * jnp.arcsin(mask_ratio),
      'log': lambda: jnp.expm1(mask_ratio * math.log(2)),
      'cosine_bd3lm': lambda: 4 / jnp.pi * jnp.arcsin((mask_ratio / 2) ** 0.5),
    }[self.name]()

  def weight(self, t):
    """Returns -alpha'(t) / (1 - alpha(t)), the loss weight, for t > 0."""
    weight = {
      'linear': lambda: 1 / t,
      'polynomial': lambda: self.power / t,
      'cosine': lambda: np.pi / 2 / module_of(t).tan(np.pi / 2 * t),
      'log': lambda: 1 / ((1 + t) * module_of(t).log1p(t)),
      'cosine_bd3lm': lambda: np.pi / 2 / module_of(t).tan(np.pi / 4 * t),
    }[self.name]()
    return weight if self.exponent == 1 else self.exponent * weight


def module_of(x):
  """Returns the module that computes with x: NumPy for its arrays."""
  return np if isinstance(x, np.ndarray) else jnp


SCHEDULES = CHOICES['objective.schedule']
TIME_SAMPLINGS = CHOICES['objective.time_sampling']


def draw_by_number(draw, key, numbers):
  """Returns a draw for each number, which no other number changes.

  Args:
    draw: function of a PRNG key.
    key: PRNG key.
    numbers: [b] int32, such as the numbers of rows in the global batch.
  """
  return jax.vmap(lambda number: draw(jax.random.fold_in(key, number)))(numbers)


def sample_times(sampling, key, rows, batch):
  """Draws a time for each row, uniform on [0, 1).

  The time of a row depends only on the key, its number in the global batch and
  the batch size, so any host, device or microbatch can draw for its own rows.

  - `iid`: the times are independent.
  - `stratified`: [0, 1) is divided into B equal strata, and each row of the
    batch takes a random point in a stratum of its own.
  - `antithetic`: as stratified, but the two rows of a pair (2p, 2p + 1) take t
    and 1 - t. Under the linear schedule a pair has about L masked tokens in
    total, so all devices have about the same number of tokens with a loss.

  Each key assigns strata to rows anew. With a fixed assignment, a data source
  whose rows have a fixed place in the batch would get only one range of times.

  Args:
    sampling: one of TIME_SAMPLINGS.
    key: PRNG key of this step.
    rows: [b] int32, global row numbers in [0, batch).
    batch: B, rows of the global batch; even for `antithetic`.

  Returns:
    [b] float32 times.
  """
  point_key, order_key, coin_key = jax.random.split(key, 3)
  unit = rows // 2 if sampling == 'antithetic' else rows
  u = draw_by_number(jax.random.uniform, point_key, unit)
  if sampling == 'iid':
    return u
  if sampling == 'stratified':
    t = (jax.random.permutation(order_key, batch)[unit] + u) / batch
  else:
    # The `lower` row of a pair takes one of the B/2 strata below 1/2.
    t = (jax.random.permutation(order_key, batch // 2)[unit] + u) / batch
    lower = draw_by_number(jax.random.bernoulli, coin_key, unit)
    lower = lower.astype(rows.dtype)
    t = jnp.where(rows % 2 == lower, t, 1 - t)
  # Rounding may give 1; the result is at most the largest float32 below it.
  return jnp.minimum(t, 1 - 2.0**-24)
