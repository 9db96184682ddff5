"""Many requests through a batch of fixed size: a row that ends makes room.

Rows of a batch end at different times: an eos comes early, or a threshold lets
one row commit more at a time. Waiting for the last one leaves the others idle,
so a request takes the place of a finished one at once. Of all requests one
program is compiled, and an answer is what it would be alone. With a cache, a
row is replaced when the others need a new cache too.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.distributed.mesh import replicate
from maskdiff.sampling import sampler
from maskdiff.sampling.request import begin


class Answer(NamedTuple):
  """A request that ended."""

  row: int  # which of the requests it is
  tokens: np.ndarray  # [L] int32, the filled canvas
  forwards: int  # see request.Carry
  positions: int
  broken: bool  # given up: its logits were NaN or infinite


def answers(network, c, request, batch):
  """Yields an Answer for each of R requests, as they end.

  Args:
    network: Network.
    c: SamplerConfig.
    request: Request of R rows.
    batch: rows in progress at once.

  Raises:
    UserError: see `request.begin`.
  """
  carry, layout, shapes = begin(network, c, request)
  requests = len(layout.seeds)
  batch = min(batch, requests)
  holds = np.arange(batch)  # the request of each row; -1: none any more
  waiting = iter(range(batch, requests))
  # Placed like what the loop returns, so that one program serves all rounds.
  state = jax.jit(replicate)((_take(carry, holds), _take(layout, holds)))
  left = requests
  while left:
    now, its_layout = state
    # When no request waits, those in progress may as well end together.
    until = (holds >= 0).sum() - 1 if left > batch else 0
    now = sampler.run(network, c, shapes, now, its_layout, np.int32(until))
    tokens, masked, forwards, positions, broken = jax.device_get(
      (now.canvas, now.masked, now.forwards, now.positions, now.broken)
    )
    ended = (holds >= 0) & ~masked.any((1, 2))
    for i in np.flatnonzero(ended):
      yield Answer(
        int(holds[i]),
        tokens[i],
        int(forwards[i]),
        int(positions[i]),
        bool(broken[i]),
      )
      holds[i] = next(waiting, -1)
    left -= int(ended.sum())
    if left:
      comes = ended & (holds >= 0)
      taken = np.where(comes, holds, 0)
      state = _replace(
        (now._replace(calls=np.int32(0)), its_layout),
        (_take(carry, taken), _take(layout, taken)),
        comes,
      )


def _take(tree, rows):
  """Rows of a Carry or Layout; what is no array of rows stays."""
  return jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, tree)


@functools.partial(jax.jit, donate_argnums=0)
def _replace(old, new, which):
  """Takes the rows of `which` from the new state, the others from the old."""

  def one(old, new):
    if not old.ndim:
      return old
    return jnp.where(which.reshape(-1, *[1] * (old.ndim - 1)), new, old)

  return replicate(jax.tree.map(one, old, new))
