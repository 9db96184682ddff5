"""Commit rules: which of the predictions of a denoising step to keep.

A rule is a function (confidence, masked, budget, keys) -> keep over the S
slots of the current block:

    confidence  [B, S] float32, higher is surer; see candidates.CONFIDENCES
    masked      [B, S] bool, slots that may be committed
    budget      what the rule may commit at this step: [B] int32 tokens, or the
                number that the rule's docstring says
    keys        [B] PRNG keys, one per row
    keep        [B, S] bool, a part of `masked`

Predictions that are not kept are masked again. A rule looks at each row alone.
"""

import jax
import jax.numpy as jnp


def quota(num_masked, step, steps):
  """How many tokens to commit at `step` so that `steps` steps commit them all.

  M // steps each, the first M % steps steps one more
  (`get_num_transfer_tokens` in LLaDA's generate.py).

  Args:
    num_masked: int32, M: masked tokens of the block before its first step.
    step: int32, 0-based step within the block.
    steps: steps for the block.

  Returns:
    int32 like `num_masked`.
  """
  return num_masked // steps + (step < num_masked % steps)


def quota_to(ratio, num_slots, num_masked):
  """How many tokens to commit so that a share `ratio` of a block stays masked.

  What stays masked is rounded down, as in the code of MaskGIT (arXiv
  2202.04200); at least one is committed, or the step would be for nothing.

  Args:
    ratio: float32 in [0, 1], share to be masked after this step.
    num_slots: int32, slots of the block.
    num_masked: int32, of them masked now.

  Returns:
    int32 like `num_masked`.
  """
  # So that the rounding of float32 does not take a whole number for less.
  stay = jnp.floor(num_slots * ratio + 1e-3).astype(jnp.int32)
  return jnp.maximum(num_masked - stay, 1)


def ranks(score, masked):
  """The place of each masked slot by falling score, the lowest index on ties.

  Args:
    score: [B, S] float32.
    masked: [B, S] bool.

  Returns:
    [B, S] int32 from 0; slots that are not masked come last.
  """
  order = jnp.lexsort((-score, ~masked), axis=-1)
  return jnp.argsort(order, axis=-1)


def keep_top(score, masked, budget):
  """Keeps the `budget` masked slots of highest score, lowest index on ties.

  Args:
    score: [B, S] float32.
    masked: [B, S] bool, slots that may be committed.
    budget: [B] int32.

  Returns:
    [B, S] bool.
  """
  return masked & (ranks(score, masked) < budget[:, None])


def uniform(keys, slots):
  """[B, slots] float32 in [0, 1), of each row by its own key."""
  return jax.vmap(lambda key: jax.random.uniform(key, (slots,)))(keys)


def low_confidence(confidence, masked, budget, keys):
  """Keeps the most confident predictions (LLaDA, arXiv 2502.09992, alg. 5)."""
  del keys
  return keep_top(confidence, masked, budget)


def random(confidence, masked, budget, keys):
  """Keeps a uniformly random subset (`remasking='random'` of LLaDA's code)."""
  return keep_top(uniform(keys, confidence.shape[-1]), masked, budget)


def threshold(confidence, masked, budget, keys):
  """Keeps what reaches a confidence, and the most confident slot in any case.

  Fast-dLLM, arXiv 2505.22618. `budget` is the confidence, a
  float; above 1 it leaves one token a step, at 0 the block takes one step.
  """
  del keys
  first = ranks(confidence, masked) == 0
  return masked & (first | (confidence >= budget))


def factor(confidence, masked, budget, keys):
  """Keeps the n most confident while the n-th has at least 1 - f / (n + 1).

  Fast-dLLM, arXiv 2505.22618: with f = 1 these are tokens that
  are as probable together as one by one. `budget` is f, a float. The most
  confident slot is kept in any case. Confidences fall with n and the bounds
  rise, so that a slot can be judged by its own. Some published code keeps one
  slot more when all slots pass but the last; this follows the formula.
  """
  del keys
  rank = ranks(confidence, masked)
  return masked & ((rank == 0) | (confidence >= 1 - budget / (rank + 2)))


def ancestral(confidence, masked, budget, keys):
  """Keeps every prediction on its own with a chance, whatever its confidence.

  The reverse process from time t to s: a masked token is unmasked with
  probability 1 - mask_ratio(s) / mask_ratio(t) (LLaDA, arXiv 2502.09992,
  eq. 10; MDLM, arXiv 2406.07524). `budget` is that, [B] float32. LLaDA's
  algorithm 4 is this; its code keeps a fixed number instead, see `random`.
  """
  chance = budget[:, None]
  return masked & (uniform(keys, confidence.shape[-1]) < chance)


def first_hitting(confidence, masked, budget, keys):
  """Keeps one slot, uniformly at random.

  The reverse process in continuous time, without its waiting times: those of
  the slots are independent and alike, so that the next one is any of them, and
  the network does not see the time (arXiv 2409.02908). The budget
  is not read: a block takes as many steps as it has slots.
  """
  one = jnp.ones_like(budget, jnp.int32)
  return random(confidence, masked, one, keys)


RULES = {
  'low_confidence': low_confidence,
  'random': random,
  'threshold': threshold,
  'factor': factor,
  'ancestral': ancestral,
  'first_hitting': first_hitting,
}
