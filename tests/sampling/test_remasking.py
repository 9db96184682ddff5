"""Remasking rules against LLaDA, Fast-dLLM and brute force."""

import itertools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from maskdiff.sampling import candidates, remasking


@pytest.fixture(scope='module')
def golden():
  return np.load(golden_models.GOLDEN / 'transfer_tokens.npz')


def brute_force_top(score, masked, budget):
  committed = np.zeros_like(masked)
  for row in range(len(score)):
    slots = [s for s in range(score.shape[1]) if masked[row, s]]
    slots.sort(key=lambda s: (-score[row, s], s))
    committed[row, slots[: budget[row]]] = True
  return committed


def commit_top(score, masked, budget):
  return np.asarray(
    remasking.commit_top(
      jnp.asarray(score, jnp.float32),
      jnp.asarray(masked),
      jnp.asarray(budget, jnp.int32),
    )
  )


@pytest.mark.parametrize('case', range(12))
def test_quota_equals_llada(golden, case):
  count, steps, expected = (
    golden[f'single.{case}.{k}'] for k in ('mask_count', 'steps', 'counts')
  )
  quota = remasking.quota(count, np.arange(steps), steps)
  np.testing.assert_array_equal(quota, expected)


def test_quota_of_a_batch_equals_llada(golden):
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


def test_commit_top_equals_brute_force():
  random = np.random.default_rng(0)
  score = random.normal(size=(200, 9))
  masked = random.random((200, 9)) < random.random((200, 1))
  budget = random.integers(0, 12, 200)  # also 0 and more than S
  np.testing.assert_array_equal(
    commit_top(score, masked, budget), brute_force_top(score, masked, budget)
  )


def test_ties_go_to_the_lowest_index():
  random = np.random.default_rng(1)
  score = random.integers(0, 3, (200, 9))
  masked = random.random((200, 9)) < 0.7
  budget = random.integers(0, 10, 200)
  np.testing.assert_array_equal(
    commit_top(score, masked, budget), brute_force_top(score, masked, budget)
  )


def test_infinitely_low_scores_rank_before_unmasked_slots():
  score = np.array([[5.0, -np.inf, 5.0, 0.0]])
  masked = np.array([[False, True, False, True]])
  np.testing.assert_array_equal(commit_top(score, masked, [1])[0], [0, 0, 0, 1])
  np.testing.assert_array_equal(commit_top(score, masked, [2])[0], [0, 1, 0, 1])


def test_budget_of_zero_and_of_more_than_all_slots():
  masked = np.array([[True, False, True], [False, False, False]])
  score = np.ones((2, 3))
  assert not commit_top(score, masked, [0, 0]).any()
  np.testing.assert_array_equal(commit_top(score, masked, [9, 9]), masked)


def keys(n):
  return jax.random.split(jax.random.key(0), n)


def rows_of(value, masked):
  """Returns a budget with the same value in all rows."""
  return jnp.full((len(masked),), value, jnp.float32)


def test_low_confidence_commits_the_most_confident():
  random = np.random.default_rng(2)
  confidence = random.random((50, 7)).astype(np.float32)
  masked = random.random((50, 7)) < 0.6
  budget = random.integers(0, 8, 50)
  committed = remasking.RULES['low_confidence'](
    confidence, masked, budget, keys(50)
  )
  np.testing.assert_array_equal(
    committed, brute_force_top(confidence, masked, budget)
  )


def test_random_commits_exactly_the_budget():
  random = np.random.default_rng(3)
  masked = random.random((200, 9)) < 0.5
  budget = random.integers(0, 11, 200)
  committed = np.asarray(
    remasking.RULES['random'](
      jnp.ones((200, 9)), jnp.asarray(masked), jnp.asarray(budget), keys(200)
    )
  )
  assert not (committed & ~masked).any()
  np.testing.assert_array_equal(
    committed.sum(axis=1), np.minimum(budget, masked.sum(axis=1))
  )


