"""Advantages of sampled answers: rewards relative to their group.

Published names: d1, wd1 and SPG use the group mean without a deviation; ESPO
and coupled-GRPO leave one out; TraceRL divides by the population deviation;
GRPO and JustGRPO divide by the sample deviation.
"""

import jax.numpy as jnp

from maskdiff.errors import UserError

BASELINES = ('none', 'group_mean', 'leave_one_out')
DEVIATIONS = ('none', 'population', 'sample')


def advantages(rewards, group, baseline, deviation='none'):
  """Returns the advantage of each answer.

  A group of equal rewards has advantages of exactly 0, except without a
  baseline: rewards are first taken relative to the first of their group, so
  that no rounding of the mean is left.

  Args:
    rewards: [B] float32, groups one after the other.
    group: G, a divisor of B.
    baseline: 'group_mean' subtracts the mean of the group; 'leave_one_out' the
      mean of the other answers, which is G / (G - 1) times as much (ESPO's
      paper writes the former, its code computes the latter); 'none': nothing.
    deviation: 'population' divides by the standard deviation of the group, and
      gives 0 if that is 0 (TraceRL); 'sample' divides by the deviation with
      G - 1, plus 1e-4 (GRPO).

  Returns:
    [B] float32.

  Raises:
    UserError: an unknown name, or a group that is too small.
  """
  for name, value, known in (
    ('baseline', baseline, BASELINES),
    ('deviation', deviation, DEVIATIONS),
  ):
    if value not in known:
      raise UserError(f'{name}={value!r}: choose one of {", ".join(known)}')
  if len(rewards) % group:
    raise UserError(
      f'{len(rewards)} rewards are not a multiple of group={group}'
    )
  if group == 1 and (baseline, deviation) != ('none', 'none'):
    raise UserError(
      'a group of 1 answer has no advantages; set group=2 or more'
    )
  r = jnp.asarray(rewards, jnp.float32).reshape(-1, group)
  relative = r - r[:, :1]
  centred = relative - relative.mean(axis=1, keepdims=True)
  found = {
    'none': r,
    'group_mean': centred,
    'leave_one_out': centred * (group / (group - 1)) if group > 1 else r,
  }[baseline]
  squares = (centred**2).sum(axis=1, keepdims=True)
  if deviation == 'population':
    std = jnp.sqrt(squares / group)
    found = jnp.where(std > 0, found / jnp.where(std > 0, std, 1), 0)
  elif deviation == 'sample':
    found = found / (jnp.sqrt(squares / (group - 1)) + 1e-4)
  return found.reshape(-1)
