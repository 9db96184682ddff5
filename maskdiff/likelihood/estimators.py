"""Estimators of a log-likelihood: tokens to mask and score, and their weights.

A masked diffusion model has a lower bound on the log-likelihood of an answer of
A tokens, given the rest of its row. Three forms of the bound are equal:

  E_t    [ 1/t  S ]   each token masked independently, probability t ~ U(0, 1)
  E_l    [ A/l  S ]   exactly l tokens masked, l ~ U{1..A}
  E_order[  sum_k log p(x_order[k] | x_order[0..k-1]) ]

S is the sum of the log-probabilities of the masked tokens, each given the
tokens that are not masked (LLaDA, arXiv 2502.09992, eq. 5 and 6). The third
form is the mean of the chain rule over all A! orders.

A network that fills rows block by block has such a bound for the answer tokens
of each block, given the text to its left. The log-likelihood of the answer is
their sum, and one query serves all blocks.

An estimate is the mean over queries: copies of the row with some answer tokens
masked and some scored, one forward pass each. Everything here is NumPy on the
host.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from maskdiff.errors import UserError

FORMS = ('count', 'bernoulli')


@dataclasses.dataclass(frozen=True)
class Estimator:
  """Settings of the Monte Carlo estimate of the bound.

  Queries of one group are stratified: one time (or mask ratio) is drawn from
  each of `strata` equal parts of (0, 1]. Groups are independent, so the spread
  of their means gives the standard error.

  Attributes:
    form: one of FORMS.
    samples: total number of queries.
    strata: strata per group; 1 makes all queries (with coupled, all pairs)
      independent.
    coupled: follow each query by its complement, so that the pair masks every
      token once (ESPO, espo_trainer.py).
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
      pairs = ' and coupled=True doubles it' if self.coupled else ''
      raise UserError(
        f'samples={self.samples} must be a positive multiple of {size}, '
        f'because strata={self.strata}{pairs}'
      )

  @property
  def groups(self):
    return self.samples // (self.strata * (2 if self.coupled else 1))


class Queries(NamedTuple):
  """n queries of one answer of A tokens; each takes one forward pass.

  The value of a query is weight x sum over the scored tokens of log p(token |
  tokens that are not masked).
  """

  masked: np.ndarray  # [n, A] bool, tokens hidden by the mask token
  scored: np.ndarray  # [n, A] bool, tokens whose log-probability is computed
  weight: np.ndarray  # [n] float64; or [n, A], if it differs by token


def draw(e, size, rng):
  """Draws the queries of an Estimator, group by group.

  Args:
    e: Estimator.
    size: A, tokens of the answer.
    rng: numpy.random.Generator.

  Returns:
    Queries, n = e.samples. The mean of their values is an unbiased estimate of
    the bound.
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


def draw_blocks(e, sizes, rng):
  """Draws queries for answers in several blocks, independently for each.

  Args:
    e: Estimator.
    sizes: answer tokens of each block, K positive integers with the sum A.
    rng: numpy.random.Generator.

  Returns:
    Queries, n = e.samples, as from `draw` for each block; the weights are
    [n, A], unless there is one block. A block of one token is always masked.
  """
  parts = [draw(e, size, rng) for size in sizes]
  if len(parts) == 1:
    return parts[0]
  return Queries(
    np.hstack([p.masked for p in parts]),
    np.hstack([p.scored for p in parts]),
    np.repeat(np.stack([p.weight for p in parts], axis=1), sizes, axis=1),
  )


def bernoulli(times, noise, coupled):
  """Returns queries that mask each token with probability t, weight 1/t.

  Args:
    times: [n] in (0, 1].
    noise: [n, A] in [0, 1); a token is masked where noise < t.
    coupled: follow each query by its complement, with weight 1 / (1 - t).

  Returns:
    Queries: n, or 2 n if coupled.
  """
  times = np.asarray(times)[:, None]
  return _queries(noise < times, times, 1 - times, coupled)


def exact_count(counts, ranks, coupled):
  """Returns queries that mask exactly l tokens, weight A/l.

  With complements, l must be uniform on 0..A instead of 1..A, and the weights
  are (A + 1) / l and (A + 1) / (A - l). The weight A/l would be biased.

  Args:
    counts: [n] integers l, of any dtype.
    ranks: [n, A], a permutation in each row; a token is masked where its rank
      is below l.
    coupled: follow each query by its complement.

  Returns:
    Queries: n, or 2 n if coupled.
  """
  size = ranks.shape[1]
  counts = np.asarray(counts)[:, None]
  total = size + 1 if coupled else size
  return _queries(
    ranks < counts, counts / total, (size - counts) / total, coupled
  )


def _queries(masked, ratio, complement_ratio, coupled):
  if coupled:
    masked = np.stack([masked, ~masked], axis=1).reshape(-1, masked.shape[1])
    ratio = np.stack([ratio, complement_ratio], axis=1)
  # A query that masks nothing has value 0, and its ratio may be 0.
  not_empty = masked.any(axis=1)
  weight = np.zeros(len(masked))
  weight[not_empty] = 1 / ratio.reshape(-1)[not_empty]
  return Queries(masked, masked, weight)


def chain(orders, sizes=None):
  """Returns queries of the chain rule: each token given the earlier tokens.

  Args:
    orders: [K, A] int, a permutation of the answer's tokens in each row.
    sizes: answer tokens of each block, with the sum A, for a network that fills
      blocks from left to right; the orders must do so, too. Default: one block.

  Returns:
    Queries, n = K x S, where S is the largest size: a query scores one token of
    every block. The sum of the S values of an order is its log-likelihood.
  """
  sizes = np.array([orders.shape[1]] if sizes is None else sizes)
  starts = np.repeat(sizes.cumsum() - sizes, sizes)  # of the block of a token
  ranks = (np.argsort(orders, axis=1) - starts)[:, None, :]
  step = np.arange(sizes.max())[:, None]
  flat = lambda x: x.reshape(-1, x.shape[-1])
  scored = flat(ranks == step)
  return Queries(flat(ranks >= step), scored, np.ones(len(scored)))


def causal(size, window_length=0):
  """Returns the queries of a left-to-right network.

  A network without windows needs a single query, which masks nothing, since the
  network does not see later tokens. A network that predicts windows has D
  queries, with windows at every D-th token, and the first token of each window
  is scored. The sum of the values is the log-likelihood of decoding one token
  per step.

  Args:
    size: A, tokens of the answer.
    window_length: D, for a network that predicts windows; else 0.
  """
  masked = _after_anchors(size, window_length or 1)
  return Queries(masked, ~masked, np.ones(len(masked)))


def windows(size, window_length):
  """Returns queries of a model that always emits whole windows.

  The model emits o tokens of its first window, and D of every other one. The
  sum of the values is its log-likelihood, averaged over o = 1, ..., D.

  Args:
    size: A, tokens of the answer.
    window_length: D.
  """
  masked = _after_anchors(size, window_length)
  first, token = np.arange(len(masked))[:, None], np.arange(size)
  # Of the D offsets, those whose first window has the token.
  from_first = np.maximum(window_length - token, 1)
  weight = np.where(first == 0, from_first, 1) / window_length
  return Queries(masked, token >= first, weight)


def _after_anchors(size, window_length):
  """Returns [n, A] bool, False at the first tokens of windows of query n."""
  first = np.arange(min(window_length, size))[:, None]
  return (np.arange(size) - first) % window_length != 0
