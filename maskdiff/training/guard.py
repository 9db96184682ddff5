"""Skips updates whose loss or gradient norm is not finite or is a spike.

One bad batch, or one faulty device, can destroy weeks of training. The train
step therefore checks its loss and gradient norm before it applies the update.
Parameters and optimizer state stay unchanged if either value is not finite, or
is a spike: far above the mean of the last `WINDOW` values.
"""

import dataclasses

import jax
import jax.numpy as jnp

WINDOW = 128


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """Settings of the guard.

  Attributes:
    spike_sigmas: a value this many standard deviations above the mean of the
      last WINDOW values is a spike. 0: skip only updates whose values are not
      finite.
  """

  spike_sigmas: float


def init():
  """Returns the state of the guard for a new run, a dict of arrays."""
  return {
    'losses': jnp.zeros(WINDOW, jnp.float32),
    'grad_norms': jnp.zeros(WINDOW, jnp.float32),
    'seen': jnp.zeros((), jnp.int32),  # steps with finite values
    'skipped': jnp.zeros((), jnp.int32),  # over the whole run
    'in_a_row': jnp.zeros((), jnp.int32),  # up to the last step
  }


@jax.named_scope('part(guard)')
def judge(c, guard, loss, grad_norm):
  """Decides whether to apply the update of a step.

  The window records a spike as the limit that the spike exceeded. So one spike
  does not hide the next, and a lasting change of level is accepted after some
  steps. Until the window is full, no value counts as a spike.

  Args:
    c: GuardConfig.
    guard: from `init` or the previous step.
    loss: float32 scalar, nats per token.
    grad_norm: float32 scalar, before clipping.

  Returns:
    A bool scalar, true to apply the update, and the next state of the guard.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  index = guard['seen'] % WINDOW

  def record(history, value):
    limit = history.mean() + c.spike_sigmas * history.std()
    spike = (guard['seen'] >= WINDOW) & (value > limit) & (c.spike_sigmas > 0)
    value = jnp.where(spike, limit, value)
    value = jnp.where(finite, value, history[index])
    return ~spike, history.at[index].set(value)

  loss_ok, losses = record(guard['losses'], loss)
  norm_ok, grad_norms = record(guard['grad_norms'], grad_norm)
  ok = finite & loss_ok & norm_ok
  return ok, {
    'losses': losses,
    'grad_norms': grad_norms,
    'seen': guard['seen'] + finite,
    'skipped': guard['skipped'] + ~ok,
    'in_a_row': jnp.where(ok, 0, guard['in_a_row'] + 1),
  }
