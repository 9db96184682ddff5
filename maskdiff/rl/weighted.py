"""Losses that weigh log-likelihoods of answers, without clipped ratios."""

import jax
import jax.numpy as jnp

from maskdiff.errors import UserError


def reinforce(s, units):
  """Returns -mean(A log p), the policy gradient for fresh samples."""
  return -(units.advantages * units.score).sum() / len(units.score)


def wd1(s, units):
  """Returns the sum of (softmax(-A) - softmax(A)) log p over answers (wd1).

  log p is a sum over tokens, so long answers weigh more. The weights do not
  depend on the policy: no ratio limits how far it moves. The published code
  takes the softmax over the batch of one device, which is one group in its
  settings (rev_grpo_trainer.py); the paper takes it over a group.
  """
  a = units.advantages.reshape(-1, s.group if s.softmax_over == 'group' else 1)
  axis = 1 if s.softmax_over == 'group' else 0
  weights = jax.nn.softmax(-a, axis=axis) - jax.nn.softmax(a, axis=axis)
  return (weights.reshape(-1) * units.score).sum()


def spg(s, units):
  """Returns -sum(A score n) / sum(n), n the tokens of an answer (SPG)."""
  a = units.advantages
  a = jnp.where(a > 0, a, s.negative_weight * a)
  total = (a * units.score * units.slots).sum()
  return -total / jnp.maximum(units.slots.sum(), 1)


def self_normalized(s, units):
  """Returns -sum(w A score), w the clipped ratios divided by their sum.

  The weights have no gradient. Ratios are cut at `max_ratio` whatever the sign
  of the advantage, and their sum replaces the size of the batch, so that the
  update is a weighted mean of the gradients of the answers (StableDRL,
  llada_svpo.py of JianyuanZhong/StableDRL).
  """
  log_ratio = jnp.minimum(units.log_ratio, jnp.log(s.max_ratio))
  weights = jax.nn.softmax(jax.lax.stop_gradient(log_ratio))
  return -(weights * units.advantages * units.score).sum()


def preference(s, units):
  """Returns the loss of preferences, for rows chosen, rejected, chosen, ...

  The loss of a pair is -log sigmoid(beta x (gap of the chosen - gap of the
  rejected answer)), where the gap of an answer is its bound under the policy
  minus its bound under the reference (DPO; VRPO, arXiv 2505.19223). Bounds are
  sums over tokens. Policy and reference share the masks of an answer; the two
  answers do not share theirs. The loss of an estimate is biased upwards.
  """
  if len(units.score) % 2:
    raise UserError(
      f'{len(units.score)} rows are not pairs of a chosen and a rejected answer'
    )
  margin = _margin(s, units)
  nll = _total_nll(units)[::2] / jnp.maximum(units.slots[::2], 1)
  return (jax.nn.softplus(-margin) + s.chosen_weight * nll).mean()


def _margin(s, units):
  """Returns beta x the difference of the gaps of each pair, [B / 2]."""
  return s.preference_scale * (units.gap[::2] - units.gap[1::2])


def _total_nll(units):
  """Returns the bound on the negative log-likelihood of each answer, [B]."""
  return -units.score * units.size  # the score may be per token


def preference_metrics(s, units):
  """Returns metrics of pairs, a dict of float32 scalars.

  preference_loss: -log sigmoid(margin), without the term of `chosen_weight`.
  preference_accuracy: share of pairs with a positive margin, the accuracy of
    the implicit reward of DPO; a margin of 0 counts half.
  margin: mean.
  chosen_nats_per_token, rejected_nats_per_token: bounds on the negative
    log-likelihood, over all tokens of these answers.
  """
  margin = _margin(s, units)
  total = _total_nll(units)

  def nats_per_token(first):
    return total[first::2].sum() / jnp.maximum(units.slots[first::2].sum(), 1)

  return {
    'preference_loss': jax.nn.softplus(-margin).mean(),
    'preference_accuracy': ((jnp.sign(margin) + 1) / 2).mean(),
    'margin': margin.mean(),
    'chosen_nats_per_token': nats_per_token(0),
    'rejected_nats_per_token': nats_per_token(1),
  }
