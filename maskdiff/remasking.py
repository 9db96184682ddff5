"""Commit rules: which of the predictions of a denoising step to keep.

A rule is a function (confidence, masked, budget, keys) -> keep over the S
slots of the current block. Predictions that are not kept are masked again.
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


def keep_top(score, masked, budget):
  """Keeps the `budget` masked slots of highest score, lowest index on ties.

  Args:
    score: [B, S] float32.
    masked: [B, S] bool, slots that may be committed.
    budget: [B] int32.

  Returns:
    [B, S] bool.
  """
  order = jnp.lexsort((-score, ~masked), axis=-1)
  rank = jnp.argsort(order, axis=-1)
  return masked & (rank < budget[:, None])


def low_confidence(confidence, masked, budget, keys):
  """Keeps the most confident predictions (LLaDA, arXiv 2502.09992, alg. 5)."""
  del keys
  return keep_top(confidence, masked, budget)


def random(confidence, masked, budget, keys):
  """Keeps a uniformly random subset (`remasking='random'` of LLaDA's code)."""
  slots = confidence.shape[-1:]
  score = jax.vmap(lambda key: jax.random.uniform(key, slots))(keys)
  return keep_top(score, masked, budget)


RULES = {'low_confidence': low_confidence, 'random': random}
