"""TraceRL: copies of a row along the steps in which it was sampled.

Each step of the sampler becomes a copy: the slots that were masked before the
step are masked, and the tokens that the step committed are scored. With one
step per copy and full attention, the sum of the scored log-probabilities is
that with which a sampler at temperature 1 draws these tokens in this order
(dLLM-RL, rl_llada.py and rl_sdar.py).
"""

import functools

import jax
import jax.numpy as jnp

from maskdiff.errors import UserError
from maskdiff.likelihood import device_queries
from maskdiff.likelihood.device_queries import RowQueries
from maskdiff.objectives.table import OBJECTIVES
from maskdiff.rl.copies import scored_slots


def steps_of(history, mask_id):
  """Returns the step at which each token appeared, counted from 0.

  Args:
    history: [S, B, L] int32, rows after each of S steps.
    mask_id: id of the mask token.

  Returns:
    [B, L] int32, S where a token never appeared; 0 in the prompt.
  """
  return (history == mask_id).sum(axis=0).astype(jnp.int32)


def merged(steps, answer, shrink, block_length=0):
  """Returns the number of the copy that scores each slot, counted from 0.

  The distinct steps of a row are sorted, and `shrink` neighbours are merged.
  With blocks, this is done within each block: copy i advances all blocks by
  their i-th merged step, so that a row has as many copies as its longest block.

  Args:
    steps: [B, L] int32.
    answer: [B, L] bool.
    shrink: steps per copy.
    block_length: positions of a block, counted from the start of the row, for
      networks that are trained on blocks; 0: the answer is one block.

  Returns:
    [B, L] int32, -1 outside the answer.
  """
  length = steps.shape[1]
  block = jnp.arange(length) // (block_length or length)
  block = jnp.where(answer, block, length)
  order = jnp.lexsort((steps, block), axis=1)
  take = functools.partial(jnp.take_along_axis, axis=1)
  changes = lambda x: jnp.diff(take(x, order), axis=1, prepend=-1) != 0
  begins = changes(block)
  rank = jnp.cumsum(begins | changes(steps), axis=1)
  first = jax.lax.cummax(jnp.where(begins, rank, 0), axis=1)
  number = take(rank - first, jnp.argsort(order, axis=1))
  return jnp.where(answer, number // shrink, -1)


def along_trace(network, s, batch, key, numbers):
  """Returns one copy per merged step of the sampler. Nothing is drawn.

  A copy advances all blocks at once if the network is trained on blocks: each
  noisy block sees the clean blocks before it.
  """
  number = merged(batch.steps, batch.answer, s.shrink, network.block_length)
  index = jnp.arange(s.copies or number.shape[1])[:, None, None]
  committed = batch.answer & (number == index)
  padding = committed & ~scored_slots(s, batch)
  few = padding & (jnp.cumsum(padding, axis=2) <= s.padding_per_copy)
  return RowQueries(
    batch.answer & (number >= index),
    (committed & ~padding) | few,
    jnp.ones((len(index), len(number)), jnp.float32),
  )


def left_to_right(network, s, batch, key, numbers):
  """Returns one copy per slot, in which it and all later slots are masked.

  The log-probabilities are those of the chain rule from left to right, without
  an approximation, as if the answer had been sampled in this order (JustGRPO,
  arXiv 2601.15165). Networks that predict from left to right need one copy.
  """
  if OBJECTIVES[network.objective].likelihood == 'exact':
    return device_queries.causal(scored_slots(s, batch))
  return along_trace(network, s, in_order(batch), key, numbers)


def in_order(batch):
  """Returns a Batch whose slots were sampled from left to right."""
  index = jnp.arange(batch.tokens.shape[1])
  return batch._replace(steps=jnp.broadcast_to(index, batch.tokens.shape))


def check_copies(network, s, batch):
  """Raises a UserError if `s.copies` leaves tokens without a copy.

  Called on the host: copies along a trace have a fixed number, and a token
  beyond them would have no loss.

  Args:
    network: Network.
    s: Settings.
    batch: Batch; `in_order(batch)` for `left_to_right`.
  """
  number = merged(batch.steps, batch.answer, s.shrink, network.block_length)
  needed = int(number.max()) + 1
  if 0 < s.copies < needed:
    raise UserError(
      f'copies={s.copies}, but the steps of an answer, merged by '
      f'shrink={s.shrink}, need {needed}; set copies={needed} or 0'
    )
