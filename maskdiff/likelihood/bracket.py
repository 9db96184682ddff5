"""Brackets the log-likelihood of decoding in random orders, from both sides.

A model that decodes an answer in a random order produces it with the
probability p = E[p(answer | order)], a mean over all orders. The bounds of
bounds.py are below log p. For any psi > 0,

  log p <= p / psi + log psi - 1,

with equality at psi = p, because the logarithm is concave (TUBE, arXiv
2605.24292). The right side is linear in p, so that a mean over random orders
estimates it without bias, if psi does not depend on these orders.
"""

from typing import NamedTuple

import numpy as np

from maskdiff.errors import UserError
from maskdiff.likelihood import bounds
from maskdiff.likelihood.bounds import Estimate

MAX_ORDERS = 1000  # the standard error takes K^3 operations


class Bracket(NamedTuple):
  """Bounds on the log-likelihood of each of B answers.

  Attributes:
    lower: Estimate, the importance-weighted bound of `bounds.multi_sample`.
    upper: Estimate whose expectation is at least log p.
    effective_orders: [B] float64, (sum p)^2 / sum p^2 over the K orders, in
      [1, K]. If few of the orders carry the mean, another draw may contain an
      order with a much larger p: the upper estimate is then often below log p,
      and its standard error too small.
  """

  lower: Estimate
  upper: Estimate
  effective_orders: np.ndarray


def bracket(network, c, answers, num_orders, seeds, progress=None):
  """Estimates both bounds from the same K random orders.

  An order takes one forward pass per token of the answer. Arguments as for
  `bounds.multi_sample`.

  Args:
    num_orders: K, from 2 to MAX_ORDERS.

  Returns:
    Bracket.

  Raises:
    UserError: num_orders is out of range; or the network is left-to-right.
  """
  if not 2 <= num_orders <= MAX_ORDERS:
    raise UserError(
      f'num_orders={num_orders} must be at least 2 for an upper bound, and at '
      f'most {MAX_ORDERS}'
    )
  log_p = np.array(
    bounds.random_orders(network, c, answers, num_orders, seeds, progress)
  )
  p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
  return Bracket(
    lower=bounds.log_mean(log_p),
    upper=upper_bound(log_p),
    effective_orders=p.sum(axis=1) ** 2 / (p**2).sum(axis=1),
  )


def upper_bound(log_p):
  """Returns the upper bound from log-likelihoods in K random orders.

  The psi of an order is the mean of p over the other orders, so it does not
  depend on that order. The estimate is the mean over the K choices of an order.
  The standard error is that of the jackknife.

  Args:
    log_p: [B, K] float64, nats, K at least 2.

  Returns:
    Estimate; stderr is nan for K = 2.
  """
  peak = log_p.max(axis=1, keepdims=True)
  p = np.exp(log_p - peak)
  k = p.shape[1]
  stderr = np.full(len(p), np.nan)
  if k > 2:
    without = np.stack(
      [_upper(np.delete(p, i, axis=1)) for i in range(k)], axis=1
    )
    stderr = np.sqrt((k - 1) * without.var(axis=1))
  return Estimate(peak[:, 0] + _upper(p), stderr)


def _upper(p):
  """Returns [B], the upper bound on the log of the mean of p, [B, K]."""
  total = p.sum(axis=1, keepdims=True)
  # Not `total - p`, which cancels if one order has nearly all of the sum.
  others = np.stack(
    [np.delete(p, i, axis=1).sum(axis=1) for i in range(p.shape[1])], axis=1
  )
  others = np.maximum(others, np.finfo(float).tiny * total)
  psi = others / (p.shape[1] - 1)
  return (p / psi + np.log(psi) - 1).mean(axis=1)