def test_random_commits_every_subset_equally_often():
  rows = 6000
  masked = np.tile([True, True, False, True, True], (rows, 1))
  confidence = jnp.tile(jnp.array([0.9, 0.1, 1.0, 0.5, 0.2]), (rows, 1))
  committed = np.asarray(
    remasking.RULES['random'](
      confidence, jnp.asarray(masked), jnp.full((rows,), 2), keys(rows)
    )
  )
  pairs = list(itertools.combinations([0, 1, 3, 4], 2))
  counts = [committed[:, list(pair)].all(axis=1).sum() for pair in pairs]
  assert sum(counts) == rows
  deviation = np.sqrt(rows * (1 / 6) * (5 / 6))
  np.testing.assert_allclose(counts, rows / 6, atol=4.5 * deviation)


# Fast-dLLM


@pytest.fixture(scope='module')
def fast_dllm():
  """Returns confidence, masked slots, and the recorded results."""
  with np.load(golden_models.GOLDEN / 'fast_dllm.npz') as file:
    recorded = {k: file[k] for k in file if k.startswith('rule.')}
  logits = jnp.asarray(recorded['rule.logits'])
  token = jnp.argmax(logits, axis=-1)
  confidence = candidates.CONFIDENCES['probability'](logits, token)
  return confidence, jnp.asarray(recorded['rule.mask_index']), recorded


@pytest.mark.parametrize('tau', ['0', '0.3', '0.5', '0.9', '1'])
def test_threshold_equals_fast_dllm(fast_dllm, tau):
  confidence, masked, recorded = fast_dllm
  committed = remasking.threshold(
    confidence, masked, rows_of(float(tau), masked), None
  )
  np.testing.assert_array_equal(committed, recorded[f'rule.tau{tau}.transfer'])


@pytest.mark.parametrize('f', ['0.5', '1', '2'])
def test_factor_equals_the_dllm_library(fast_dllm, f):
  confidence, masked, recorded = fast_dllm
  committed = remasking.factor(
    confidence, masked, rows_of(float(f), masked), None
  )
  np.testing.assert_array_equal(committed, recorded[f'rule.factor{f}.transfer'])


def test_low_confidence_equals_fast_dllm_for_a_quota(fast_dllm):
  confidence, masked, recorded = fast_dllm
  budget = jnp.asarray(recorded['rule.quota.k'])
  committed = remasking.low_confidence(confidence, masked, budget, None)
  np.testing.assert_array_equal(committed, recorded['rule.quota.transfer'])


def brute_force_factor(confidence, masked, f):
  """Commits the largest n, by falling confidence, that the formula allows."""
  committed = np.zeros_like(masked)
  for row in range(len(masked)):
    slots = sorted(
      np.flatnonzero(masked[row]), key=lambda s: -confidence[row, s]
    )
    n = min(1, len(slots))
    while n < len(slots) and confidence[row, slots[n]] >= 1 - f / (n + 2):
      n += 1
    committed[row, slots[:n]] = True
  return committed


@pytest.mark.parametrize('f', [0.1, 0.5, 1.0, 2.0, 20.0])
def test_factor_equals_brute_force(f):
  random = np.random.default_rng(4)
  confidence = (1 - random.random((300, 7)) ** 3).astype(np.float32)
  masked = random.random((300, 7)) < 0.7
  committed = remasking.factor(
    jnp.asarray(confidence), jnp.asarray(masked), rows_of(f, masked), None
  )
  np.testing.assert_array_equal(
    committed, brute_force_factor(confidence, masked, f)
  )


def count_of_fast_dllm(confidence, f):
  """Returns the number of slots that NVlabs' Fast-dLLM and dInfer accept.

  Their loop over the ranks ends at the first slot below its threshold, or at
  the last slot, which it always accepts.
  """
  falling = sorted(confidence, reverse=True)
  last = len(falling) - 1
  for rank in range(1, last):
    if falling[rank] < 1 - f / (rank + 2):
      return rank
  return last + 1


def test_factor_masks_the_last_slot_if_only_it_falls_short():
  """NVlabs and dInfer commit four of these slots; the formula allows three."""
  confidence = np.array([[0.946, 0.935, 0.897, 0.769]])
  committed = remasking.factor(
    jnp.asarray(confidence), jnp.ones((1, 4), bool), jnp.ones(1), None
  )
  assert committed.tolist() == [[True, True, True, False]]
  assert confidence[0, 3] < 1 - 1 / 5
  assert count_of_fast_dllm(confidence[0], 1.0) == 4


