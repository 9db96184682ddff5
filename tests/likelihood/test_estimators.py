"""Estimators against enumeration: masked tokens and weights.

A table of the log-probability of every token for every set of masked tokens
replaces the network.
"""

import itertools

import golden_models
import numpy as np
import pytest
import scipy.stats
from every_mask import (
  counts_from_zero,
  elbo,
  reference_counts,
  subsets,
)

from maskdiff.errors import UserError
from maskdiff.likelihood import estimators
from maskdiff.likelihood.estimators import Estimator

A = 5
EVERY = [
  Estimator(form, 4096, strata, coupled)
  for form in estimators.FORMS
  for strata in (1, 16)
  for coupled in (False, True)
]
name = lambda e: f'{e.form}-{e.strata}' + '-coupled' * e.coupled


def random_table(size, seed=0):
  """Returns [2^A, A] log p of each token, by set of masked tokens."""
  random = np.random.default_rng(seed)
  return -random.exponential(2.0, (2**size, size))


def trained_table(size):
  """Returns a table like a trained model's: masks make tokens improbable."""
  random = np.random.default_rng(1)
  share = subsets(size).mean(axis=1, keepdims=True)
  return -random.exponential(1.0, size) * (0.2 + 2 * share)


def values(queries, table):
  """Returns the value of each query."""
  row = queries.masked @ (1 << np.arange(table.shape[1]))
  return queries.weight * np.where(queries.scored, table[row], 0).sum(axis=1)


def stderr(e, queries, table):
  means = values(queries, table).reshape(e.groups, -1).mean(axis=1)
  return means.mean(), means.std(ddof=1) / e.groups**0.5


# The expectation


@pytest.mark.parametrize('coupled', [False, True])
@pytest.mark.parametrize('size', [1, 2, 4])
def test_exact_counts_average_to_the_bound(size, coupled):
  """Averages over every count with every permutation."""
  table = random_table(size)
  counts = range(0 if coupled else 1, size + 1)
  draws = list(itertools.product(counts, itertools.permutations(range(size))))
  counts, ranks = map(np.array, zip(*draws, strict=True))
  queries = estimators.exact_count(counts, ranks, coupled)
  np.testing.assert_allclose(values(queries, table).mean(), elbo(table))


@pytest.mark.parametrize('coupled', [False, True])
@pytest.mark.parametrize('size', [1, 3, 5])
def test_random_masks_average_to_the_bound(size, coupled):
  """Averages over every set of masked tokens, with quadrature over times."""
  table, masked = random_table(size), subsets(size)
  nodes, weights = np.polynomial.legendre.leggauss(8)
  total = 0
  for t, w in zip((nodes + 1) / 2, weights / 2, strict=True):
    noise = np.where(masked, t / 2, (1 + t) / 2)
    queries = estimators.bernoulli(np.full(len(masked), t), noise, coupled)
    chance = np.prod(np.where(masked, t, 1 - t), axis=1)
    of_draw = values(queries, table).reshape(len(masked), -1).mean(axis=1)
    total += w * (chance @ of_draw)
  np.testing.assert_allclose(total, elbo(table))


@pytest.mark.parametrize('size', [1, 2, 4])
def test_chain_rule_averages_to_the_bound(size):
  table = random_table(size)
  orders = np.array(list(itertools.permutations(range(size))))
  of_query = values(estimators.chain(orders), table)
  np.testing.assert_allclose(of_query.sum() / len(orders), elbo(table))


@pytest.mark.parametrize('e', EVERY, ids=name)
@pytest.mark.parametrize('size', [1, 3, 6])
def test_draws_are_unbiased_to_three_standard_errors(e, size):
  table = random_table(size)
  queries = estimators.draw(e, size, np.random.default_rng(0))
  mean, error = stderr(e, queries, table)
  assert abs(mean - elbo(table)) <= 3 * error + 1e-9


def test_uncoupled_weights_are_biased_with_complements():
  """Counts that start from 0 need the weight (A + 1) / l."""
  table = random_table(A)
  draws = itertools.product(range(A + 1), itertools.permutations(range(A)))
  counts, ranks = map(np.array, zip(*draws, strict=True))
  queries = estimators.exact_count(counts, ranks, True)
  naive = queries._replace(weight=queries.weight * A / (A + 1))
  assert abs(values(naive, table).mean() / elbo(table) - 1) > 0.1


