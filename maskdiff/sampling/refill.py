"""Samples many requests in a batch of fixed size (continuous batching).

Rows end at different times, for example at an early eos, or because a threshold
commits many tokens per step. The next request replaces a row as soon as it
ends, so that no row of the batch idles. With a cache, the replacement waits
until the other rows need a new cache too. One program is compiled for all
requests. The answer to a request does not depend on the batch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.distributed.mesh import replicate
from maskdiff.sampling import recording, sampler
from maskdiff.sampling.recording import Recording
from maskdiff.sampling.request import begin


class Answer(NamedTuple):
  """A row of a Request with its slots filled."""

  row: int  # index in the Request
  recording: Recording
  forwards: int  # see state.Carry
  positions: int  # see state.Carry
  broken: bool  # abandoned: its logits were NaN or infinite


def answers(network, c, request, batch):
  """Yields an Answer for each of R rows, as they end.

  Args:
    network: Network.
    c: SamplerConfig.
    request: Request of R rows.
    batch: largest number of rows in progress at once.

  Raises:
    UserError: see `request.begin`.
  """
  carry, layout, shapes = begin(network, c, request)
  requests = len(layout.seeds)
  batch = min(batch, requests)
  row_of = np.arange(batch)  # request row in each row of the batch; -1: none
  waiting = iter(range(batch, requests))
  # The sharding of the loop's result, so that one program serves all calls.
  state = jax.jit(replicate)((_take(carry, row_of), _take(layout, row_of)))
  unanswered = requests
  while unanswered:
    batch_carry, batch_layout = state
    # Without a waiting request no row can be replaced, so all rows run to their
    # end.
    max_active = (row_of >= 0).sum() - 1 if unanswered > batch else 0
    batch_carry = sampler.run(
      network, c, shapes, batch_carry, batch_layout, np.int32(max_active)
    )
    masked, forwards, positions, broken = jax.device_get(
      (
        batch_carry.masked,
        batch_carry.forwards,
        batch_carry.positions,
        batch_carry.broken,
      )
    )
    ended = (row_of >= 0) & ~masked.any((1, 2))
    fill, valid = layout.fill[row_of], layout.valid[row_of]
    recordings = recording.of_rows(batch_carry, fill, valid)
    for i in np.flatnonzero(ended):
      yield Answer(
        int(row_of[i]),
        recordings[i],
        int(forwards[i]),
        int(positions[i]),
        bool(broken[i]),
      )
      row_of[i] = next(waiting, -1)
    unanswered -= int(ended.sum())
    if unanswered:
      replaced = ended & (row_of >= 0)
      rows = np.where(replaced, row_of, 0)
      state = _replace(
        (batch_carry._replace(calls=np.int32(0)), batch_layout),
        (_take(carry, rows), _take(layout, rows)),
        replaced,
      )


def _take(tree, rows):
  """Returns some rows of a Carry or Layout; scalars stay."""
  return jax.tree.map(lambda x: x[rows] if np.ndim(x) else x, tree)


@functools.partial(jax.jit, donate_argnums=0)
def _replace(old, new, replaced):
  """Returns the state with the `replaced` rows taken from the new one."""

  def one(old, new):
    if not old.ndim:
      return old
    return jnp.where(replaced.reshape(-1, *[1] * (old.ndim - 1)), new, old)

  return replicate(jax.tree.map(one, old, new))
