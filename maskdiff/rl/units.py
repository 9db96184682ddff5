"""Log-probabilities of answers or tokens, of which ratios are computed.

Each unit has one ratio. A unit is an answer (arrays of shape [B]), a token of
an answer ([B, L]), or a token of a masked copy ([n, B, L]).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskdiff.rl.copies import scored_slots


class Units(NamedTuple):
  """Units of a batch; arrays broadcast against the shape of `score`."""

  score: jax.Array  # log-probabilities under the policy, with a gradient
  log_ratio: jax.Array  # log policy - log policy that sampled
  gap: jax.Array | None  # log policy - log other, for the divergence
  size: jax.Array | float  # the divergence of a unit is divided by it
  where: jax.Array  # bool, units that exist
  advantages: jax.Array  # one per row
  slots: jax.Array  # tokens of an answer, by which some means divide


def of_copies(s, new, old, other, queries, batch, advantages):
  """Returns the tokens of the copies as units.

  Args:
    s: Settings.
    new: [n, B, L], log-probabilities of scored tokens under the policy, 0
      elsewhere.
    old: the same under the policy that sampled the answers.
    other: the same under the policy from which the divergence is computed; or
      None.
    queries: device_queries.RowQueries.
    batch: Batch.
    advantages: [B].
  """
  slots = batch.answer.sum(axis=1).astype(jnp.float32)
  return Units(
    score=new,
    log_ratio=_cut(s, new - old),
    gap=None if other is None else _cut(s, new - other),
    size=1.0,
    where=queries.scored,
    advantages=advantages[None, :, None],
    slots=slots[None, :, None],
  )


def of_tokens(s, new, old, other, queries, batch, advantages):
  """Returns the tokens of the answers as units; arguments as `of_copies`."""
  total = lambda x: None if x is None else weigh(x, queries).sum(axis=0)
  new, old, other = map(total, (new, old, other))
  where = scored_slots(s, batch)
  return Units(
    score=new,
    log_ratio=_cut(s, new - old),
    gap=None if other is None else _cut(s, new - other),
    size=1.0,
    where=where,
    advantages=advantages[:, None],
    slots=where.sum(axis=1, keepdims=True).astype(jnp.float32),
  )


def of_sequences(s, new, old, other, queries, batch, advantages):
  """Returns the answers as units; arguments as `of_copies`.

  With `s.per_token`, `log_ratio` and `score` are divided by the number of
  tokens. `gap` is not: the estimate of the divergence is (ESPO).
  """
  total = lambda x: None if x is None else weigh(x, queries).sum(axis=(0, 2))
  new, old, other = map(total, (new, old, other))
  slots = scored_slots(s, batch).sum(axis=1).astype(jnp.float32)
  size = jnp.maximum(slots, 1) if s.per_token else 1.0
  return Units(
    score=new / size,
    log_ratio=_cut(s, (new - old) / size),
    gap=None if other is None else new - other,
    size=size,
    where=slots > 0,
    advantages=advantages,
    slots=slots,
  )


def weigh(log_probs, queries):
  """Returns weight x log-probability of scored tokens, 0 elsewhere."""
  weight = queries.weight
  weight = weight[..., None] if weight.ndim == 2 else weight
  return jnp.where(queries.scored, weight * log_probs, 0)


def _cut(s, x):
  return jnp.clip(x, -s.max_log_ratio, s.max_log_ratio)