@pytest.mark.parametrize('size', [1, 2, 4])
def test_counts_from_zero_have_more_variance(size):
  """The package therefore does not offer ESPO's estimate without complements.

  The mean of that estimate is the bound too. But one draw in A + 1 masks
  nothing and has value 0, which raises the variance by the squared bound over
  A + 1. The variance is larger even if such draws cost no forward pass and
  others replace them.
  """
  table = random_table(size)
  orders = list(itertools.permutations(range(size)))

  def every(counts, queries_of):
    draws = list(itertools.product(counts, orders))
    return queries_of(*map(np.array, zip(*draws, strict=True)))

  from_zero = every(range(size + 1), counts_from_zero)
  from_one = every(
    range(1, size + 1),
    lambda counts, ranks: estimators.exact_count(counts, ranks, coupled=False),
  )
  bound, passes = elbo(table), from_zero.masked.any(axis=1).mean()
  np.testing.assert_allclose(values(from_zero, table).mean(), bound)
  np.testing.assert_allclose(passes, size / (size + 1))
  np.testing.assert_allclose(
    values(from_zero, table).var() * passes,
    values(from_one, table).var() + bound**2 / (size + 1),
  )


@pytest.mark.parametrize('e', [e for e in EVERY if e.form == 'count'], ids=name)
def test_standard_error_equals_the_spread_of_estimates(e):
  e = Estimator(e.form, 512, e.strata, e.coupled)
  table, rng = random_table(A), np.random.default_rng(1)
  drawn = [stderr(e, estimators.draw(e, A, rng), table) for _ in range(400)]
  means, errors = np.array(drawn).T
  spread = means.std(ddof=1)
  assert 0.85 < np.sqrt(np.mean(errors**2)) / spread < 1.15


# The draws


def test_counts_are_uniform_unlike_llada():
  """LLaDA rounds half to even, which favours even counts."""
  with np.load(golden_models.GOLDEN / 'likelihood.npz') as arrays:
    recorded = arrays['mask_counts'].tolist()
  for k, size, batch, *counts in recorded:
    assert counts[:batch] == reference_counts(k, size, batch)
  of_llada = [c for k in range(1, 11) for c in reference_counts(k, 10, 4)]
  assert len(set(np.bincount(of_llada, minlength=11)[1:])) > 1
  queries = estimators.draw(
    Estimator(samples=40_000, strata=4), 10, np.random.default_rng(0)
  )
  counts = np.bincount(queries.masked.sum(axis=1), minlength=11)
  assert counts[0] == 0
  assert scipy.stats.chisquare(counts[1:]).pvalue > 1e-3


def test_counts_with_complements_are_uniform_from_zero():
  e = Estimator(samples=48_000, strata=1, coupled=True)
  queries = estimators.draw(e, 7, np.random.default_rng(0))
  counts = np.bincount(queries.masked[::2].sum(axis=1), minlength=8)
  assert scipy.stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize('form', estimators.FORMS)
def test_coupled_pair_masks_every_token_once(form):
  e = Estimator(form, 64, 4, coupled=True)
  masked = estimators.draw(e, A, np.random.default_rng(0)).masked
  np.testing.assert_array_equal(masked[::2], ~masked[1::2])


def test_strata_of_a_group_divide_the_counts():
  queries = estimators.draw(
    Estimator(samples=64, strata=16), 32, np.random.default_rng(0)
  )
  counts = queries.masked.sum(axis=1).reshape(4, 16)
  stratum = np.arange(16)
  assert ((2 * stratum < counts) & (counts <= 2 * stratum + 2)).all()


def test_query_that_masks_nothing_has_weight_zero():
  queries = estimators.bernoulli([1.0, 0.5], np.array([[0.1], [0.9]]), True)
  assert queries.masked[:, 0].tolist() == [True, False, False, True]
  assert queries.weight.tolist() == [1, 0, 0, 2]


# The variance


def variance(e, table):
  e = Estimator(e.form, 4096 * 4, e.strata, e.coupled)
  queries = estimators.draw(e, table.shape[1], np.random.default_rng(0))
  return (stderr(e, queries, table)[1]) ** 2


def test_each_refinement_lowers_the_variance():
  """The table is like a trained model's: masks make tokens improbable."""
  table = trained_table(10)
  plain, strata, count, count_strata, coupled = (
    variance(e, table)
    for e in (
      Estimator('bernoulli', strata=1),
      Estimator('bernoulli', strata=16),
      Estimator('count', strata=1),
      Estimator('count', strata=16),
      Estimator('count', strata=16, coupled=True),
    )
  )
  assert plain > strata > count_strata
  assert plain > 2 * count
  assert count > 1.2 * count_strata
  assert count_strata > 1.5 * coupled


REFUSED = {
  'form': (dict(form='counts'), "'counts'.*count, bernoulli"),
  'nothing': (dict(samples=0), 'samples=0'),
  'strata': (dict(samples=24), 'samples=24.*multiple of 16.*strata=16'),
  'pairs': (
    dict(samples=16, coupled=True),
    'multiple of 32.*coupled=True',
  ),
  'no_strata': (dict(strata=0), 'strata=0'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_invalid_estimators_are_refused(case):
  changes, message = REFUSED[case]
  with pytest.raises(UserError, match=message):
    Estimator(**changes)
