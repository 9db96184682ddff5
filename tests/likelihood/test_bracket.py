"""Both bounds of a bracket against the enumeration of all orders."""

import itertools
import math

import fake_networks
import numpy as np
import pytest
import tiny

from maskdiff.errors import UserError
from maskdiff.likelihood import bounds, bracket
from maskdiff.likelihood.queries import LikelihoodConfig

CONFIG = LikelihoodConfig(
  context=64, guidance=0.0, tokens_per_call=4096, loss_chunk_tokens=64
)
MASK, BOS = 4, 1


@pytest.fixture(scope='module')
def network():
  params = tiny.strong_params()
  return fake_networks.network(tiny.MODEL, params, mask_id=MASK, bos_id=BOS)


def marginal(log_p):
  return np.logaddexp.reduce(log_p) - np.log(len(log_p))


def expected_upper(log_p, k):
  """Returns the expectation of the upper bound of K draws of the orders.

  By enumeration of the K - 1 orders of psi; the bound is linear in the last.
  """
  p, total = np.exp(log_p), 0.0
  for drawn in itertools.combinations_with_replacement(range(len(p)), k - 1):
    counts = np.bincount(drawn, minlength=len(p))
    ways = math.factorial(k - 1) / math.prod(map(math.factorial, counts))
    psi = p[list(drawn)].mean()
    value = p.mean() / psi + np.log(psi) - 1
    total += ways / len(p) ** (k - 1) * value
  return total


@pytest.mark.parametrize('size', [1, 2, 3])
def test_upper_bound_has_its_expectation(size):
  """Random log-likelihoods of the orders of an answer of `size` tokens."""
  rng = np.random.default_rng(size)
  log_p = rng.normal(-5, 0.7, math.factorial(size))
  k, draws = 4, 20_000
  drawn = log_p[rng.integers(0, len(log_p), (draws, k))]
  found = bracket.upper_bound(drawn)
  expected = expected_upper(log_p, k)
  assert expected >= marginal(log_p) - 1e-12
  error = found.log_likelihood.std(ddof=1) / draws**0.5
  assert abs(found.log_likelihood.mean() - expected) <= 4 * error + 1e-9
  lower = bounds.log_mean(drawn).log_likelihood.mean()
  assert lower <= marginal(log_p) + 4 * error + 1e-9


def test_more_orders_tighten_the_upper_bound():
  log_p = np.random.default_rng(0).normal(-5, 1.0, 6)
  values = [expected_upper(log_p, k) for k in (2, 4, 8, 12)]
  assert values == sorted(values, reverse=True)
  assert values[-1] - marginal(log_p) < 0.2 * (values[0] - marginal(log_p))


@pytest.mark.slow
@pytest.mark.parametrize(
  'answer', [[9, 5, 20, 6, 11, 7][:n] for n in (1, 2, 3, 4, 6)], ids=len
)
def test_bracket_contains_the_marginal_of_a_network(network, answer):
  prompt, orders = [7, 8], []
  orders = np.array([*itertools.permutations(range(len(answer)))])
  rows = bounds.lay_out([prompt], [answer])
  (log_p,) = bounds.chain_rule(network, CONFIG, rows, [orders])
  exact = marginal(log_p)
  found = bracket.bracket(network, CONFIG, rows, 512, [0])
  (lower,), (low_error,) = found.lower
  (upper,), (high_error,) = found.upper
  slack = 1e-5 * abs(exact)  # float32
  assert lower - 3 * low_error - slack <= exact
  assert exact <= upper + 3 * high_error + slack
  assert upper - lower < 0.2
  assert 1 <= found.effective_orders[0] <= 512.001


def test_standard_error_of_the_upper_bound_matches_its_spread():
  rng = np.random.default_rng(0)
  found = bracket.upper_bound(rng.normal(-40, 0.5, (4000, 16)))
  spread = found.log_likelihood.std(ddof=1)
  assert 0.8 * spread < found.stderr.mean() < 1.3 * spread


def test_one_dominant_order_is_visible():
  """The mean of p rests on one of 16 orders: nothing can be concluded."""
  log_p = np.full((1, 16), -100.0)
  log_p[0, 3] = -20.0
  found = bracket.upper_bound(log_p)
  assert np.isfinite(found.log_likelihood).all()
  assert found.log_likelihood > -20 - np.log(16)
  assert found.stderr > 1


def test_one_order_is_refused(network):
  rows = bounds.lay_out([[7]], [[8]])
  with pytest.raises(UserError, match='num_orders=1'):
    bracket.bracket(network, CONFIG, rows, 1, [0])