@pytest.mark.parametrize('f', [0.5, 1.0, 2.0])
def test_factor_equals_fast_dllm_except_for_the_last_slot(f):
  """`factor` commits one slot fewer if only the last slot falls short."""
  random = np.random.default_rng(6)
  confidence = (1 - random.random((300, 4)) ** 3).astype(np.float32)
  masked = np.ones((300, 4), bool)
  committed = remasking.factor(
    jnp.asarray(confidence), jnp.asarray(masked), rows_of(f, masked), None
  )
  counts = np.asarray(committed).sum(axis=1)
  fast_dllm_counts = np.array(
    [count_of_fast_dllm(row, f) for row in confidence]
  )
  np.testing.assert_array_equal(
    fast_dllm_counts, np.where(counts == 3, 4, counts)
  )
  assert (counts == 3).any() and (counts < 3).any() and (counts == 4).any()


@pytest.mark.parametrize('rule', ['threshold', 'factor'])
def test_most_confident_slot_is_always_committed(rule):
  confidence = jnp.array([[0.01, 0.03, 0.02], [0.9, 0.0, 0.0]])
  masked = jnp.array([[True, True, True], [False, True, True]])
  budget = rows_of({'threshold': 2.0, 'factor': 0.0}[rule], masked)
  committed = remasking.RULES[rule](confidence, masked, budget, None)
  assert committed.tolist() == [[False, True, False], [False, True, False]]


@pytest.mark.parametrize('rule, budget', [('threshold', 0.0), ('factor', 99.0)])
def test_extreme_budget_commits_all_slots(rule, budget):
  masked = jnp.array([[True, False, True], [False, False, False]])
  committed = remasking.RULES[rule](
    jnp.zeros((2, 3)), masked, rows_of(budget, masked), None
  )
  np.testing.assert_array_equal(committed, masked)


@pytest.mark.parametrize('rule', ['threshold', 'factor'])
def test_each_row_has_its_own_threshold(rule):
  random = np.random.default_rng(8)
  confidence = jnp.asarray(1 - random.random((4, 9)) ** 2, jnp.float32)
  masked, budget = jnp.ones((4, 9), bool), jnp.array([0.2, 0.5, 0.9, 0.5])
  committed = remasking.RULES[rule](confidence, masked, budget, None)
  for row, value in enumerate(budget):
    alone = remasking.RULES[rule](
      confidence, masked, rows_of(value, masked), None
    )
    np.testing.assert_array_equal(committed[row], alone[row])
  assert len(set(committed.sum(axis=1).tolist())) > 2


def dynamic_of_sdar(confidence, masked, number, least):
  """All slots above the threshold if they are enough, else the best ones."""
  reached = masked & (confidence > least)
  if reached.sum() >= number:
    return reached
  return brute_force_top(confidence[None], masked[None], [number])[0]


def test_quota_and_threshold_equals_sdar():
  random = np.random.default_rng(9)
  confidence = random.random((300, 6)).astype(np.float32)
  masked = random.random((300, 6)) < 0.7
  number = random.integers(0, 7, 300)  # also more than the masks that are left
  least = random.random(300).astype(np.float32)
  committed = remasking.quota_and_threshold(
    jnp.asarray(confidence),
    jnp.asarray(masked),
    (jnp.asarray(number, jnp.int32), jnp.asarray(least)),
    None,
  )
  expected = [
    dynamic_of_sdar(*row)
    for row in zip(confidence, masked, number, least, strict=True)
  ]
  np.testing.assert_array_equal(committed, expected)
  assert (number > masked.sum(axis=1)).any()


def test_quota_and_threshold_has_two_other_rules_as_limits():
  random = np.random.default_rng(10)
  confidence = jnp.asarray(random.random((50, 6)), jnp.float32)
  masked = jnp.asarray(random.random((50, 6)) < 0.7)
  number, ones = rows_of(2, masked), rows_of(1, masked)
  above, least = rows_of(1.1, masked), rows_of(0.6, masked)
  rule = lambda *budget: remasking.quota_and_threshold(
    confidence, masked, budget, None
  )
  np.testing.assert_array_equal(
    rule(number, above),
    remasking.low_confidence(confidence, masked, number, None),
  )
  np.testing.assert_array_equal(
    rule(ones, least), remasking.threshold(confidence, masked, least, None)
  )


