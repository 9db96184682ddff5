"""Remasking rules: which predictions a denoising step commits.

A rule is a function (confidence, masked, budget, keys) -> committed over the S
slots of the current block:

    confidence  [B, S] float32; see candidates.CONFIDENCES
    masked      [B, S] bool, slots that may be committed
    budget      [B] int32, number of tokens to commit in this step; some rules
                take [B] float32 of another quantity, or two arrays, named in
                their docstring
    keys        [B] PRNG keys, one per row; or the uniform numbers [B, S]
    committed   [B, S] bool, a subset of `masked`

The other slots stay masked. The result for a row depends on that row only.
"""

import jax
import jax.numpy as jnp


def quota(num_masked, step, steps):
  """Returns the number of tokens to commit in a step of a linear schedule.

  M // steps tokens, and one more in the first M % steps steps
  (`get_num_transfer_tokens` in LLaDA's generate.py).

  Args:
    num_masked: int32, M, masked tokens of the block before its first step.
    step: int32, 0-based step within the block.
    steps: steps for the block.

  Returns:
    int32 like `num_masked`.
  """
  return num_masked // steps + (step < num_masked % steps)


def quota_to(ratio, num_slots, num_masked):
  """Returns the number of tokens to commit so that a given share stays masked.

  The number of slots that stay masked is rounded down, as in the code of
  MaskGIT (arXiv 2202.04200). At least one token is committed.

  Args:
    ratio: float32 in [0, 1], share of the slots to leave masked.
    num_slots: int32, slots of the block.
    num_masked: int32, slots of the block that are masked now.

  Returns:
    int32 like `num_masked`.
  """
  # 1e-3: float32 rounding can make an integer product slightly too small.
  left = jnp.floor(num_slots * ratio + 1e-3).astype(jnp.int32)
  return jnp.maximum(num_masked - left, 1)


def ranks(score, masked):
  """Returns the rank of each slot by falling score, lowest index on ties.

  Args:
    score: [B, S] float32.
    masked: [B, S] bool.

  Returns:
    [B, S] int32 from 0; slots that are not masked rank last.
  """
  order = jnp.lexsort((-score, ~masked), axis=-1)
  return jnp.argsort(order, axis=-1)


def commit_top(score, masked, budget):
  """Commits the `budget` masked slots of highest score, lowest index on ties.

  Args:
    score: [B, S] float32.
    masked: [B, S] bool, slots that may be committed.
    budget: [B] int32.

  Returns:
    [B, S] bool.
  """
  return masked & (ranks(score, masked) < budget[:, None])


def uniform(keys, slots):
  """Returns [B, slots] float32 in [0, 1), each row from its own key.

  `keys` may also be these numbers, which are then returned.
  """
  if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
    return keys
  return jax.vmap(lambda key: jax.random.uniform(key, (slots,)))(keys)


def low_confidence(confidence, masked, budget, keys):
  """Commits the most confident tokens (LLaDA, arXiv 2502.09992, alg. 5)."""
  del keys
  return commit_top(confidence, masked, budget)


def random(confidence, masked, budget, keys):
  """Commits a uniformly random subset (`remasking='random'` in LLaDA)."""
  return commit_top(uniform(keys, confidence.shape[-1]), masked, budget)


def threshold(confidence, masked, budget, keys):
  """Commits the most confident slot, and all that reach a confidence threshold.

  Fast-dLLM, arXiv 2505.22618. `budget` is the threshold, [B] float32. A
  threshold above 1 commits one token per step. At 0, a block takes one step.
  """
  del keys
  first = ranks(confidence, masked) == 0
  return masked & (first | (confidence >= budget[:, None]))


def quota_and_threshold(confidence, masked, budget, keys):
  """Commits the most confident slots, and all that reach a threshold.

  SDAR's dynamic remasking (arXiv 2510.06303). `budget` is the number of most
  confident slots, [B] int32, and the threshold, [B] float32. The rule is
  `threshold` if the number is 1, and `low_confidence` if the threshold is above
  1.
  """
  del keys
  number, least = budget
  top = commit_top(confidence, masked, number)
  return top | (masked & (confidence >= least[:, None]))


def factor(confidence, masked, budget, keys):
  """Commits the n most confident, if the n-th has at least 1 - f / (n + 1).

  Fast-dLLM, arXiv 2505.22618: with f = 1, the most probable token of each slot
  is also part of the most probable joint assignment. `budget` is f, [B]
  float32. The most confident slot is always committed. Confidences fall with n
  while the thresholds rise, so each slot can be compared with its own
  threshold. If only the last slot falls short of its threshold, some published
  code commits it too; this code follows the formula.
  """
  del keys
  rank = ranks(confidence, masked)
  least = 1 - budget[:, None] / (rank + 2)
  return masked & ((rank == 0) | (confidence >= least))


def ancestral(confidence, masked, budget, keys):
  """Commits each slot independently, with the same probability.

  The reverse process from time t to s: a masked token is unmasked with
  probability 1 - mask_ratio(s) / mask_ratio(t) (LLaDA, arXiv 2502.09992,
  eq. 10; MDLM, arXiv 2406.07524). `budget` is this probability, [B] float32.
  The rule is LLaDA's algorithm 4. LLaDA's code commits a fixed number of tokens
  instead, see `random`.
  """
  probability = budget[:, None]
  return masked & (uniform(keys, confidence.shape[-1]) < probability)


def first_hitting(confidence, masked, budget, keys):
  """Commits one slot, uniformly at random.

  The reverse process in continuous time (arXiv 2409.02908). The unmasking times
  of slots are independent and identically distributed, so each masked slot is
  equally likely to be next. The times themselves are not sampled, since the
  network has no time input. The budget is not read: a block takes one step per
  slot.
  """
  one = jnp.ones_like(budget, jnp.int32)
  return random(confidence, masked, one, keys)


def longest_prefix(confidence, masked, budget, keys):
  """Commits tokens from left to right while each is confident enough.

  Longest prefix decoding in the code of SDLM (arXiv 2509.24007,
  sdlm_generator.py): each confidence must exceed the threshold, `budget`, [B]
  float32. The first token is always committed. A threshold of 1 commits one
  token per step, and one below 0 all of them.
  """
  del keys
  exceeds = jnp.where(masked, confidence > budget[:, None], True)
  return _prefix(masked, jnp.cumprod(exceeds, axis=1) > 0)


def cumulative_prefix(confidence, masked, budget, keys):
  """Commits tokens from left to right while their joint confidence is enough.

  Longest prefix decoding in the paper of SDLM (arXiv 2509.24007, eq. 7): the
  product of the confidences must be at least the threshold, `budget`, [B]
  float32. The first token is always committed. The product is at most the least
  confidence, so that the rule commits no more than `longest_prefix`, except
  where a confidence equals the threshold. A threshold of 1 commits one token
  per step.
  """
  del keys
  product = jnp.cumprod(jnp.where(masked, confidence, 1.0), axis=1)
  least = budget[:, None]
  # Only rounding makes a confidence 1.
  return _prefix(masked, (product >= least) & (least < 1))


def _prefix(masked, accepted):
  """Returns the accepted masked slots, and the first masked slot."""
  first = jnp.cumsum(masked, axis=1) == 1
  return masked & (accepted | first)


RULES = {
  'low_confidence': low_confidence,
  'random': random,
  'threshold': threshold,
  'quota_and_threshold': quota_and_threshold,
  'factor': factor,
  'ancestral': ancestral,
  'first_hitting': first_hitting,
  'longest_prefix': longest_prefix,
  'cumulative_prefix': cumulative_prefix,
}
