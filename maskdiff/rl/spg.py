"""SPG: scores of answers from a lower and an upper bound, and their masks.

Sandwiched policy gradient: the score of an answer with a positive advantage is
a lower bound on its log-likelihood per token, and that of other answers mixes
the lower bound with an upper bound (spg_trainer.py of facebookresearch/SPG).
"""

import jax
import jax.numpy as jnp

from maskdiff.likelihood.device_queries import RowQueries
from maskdiff.rl.copies import scored_slots, uniform
from maskdiff.rl.units import Units, weigh


def block_masks(network, s, batch, key, numbers):
  """Draws `times` copies, each of which masks a part of one block.

  The blocks of a row are drawn without replacement. The blocks before the drawn
  block are clean and those after it are masked, as in a sampler that fills
  blocks. In the drawn block, between one and all of its tokens are masked. Each
  token before the block, of the prompt or of the answer, is masked with
  probability `prompt_mask`. Slots after the first eos are always masked.

  All masked slots of the answer are scored, also those after the block and
  before it, as in the published code, whose mask of the block has no effect.
  Blocks repeat if there are fewer than `times`. The published code permutes
  the blocks of the longest possible answer and takes the remainder by the
  number of blocks, so blocks of short answers repeat more often.
  """
  length = batch.tokens.shape[1]
  blocks = -(-length // s.block_length)
  keys = jax.random.split(key, 4)
  used = -(-scored_slots(s, batch).sum(axis=1, keepdims=True) // s.block_length)
  order = uniform(keys[0], numbers, (blocks,))
  order = jnp.where(jnp.arange(blocks) < used, order, jnp.inf).argsort(axis=1)
  index = jnp.arange(s.times) % jnp.maximum(used, 1)
  block = jnp.take_along_axis(order, index, axis=1)
  share = uniform(keys[1], numbers, (s.times,))
  noise = uniform(keys[2], numbers, (s.times, length))
  prompt_noise = uniform(keys[3], numbers, (s.times, length))
  by_copy = lambda x: x.swapaxes(0, 1)
  return block_mask_copies(
    s, batch, *map(by_copy, (block, share, noise, prompt_noise))
  )


def block_mask_copies(s, batch, block, share, noise, prompt_noise):
  """Returns the copies of `block_masks` for given random numbers.

  Args:
    s: Settings.
    batch: Batch.
    block: [T, B] int32, the block of each copy.
    share: [T, B] float32 in [0, 1), which determines the number of masks.
    noise: [T, B, L] float32; the tokens of lowest noise are masked.
    prompt_noise: [T, B, L] float32; a token before the block is masked where
      it is below `prompt_mask`.
  """
  scored = scored_slots(s, batch)
  slot_block = (jnp.cumsum(batch.answer, axis=1) - 1) // s.block_length
  block = block[..., None]
  own = scored & (slot_block == block)
  size = own.sum(axis=2)
  count = 1 + jnp.floor(share * size).astype(jnp.int32)
  order = jnp.argsort(jnp.where(own, noise, jnp.inf), axis=2)
  rank = jnp.argsort(order, axis=2)
  chosen = own & (rank < count[..., None])
  later = batch.answer & (slot_block > block)
  before = batch.valid & ~(batch.answer & (slot_block >= block))
  masked = chosen | later | (batch.answer & ~scored)
  return copies(s, batch, masked | (before & (prompt_noise < s.prompt_mask)))


def copies(s, batch, masked):
  """Returns the RowQueries of masks [T, B, L], with the weights of the bound.

  The lower bound per token is the mean over copies of the mean log-probability
  of the scored tokens: the weight 1/t cancels against their number.
  """
  scored = masked & scored_slots(s, batch)
  number = scored.sum(axis=2)
  weight = 1 / (len(masked) * jnp.maximum(number, 1).astype(jnp.float32))
  return RowQueries(masked, scored, weight)


def units(s, new, old, other, queries, batch, advantages):
  """Returns Units of answers whose score is a bound by the sign of advantages.

  Ratios and gaps are those of the lower bound. Arguments as units.of_copies.
  """
  lower = lambda x: weigh(x, queries).sum(axis=(0, 2))
  slots = scored_slots(s, batch).sum(axis=1).astype(jnp.float32)
  lower_new = lower(new)
  mixed = (1 - s.upper_share) * lower_new
  if s.upper_share:
    above = upper_bound(new, queries.scored, slots, s.upper_power)
    mixed = mixed + s.upper_share * above
  return Units(
    score=jnp.where(advantages > 0, lower_new, mixed),
    log_ratio=lower_new - lower(old),
    gap=None if other is None else lower_new - lower(other),
    size=1.0,
    where=slots > 0,
    advantages=advantages,
    slots=slots,
  )


def upper_bound(log_probs, scored, slots, power):
  """Returns the upper bound on the log-likelihood per token.

  The mean over tokens j, masked in at least one copy, of log(mean over copies
  of [j scored] p_j^power / t) / power, where t is the share of the answer that
  a copy scores. The published code leaves out tokens whose p_j^power underflows
  to 0. Here it is computed from logarithms. Few copies estimate the bound, and
  the estimate is not a bound.

  Args:
    log_probs: [T, B, L].
    scored: [T, B, L] bool.
    slots: [B], tokens of each answer.
    power: beta.

  Returns:
    [B] float32 nats.
  """
  share = scored.sum(axis=2) / jnp.maximum(slots, 1)  # [T, B]
  log_share = jnp.log(jnp.where(share > 0, share, 1))[..., None]
  found = scored.any(axis=0)
  # Finite at tokens that no copy scores, so that their gradient is 0.
  terms = jnp.where(found & ~scored, -jnp.inf, power * log_probs - log_share)
  of_token = jax.nn.logsumexp(terms, axis=0) - jnp.log(len(scored))
  total = jnp.where(found, of_token, 0).sum(axis=1) / power
  return total / jnp.maximum(found.sum(axis=1), 1)
