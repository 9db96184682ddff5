"""Estimators of a log-likelihood: what to hide, what to ask, what it counts.

For an answer of A tokens and whatever is known besides, a masked diffusion
model has a lower bound on the log-likelihood, which can be written

  E_t    [ 1/t  S ]   each token hidden on its own with chance t ~ U(0, 1)
  E_l    [ A/l  S ]   exactly l of them hidden, l ~ U{1..A}
  E_order[  sum_k log p(x_order[k] | x_order[0..k-1]) ]

where S is the sum, over the hidden tokens, of the log-probability of each
given those that are not: LLaDA, arXiv 2502.09992, eq. 5 and 6; the third is the
mean over all A! orders of the chain rule. An estimate is the mean over looks,
each a set of hidden tokens that costs one forward pass. Everything here is
NumPy on the host: sets are small beside the network.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from maskdiff.errors import UserError

FORMS = ('count', 'bernoulli')


@dataclasses.dataclass(frozen=True)
class Estimator:
  """How to draw looks.

  Looks of one group are stratified: their times, or shares of hidden tokens,
  fall one in each of `strata` equal parts of (0, 1]. Groups are independent,
  so the spread of their means is the standard error.

  Attributes:
    form: one of FORMS.
    samples: looks in all.
    strata: of a group; 1 makes all looks independent.
    coupled: each look is followed by its complement, so that the pair hides
      every token once (ESPO, espo_trainer.py).
  """

  form: str = 'count'
  samples: int = 128
  strata: int = 16
  coupled: bool = False

  def __post_init__(self):
    if self.form not in FORMS:
      raise UserError(f'form={self.form!r}: choose one of {", ".join(FORMS)}')
    if self.strata < 1:
      raise UserError(f'strata={self.strata} must be at least 1')
    size = self.strata * (2 if self.coupled else 1)
    if self.samples < 1 or self.samples % size:
      pairs = ' pairs' if self.coupled else ''
      raise UserError(
        f'samples={self.samples} must be a positive multiple of {size}, since '
        f'strata={self.strata}{pairs}'
      )

  @property
  def groups(self):
    return self.samples // (self.strata * (2 if self.coupled else 1))


class Queries(NamedTuple):
  """Some forward passes over one answer.

  The value of a look is weight x sum over `asked` of log p(token | not hidden).
  """

  masked: np.ndarray  # [n, A] bool, tokens hidden by the mask token
  scored: np.ndarray  # [n, A] bool, tokens whose log-probability is computed
  weight: np.ndarray  # [n] float64


def draw(e, size, rng):
  """Draws the looks of an Estimator, group by group.

  Args:
    e: Estimator.
    size: A, tokens of the answer.
    rng: numpy.random.Generator.

  Returns:
    Looks, n = e.samples; the mean of their values estimates the bound, without
    bias.
  """
  draws = e.samples // (2 if e.coupled else 1)
  stratum = np.arange(draws) % e.strata
  times = (stratum + 1 - rng.random(draws)) / e.strata  # in (0, 1]
  noise = rng.random((draws, size))
  if e.form == 'bernoulli':
    return bernoulli(times, noise, e.coupled)
  if e.coupled:
    counts = np.ceil(times * (size + 1)) - 1  # uniform on 0..A
  else:
    counts = np.ceil(times * size)  # uniform on 1..A
  return exact_count(counts, noise.argsort(axis=1), e.coupled)


def bernoulli(times, noise, coupled):
  """Looks that hide each token with chance t, weighted by 1/t.

  Args:
    times: [n] in (0, 1].
    noise: [n, A] in [0, 1); a token is hidden where noise < t.
    coupled: whether each look is followed by its complement, whose weight is
      1 / (1 - t).

  Returns:
    Looks, n of them or 2 n.
  """
  times = np.asarray(times)[:, None]
  return _queries(noise < times, times, 1 - times, coupled)


def exact_count(counts, ranks, coupled):
  """Looks that hide exactly l tokens, weighted by A/l.

  With complements l is uniform on 0..A in place of 1..A, and the weights are
  (A + 1) / l and (A + 1) / (A - l): A/l would be biased.

  Args:
    counts: [n] whole numbers, l.
    ranks: [n, A], a permutation in each row; a token is hidden where its rank
      is below l.
    coupled: whether each look is followed by its complement.

  Returns:
    Looks, n of them or 2 n.
  """
  size = ranks.shape[1]
  counts = np.asarray(counts)[:, None]
  whole = size + 1 if coupled else size
  return _queries(
    ranks < counts, counts / whole, (size - counts) / whole, coupled
  )


def _queries(masked, chance, rest, coupled):
  if coupled:
    masked = np.stack([masked, ~masked], axis=1).reshape(-1, masked.shape[1])
    chance = np.stack([chance, rest], axis=1)
  # A query that masks nothing has value 0; its chance may be 0 as well.
  some = masked.any(axis=1)
  weight = np.zeros(len(masked))
  weight[some] = 1 / chance.reshape(-1)[some]
  return Queries(masked, masked, weight)


def chain(orders):
  """Looks of the chain rule: token after token, given those before it.

  Args:
    orders: [K, A] int, a permutation of the answer's tokens in each row.

  Returns:
    Looks, n = K x A; the sum over an order's A values is its log-likelihood.
  """
  ranks = np.argsort(orders, axis=1)[:, None, :]
  step = np.arange(ranks.shape[2])[:, None]
  flat = lambda x: x.reshape(-1, x.shape[-1])
  scored = flat(ranks == step)
  return Queries(flat(ranks >= step), scored, np.ones(len(scored)))


def causal(size):
  """The one look that an autoregressive network needs: it hides by itself."""
  scored = np.ones((1, size), bool)
  return Queries(~scored, scored, np.ones(1))
