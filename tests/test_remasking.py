"""Commit rules against LLaDA's counts and brute force."""

import itertools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff import remasking


@pytest.fixture(scope='module')
def golden():
  return np.load(golden_models.GOLDEN / 'transfer_tokens.npz')


def brute_force_top(score, masked, budget):
  keep = np.zeros_like(masked)
  for row in range(len(score)):
    slots = [s for s in range(score.shape[1]) if masked[row, s]]
    slots.sort(key=lambda s: (-score[row, s], s))
    keep[row, slots[: budget[row]]] = True
  return keep


def keep_top(score, masked, budget):
  return np.asarray(
    remasking.keep_top(
      jnp.asarray(score, jnp.float32),
      jnp.asarray(masked),
      jnp.asarray(budget, jnp.int32),
    )
  )


@pytest.mark.parametrize('case', range(12))
def test_quota_is_that_of_llada(golden, case):
  count, steps, expected = (
    golden[f'single.{case}.{k}'] for k in ('mask_count', 'steps', 'counts')
  )
  quota = remasking.quota(count, np.arange(steps), steps)
  np.testing.assert_array_equal(quota, expected)


def test_quota_of_a_batch_is_that_of_llada(golden):
  count = jnp.asarray(golden['batch.mask'].sum(axis=1, dtype=np.int32))
  steps = int(golden['batch.steps'])
  quota = np.stack(
    [remasking.quota(count, s, steps) for s in range(steps)], axis=1
  )
  np.testing.assert_array_equal(quota, golden['batch.counts'])


def test_quota_sums_to_the_masked_count_and_is_even():
  for count, steps in itertools.product(range(20), range(1, 25)):
    quota = remasking.quota(count, np.arange(steps), steps)
    assert quota.sum() == count
    assert quota.max() - quota.min() <= 1
    assert (np.diff(quota) <= 0).all()


def test_keep_top_equals_brute_force():
  random = np.random.default_rng(0)
  score = random.normal(size=(200, 9))
  masked = random.random((200, 9)) < random.random((200, 1))
  budget = random.integers(0, 12, 200)  # also 0 and more than there are
  np.testing.assert_array_equal(
    keep_top(score, masked, budget), brute_force_top(score, masked, budget)
  )


def test_ties_go_to_the_lowest_index():
  random = np.random.default_rng(1)
  score = random.integers(0, 3, (200, 9))
  masked = random.random((200, 9)) < 0.7
  budget = random.integers(0, 10, 200)
  np.testing.assert_array_equal(
    keep_top(score, masked, budget), brute_force_top(score, masked, budget)
  )


def test_infinitely_low_scores_still_come_before_unmasked_slots():
  score = np.array([[5.0, -np.inf, 5.0, 0.0]])
  masked = np.array([[False, True, False, True]])
  np.testing.assert_array_equal(keep_top(score, masked, [1])[0], [0, 0, 0, 1])
  np.testing.assert_array_equal(keep_top(score, masked, [2])[0], [0, 1, 0, 1])


def test_budget_zero_keeps_nothing_and_a_large_one_all_that_is_masked():
  masked = np.array([[True, False, True], [False, False, False]])
  score = np.ones((2, 3))
  assert not keep_top(score, masked, [0, 0]).any()
  np.testing.assert_array_equal(keep_top(score, masked, [9, 9]), masked)


def keys(n):
  return jax.random.split(jax.random.key(0), n)


def test_low_confidence_keeps_the_most_confident():
  random = np.random.default_rng(2)
  confidence = random.random((50, 7)).astype(np.float32)
  masked = random.random((50, 7)) < 0.6
  budget = random.integers(0, 8, 50)
  keep = remasking.RULES['low_confidence'](confidence, masked, budget, keys(50))
  np.testing.assert_array_equal(
    keep, brute_force_top(confidence, masked, budget)
  )


def test_random_keeps_exactly_the_budget():
  random = np.random.default_rng(3)
  masked = random.random((200, 9)) < 0.5
  budget = random.integers(0, 11, 200)
  keep = np.asarray(
    remasking.RULES['random'](
      jnp.ones((200, 9)), jnp.asarray(masked), jnp.asarray(budget), keys(200)
    )
  )
  assert not (keep & ~masked).any()
  np.testing.assert_array_equal(
    keep.sum(axis=1), np.minimum(budget, masked.sum(axis=1))
  )


def test_random_keeps_every_subset_equally_often_whatever_the_confidence():
  rows = 6000
  masked = np.tile([True, True, False, True, True], (rows, 1))
  confidence = jnp.tile(jnp.array([0.9, 0.1, 1.0, 0.5, 0.2]), (rows, 1))
  keep = np.asarray(
    remasking.RULES['random'](
      confidence, jnp.asarray(masked), jnp.full((rows,), 2), keys(rows)
    )
  )
  pairs = list(itertools.combinations([0, 1, 3, 4], 2))
  counts = [keep[:, list(pair)].all(axis=1).sum() for pair in pairs]
  assert sum(counts) == rows
  deviation = np.sqrt(rows * (1 / 6) * (5 / 6))
  np.testing.assert_allclose(counts, rows / 6, atol=4.5 * deviation)
