"""What is known of all masks of a short answer."""

from fractions import Fraction

import numpy as np

from maskdiff.likelihood import estimators


def subsets(size):
  """[2^A, A] bool; row r hides the tokens whose bits are set in r."""
  return (np.arange(2**size)[:, None] >> np.arange(size) & 1).astype(bool)


def elbo(table):
  """sum over l of 1/l times the mean of S over all sets of l tokens."""
  masked = subsets(table.shape[1])
  sums, counts = np.where(masked, table, 0).sum(axis=1), masked.sum(axis=1)
  return sum(sums[counts == l].mean() / l for l in range(1, table.shape[1] + 1))


def reference_counts(k, size, batch):
  """What LLaDA's get_log_likelihood.py makes of k: it rounds half to even."""
  return [
    (round(Fraction(k) + Fraction(i * size, batch)) - 1) % size + 1
    for i in range(batch)
  ]


def counts_from_nothing(counts, ranks):
  """Looks of ESPO's estimate without complements, which is not offered.

  l tokens are hidden, l uniform on 0..A, with weight (A + 1) / l: the first
  look of each pair of its coupled form, at its full weight.
  """
  pairs = estimators.exact_count(counts, ranks, coupled=True)
  return estimators.Queries(*(field[::2] for field in pairs))
