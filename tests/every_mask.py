"""The bound of a short answer, by enumeration of all masks."""

from fractions import Fraction

import numpy as np

from maskdiff.likelihood import estimators


def subsets(size):
  """Returns [2^A, A] bool; row r masks the tokens whose bits are set in r."""
  return (np.arange(2**size)[:, None] >> np.arange(size) & 1).astype(bool)


def elbo(table):
  """Returns the bound: sum over l of 1/l x mean of S over sets of l masks."""
  masked = subsets(table.shape[1])
  sums, counts = np.where(masked, table, 0).sum(axis=1), masked.sum(axis=1)
  return sum(sums[counts == l].mean() / l for l in range(1, table.shape[1] + 1))


def reference_counts(k, size, batch):
  """Returns LLaDA's mask counts for a first count k, rounded half to even."""
  return [
    (round(Fraction(k) + Fraction(i * size, batch)) - 1) % size + 1
    for i in range(batch)
  ]


def counts_from_zero(counts, ranks):
  """Returns queries of ESPO's estimate without complements.

  These are the first queries of the pairs of the coupled form: l tokens are
  masked, l uniform on 0..A, with weight (A + 1) / l. The package does not offer
  this estimate.
  """
  pairs = estimators.exact_count(counts, ranks, coupled=True)
  return estimators.Queries(*(field[::2] for field in pairs))
