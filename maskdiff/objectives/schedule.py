"""Noise schedules alpha(t), loss weights, and how the times t are drawn.

`t` in [0, 1]: 0 is clean, 1 is all masked. `alpha(t)` is the chance that a
token is kept, so `1 - alpha(t)` is the mask ratio. The weight of a masked
token in the negative evidence lower bound is -alpha'(t) / (1 - alpha(t))
(MD4, arXiv 2406.04329, eq. 4), which is 1/t for the linear schedule (LLaDA,
arXiv 2502.09992, eq. 3).
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A noise schedule. `power` is only read by the polynomial one."""

  name: str = 'linear'
  power: float = 2.0

  def mask_ratio(self, t):
    """Returns 1 - alpha(t), the chance that a token is masked, like `t`."""
    return {
      'linear': lambda: t,
      'polynomial': lambda: t**self.power,
      # 1 - alpha of MD4's cosine schedule, cos(pi/2 (1 - t)).
      'cosine': lambda: jnp.sin(jnp.pi / 2 * t),
    }[self.name]()

  def weight(self, t):
    """Returns -alpha'(t) / (1 - alpha(t)), for t > 0, like `t`."""
    return {
      'linear': lambda: 1 / t,
      'polynomial': lambda: self.power / t,
      'cosine': lambda: jnp.pi / 2 / jnp.tan(jnp.pi / 2 * t),
    }[self.name]()


SCHEDULES = ('linear', 'cosine', 'polynomial')
TIME_SAMPLINGS = ('antithetic', 'stratified', 'iid')


def sample_times(sampling, key, rows, batch):
  """Draws a time for each row, uniform on [0, 1).

  A row's time depends on the key, its global number and the batch size alone,
  so any host, device or microbatch can draw its own rows'.

  `iid`: independent. `stratified`: [0, 1) is cut into B equal strata and each
  row of the batch takes a random point of its own. `antithetic`: the same, but
  the two rows of a pair (2p, 2p + 1) take t and 1 - t. They then have L masked
  tokens between them under the linear schedule, to within sampling noise, so
  that every device has the same share of tokens with a loss.

  Which row gets which stratum is drawn anew with every key: a mixture of data
  sources can be periodic in the row number, and must not meet one range of
  times only.

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
  by_unit = lambda draw, key: jax.vmap(
    lambda i: draw(jax.random.fold_in(key, i))
  )(unit)
  u = by_unit(jax.random.uniform, point_key)
  if sampling == 'iid':
    return u
  if sampling == 'stratified':
    t = (jax.random.permutation(order_key, batch)[unit] + u) / batch
  else:
    # The lower row of a pair takes one of B/2 strata below 1/2.
    t = (jax.random.permutation(order_key, batch // 2)[unit] + u) / batch
    lower = by_unit(jax.random.bernoulli, coin_key).astype(rows.dtype)
    t = jnp.where(rows % 2 == lower, t, 1 - t)
  # Rounding may reach 1; the largest float32 below keeps the range open.
  return jnp.minimum(t, 1 - 2.0**-24)