# The reverse process


def test_ancestral_commits_slots_independently():
  rows, chance = 4000, 0.3
  masked = np.tile([True, True, False, True], (rows, 1))
  committed = remasking.ancestral(
    jnp.ones((rows, 4)),
    jnp.asarray(masked),
    jnp.full((rows,), chance),
    keys(rows),
  )
  counts = np.bincount(
    np.asarray(committed)[:, [0, 1, 3]] @ [1, 2, 4], minlength=8
  )
  each = np.array([bin(i).count('1') for i in range(8)])
  expected = rows * chance**each * (1 - chance) ** (3 - each)
  assert scipy.stats.chisquare(counts, expected).pvalue > 1e-3
  assert not np.asarray(committed)[:, 2].any()


@pytest.mark.parametrize(
  'probability, committed_all', [(0.0, False), (1.0, True)]
)
def test_ancestral_with_probability_zero_and_one(probability, committed_all):
  masked = jnp.ones((100, 5), bool)
  probability = jnp.full((100,), probability)
  committed = remasking.ancestral(
    jnp.ones((100, 5)), masked, probability, keys(100)
  )
  assert (committed == committed_all).all()


def test_first_hitting_commits_one_slot_uniformly():
  rows = 4000
  masked = np.tile([True, False, True, True], (rows, 1))
  committed = remasking.first_hitting(
    jnp.linspace(0, 1, 4) * jnp.ones((rows, 1)),
    jnp.asarray(masked),
    jnp.full((rows,), 3),
    keys(rows),
  )
  counts = np.asarray(committed).sum(axis=0)
  assert (np.asarray(committed).sum(axis=1) == 1).all()
  assert scipy.stats.chisquare(counts[[0, 2, 3]]).pvalue > 1e-3


@pytest.mark.parametrize('rule', remasking.RULES)
def test_committed_slots_are_never_selected_again(rule):
  masked = jnp.zeros((3, 4), bool)
  budget = jnp.full((3,), 2)
  if rule in ('threshold', 'factor', 'ancestral') or 'prefix' in rule:
    budget = jnp.full((3,), 0.5)
  if rule == 'quota_and_threshold':
    budget = (budget, jnp.full((3,), 0.5))
  assert not remasking.RULES[rule](
    jnp.ones((3, 4)), masked, budget, keys(3)
  ).any()


# Other schedules


def schedule_counts(num_slots, ratios):
  masked, counts = num_slots, []
  for ratio in ratios:
    counts.append(
      int(remasking.quota_to(ratio, num_slots, masked)) if masked else 0
    )
    masked -= counts[-1]
  return counts


@pytest.mark.parametrize(
  'num_slots, steps', [(16, 4), (64, 8), (10, 3), (5, 9)]
)
def test_cosine_schedule_leaves_its_share_of_masks(num_slots, steps):
  ratios = np.cos(np.pi / 2 * np.arange(1, steps + 1) / steps)
  counts = schedule_counts(num_slots, ratios.astype(np.float32))
  assert sum(counts) == num_slots
  left = num_slots - np.cumsum(counts)
  allowed = np.floor(num_slots * ratios + 1e-6)
  assert (left <= allowed).all()
  if num_slots >= 8 * steps:  # else one token a step comes first
    np.testing.assert_array_equal(left, allowed)


def test_cosine_schedule_starts_slowly():
  ratios = np.cos(np.pi / 2 * np.arange(1, 9) / 8)
  counts = schedule_counts(64, ratios.astype(np.float32))
  assert counts == [2, 3, 6, 8, 10, 11, 12, 12]


def test_every_step_of_a_cosine_schedule_commits_a_token():
  ratios = np.cos(np.pi / 2 * np.arange(1, 33) / 32)
  counts = schedule_counts(16, ratios.astype(np.float32))
  assert counts[:16] == [1] * 16
