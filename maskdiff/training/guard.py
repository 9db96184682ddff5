"""Which updates are not worth making: not finite, or a spike.

One bad batch, or one device that computes wrongly, can undo a month. The step
therefore looks at its loss and at the norm of its gradient before it uses
them, and leaves parameters and optimizer as they are if either is not finite,
or stands out from the last `WINDOW` of its kind.
"""

import dataclasses

import jax
import jax.numpy as jnp

WINDOW = 128


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  spike_sigmas: float  # standard deviations above the mean; 0: any is fine


def init():
  """The guard of a fresh run, a dict of arrays."""
  return {
    'losses': jnp.zeros(WINDOW, jnp.float32),
    'grad_norms': jnp.zeros(WINDOW, jnp.float32),
    'seen': jnp.zeros((), jnp.int32),  # finite steps
    'skipped': jnp.zeros((), jnp.int32),  # of the whole run
    'in_a_row': jnp.zeros((), jnp.int32),  # skipped up to now
  }


@jax.named_scope('part(guard)')
def judge(c, guard, loss, grad_norm):
  """Whether a step's update is to be made.

  A spike is noted as the limit that it passed, so that one does not hide the
  next, while a lasting change of level is taken for normal after some steps.
  No spike is seen before the window is full.

  Args:
    c: GuardConfig.
    guard: from `init` or the step before.
    loss: float32 scalar, nats per token.
    grad_norm: float32 scalar, before clipping.

  Returns:
    A bool scalar, and the next guard.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
  at = guard['seen'] % WINDOW

  def note(history, value):
    limit = history.mean() + c.spike_sigmas * history.std()
    spike = (guard['seen'] >= WINDOW) & (value > limit) & (c.spike_sigmas > 0)
    value = jnp.where(spike, limit, value)
    return ~spike, history.at[at].set(jnp.where(finite, value, history[at]))

  loss_ok, losses = note(guard['losses'], loss)
  norm_ok, grad_norms = note(guard['grad_norms'], grad_norm)
  ok = finite & loss_ok & norm_ok
  return ok, {
    'losses': losses,
    'grad_norms': grad_norms,
    'seen': guard['seen'] + finite,
    'skipped': guard['skipped'] + ~ok,
    'in_a_row': jnp.where(ok, 0, guard['in_a_row'] + 1),
  }
