"""Masked copies of rows, by which each method estimates a log-likelihood.

Each function that draws has the arguments of `policy_loss.draw` and returns
device_queries.RowQueries of n copies. The sum over the copies, not their mean,
of weight x log-probability is the log-probability of a token, or summed over
tokens that of an answer. Noise is keyed by the number of a row in the global
batch, as in device_queries.random_numbers: the same key and numbers give the
same masks to the policy, the policy that sampled, and the reference.

Separate functions draw random numbers and make the masks, so that other random
numbers can be used.
"""

import jax
import jax.numpy as jnp

from maskdiff.errors import UserError
from maskdiff.likelihood import device_queries, row_bounds
from maskdiff.likelihood.device_queries import RowQueries
from maskdiff.likelihood.estimators import Estimator
from maskdiff.objectives.schedule import draw_by_number
from maskdiff.objectives.table import OBJECTIVES


def uniform(key, numbers, shape):
  """Returns uniform noise per row: [B, *shape] float32 in [0, 1)."""
  return draw_by_number(lambda k: jax.random.uniform(k, shape), key, numbers)


def scored_slots(s, batch):
  """Returns [B, L] bool, the slots of the answer that carry a loss."""
  return batch.answer if s.after_eos else batch.counted


def bound(network, s, batch, key, numbers):
  """Draws copies for the bound on the log-likelihood (ESPO, VRPO).

  `times` mask counts are drawn per row, with `masks_per_time` masks each; with
  `coupled`, each mask is followed by its complement. Slots after the first eos
  are always masked, unless they belong to the answer (`after_eos`).

  ESPO draws one count for the batch and spreads the others evenly over its
  rows (espo_trainer.py); here rows are independent. Networks that predict from
  left to right have one copy, which masks nothing.
  """
  scored = scored_slots(s, batch)
  pairs = 2 if s.coupled else 1
  e = Estimator('count', s.times * s.masks_per_time * pairs, 1, s.coupled)
  order = OBJECTIVES[network.objective].order
  if order == 'blocks' and s.masks_per_time > 1:
    raise UserError(
      f'masks_per_time={s.masks_per_time}: blocks draw a time for each mask; '
      'set masks_per_time=1 and increase times'
    )
  if order != 'any' or s.masks_per_time == 1:
    queries = row_bounds.draw((network,), e, scored, key, numbers)
  else:
    times, noise = device_queries.random_numbers(
      e, scored.shape[1], key, numbers
    )
    times = jnp.repeat(times[:: s.masks_per_time], s.masks_per_time, axis=0)
    queries = device_queries.exact_count(times, noise, scored, s.coupled)
  hidden = batch.answer & ~scored
  return RowQueries(
    queries.masked | (hidden & queries.masked.any(axis=2, keepdims=True)),
    queries.scored,
    queries.weight / len(queries.weight),
  )


def whole_answer(network, s, batch, key, numbers):
  """Draws one copy, in which the whole answer is masked (d1, wd1).

  Each token of the prompt is masked with probability `prompt_mask`. In d1, each
  inner step has other masks: give it a key of its own.
  """
  noise = uniform(key, numbers, batch.tokens.shape[1:])
  return whole_answer_masks(s, batch, noise)


def whole_answer_masks(s, batch, noise):
  """Returns the copy of `whole_answer` for noise [B, L]."""
  prompt = batch.valid & ~batch.answer & (noise < s.prompt_mask)
  scored = scored_slots(s, batch)[None]
  return RowQueries(
    (prompt | batch.answer)[None], scored, jnp.ones((1, len(noise)))
  )


def coupled_tokens(network, s, batch, key, numbers):
  """Draws three copies: the whole answer masked, a mask and its complement.

  The log-probability of a token is the mean of that in the first copy and of
  that in the copy that masks it, divided by the probability of its mask
  (coupled-GRPO of DiffuCoder, coupled_grpo.py). It is not a bound: its scale
  is about 1.5 times that of a term of the bound. All rows of a batch have the
  same mask ratio.
  """
  low, high = s.time_range
  time_key, noise_key = jax.random.split(key)
  time = jax.random.uniform(time_key, minval=low, maxval=high)
  noise = uniform(noise_key, numbers, batch.tokens.shape[1:])
  return coupled_token_masks(s, batch, time, noise)


def coupled_token_masks(s, batch, time, noise):
  """Returns the copies of `coupled_tokens` for a time and noise [B, L].

  Where the noise equals the time, the published code scores a token with the
  weight of the complement, but masks it in neither copy. Here the complement
  masks it.
  """
  masked = batch.answer & (noise < time)
  other = batch.answer & ~masked
  scored = scored_slots(s, batch)
  all_masked = jnp.stack([batch.answer, masked, other])
  weights = jnp.stack([jnp.ones_like(time), 1 / time, 1 / (1 - time)]) / 2
  weight = jnp.broadcast_to(weights[:, None], (3, len(noise)))
  return RowQueries(all_masked, all_masked & scored, weight)


def random_masks(network, s, batch, key, numbers):
  """Draws `times` copies with random masks, the baseline of TraceRL.

  With `coupled`, each copy is followed by one that masks the complement. Slots
  without a loss are masked in all copies, as in rl_llada.py; rl_sdar.py, for
  block attention, draws their masks too.
  """
  low, high = s.time_range
  time_key, noise_key = jax.random.split(key)
  length = batch.tokens.shape[1]
  times = low + (high - low) * uniform(time_key, numbers, (s.times,))
  noise = uniform(noise_key, numbers, (s.times, length))
  return random_mask_copies(s, batch, times.T, noise.swapaxes(0, 1))


def random_mask_copies(s, batch, times, noise):
  """Returns the copies of `random_masks`.

  Args:
    s: Settings.
    batch: Batch.
    times: [k, B] float32.
    noise: [k, B, L] float32.
  """
  scored = scored_slots(s, batch)
  masked = scored & (noise < times[..., None])
  if s.coupled:
    masked = jnp.stack([masked, scored & ~masked], axis=1)
    masked = masked.reshape(-1, *scored.shape)
  weight = jnp.ones(masked.shape[:2], jnp.float32)
  return RowQueries(masked | (batch.answer & ~scored), masked, weight)
