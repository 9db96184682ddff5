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
    if self.name == 'linear':
      return t
    if self.name == 'polynomial':
      return t**self.power
    return jnp.cos(jnp.pi / 2 * (1 - t))

  def weight(self, t):
    """Returns -alpha'(t) / (1 - alpha(t)), for t > 0, like `t`."""
    if self.name == 'linear':
      return 1 / t
    if self.name == 'polynomial':
      return self.power / t
    return jnp.pi / 2 * jnp.tan(jnp.pi / 2 * (1 - t))


SCHEDULES = ('linear', 'cosine', 'polynomial')
TIME_SAMPLINGS = ('antithetic', 'stratified', 'iid')


def sample_times(sampling, key, rows, batch):
  """Draws one time per row of the global batch, uniform on [0, 1) marginally.

  A row's time depends on the key, its global number and the batch size alone,
  so any host, device or microbatch can draw its own rows'.

  `iid`: independent. `stratified`: row r takes a random point of
  [r/B, (r+1)/B). `antithetic`: the even row of pair p takes a random point t
  of [p/B, (p+1)/B), the odd one 1 - t. The B times again fall one in each of
  B equal strata, and the two rows of a pair have L masked tokens between them
  under the linear schedule, to within sampling noise, so that every device
  has the same share of tokens with a loss.

  Args:
    sampling: one of TIME_SAMPLINGS.
    key: PRNG key of this step.
    rows: [b] int32, global row numbers in [0, batch).
    batch: B, rows of the global batch; even for `antithetic`.

  Returns:
    [b] float32 times in [0, 1).
  """
  pair = rows // 2 if sampling == 'antithetic' else rows
  u = jax.vmap(lambda r: jax.random.uniform(jax.random.fold_in(key, r)))(pair)
  if sampling == 'iid':
    return u
  if sampling == 'stratified':
    return (rows + u) / batch
  t = (pair + u) / batch
  # 1 - t lies in (1/2, 1]; the largest float32 below 1 keeps the range open.
  return jnp.where(rows % 2 == 0, t, jnp.minimum(1 - t, 1 - 2.0**-24))
