"""The loss of a method for sampled answers: draw copies, then compute it.

A training step calls three functions:

  queries = draw(name, policy, s, batch, key, numbers)
  new, reference = row_bounds.log_probs(
    (policy, reference), answers(batch), queries, chunk
  )
  value, metrics = loss(
    name, s, LogProbs(new, reference=reference), queries, batch, advantages
  )

and differentiates the value by the parameters of the policy. All networks see
the same masks (common random numbers). A later call of `draw` with the same key
and row numbers draws the same masks, so the log-probabilities of fixed networks
can be computed once per inner step and stored.
"""

from typing import NamedTuple

import jax

from maskdiff.errors import UserError
from maskdiff.likelihood.queries import Answers
from maskdiff.objectives.table import OBJECTIVES
from maskdiff.rl import divergence, table


class LogProbs(NamedTuple):
  """Log-probabilities of scored tokens, [n, B, L] float32, 0 elsewhere.

  They come from row_bounds.log_probs, for the same queries. `old` is that of
  the policy that sampled the answers; None: it is the policy itself, as at the
  first inner step. `reference` is needed if `kl_weight` is not 0 and `kl_to` is
  'reference', and by preferences.
  """

  new: jax.Array
  old: jax.Array | None = None
  reference: jax.Array | None = None


def answers(batch):
  """Returns the queries.Answers of a Batch, for `row_bounds.log_probs`."""
  return Answers(batch.tokens, batch.answer, batch.valid)


def draw(name, network, s, batch, key, numbers):
  """Draws the masked copies of the rows of a batch.

  Args:
    name: a key of table.METHODS.
    network: model.network.Network, the policy.
    s: Settings.
    batch: Batch.
    key: PRNG key of the inner step.
    numbers: [B] int32, numbers of the rows in the global batch.

  Returns:
    device_queries.RowQueries of n copies; each takes one forward pass per
    network.

  Raises:
    UserError: the network has no mask token, or the steps of the sampler are
      missing.
  """
  method = table.find(name)
  if method.masks and OBJECTIVES[network.objective].left_to_right:
    raise UserError(
      f'method {name} masks tokens, and a network trained with objective '
      f'{network.objective} has no mask token; use one of {_without_masks()}'
    )
  if method.needs_steps and batch.steps is None:
    raise UserError(
      f'method {name} needs the step at which each slot was filled'
    )
  with jax.named_scope('part(noise)'):
    return method.draw(network, s, batch, key, numbers)


def loss(name, s, log_probs, queries, batch, advantages):
  """Computes the loss of a batch.

  Args:
    name: a key of table.METHODS.
    s: Settings.
    log_probs: LogProbs. Only `new` is differentiated.
    queries: device_queries.RowQueries, from `draw`.
    batch: Batch. For preferences, rows are chosen, rejected, chosen, ...
    advantages: [B] float32, from advantages.advantages; preferences ignore
      them.

  Returns:
    float32 scalar to minimize; and metrics, a dict of float32 scalars: those of
    the method, clipped.ratio_metrics or weighted.preference_metrics, and `kl`,
    if there is a policy to compare with.

  Raises:
    UserError: the reference is missing.
  """
  method = table.find(name)
  new = log_probs.new
  fixed = jax.lax.stop_gradient  # of None: None
  old = fixed(new if log_probs.old is None else log_probs.old)
  to_old = s.kl_to == 'old' and not method.needs_reference
  other = old if to_old else fixed(log_probs.reference)
  if other is None and (s.kl_weight or method.needs_reference):
    raise UserError(
      f'method {name} needs a reference network; or set kl_weight=0'
    )
  u = method.units(s, new, old, other, queries, batch, advantages)
  value = method.objective(s, u)
  metrics = fixed(method.metrics(s, u))
  # The answers of pairs are not samples of the policy.
  if other is not None and (s.kl_weight or not method.pairs):
    kl = method.mean(divergence.ESTIMATES[s.kl](u.gap) / u.size, u)
    metrics['kl'] = fixed(kl)
    if s.kl_weight:
      value = value + s.kl_weight * kl
  return value, metrics


def _without_masks():
  return ', '.join(name for name, m in table.METHODS.items() if not m.masks)
