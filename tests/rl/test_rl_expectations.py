"""Expectations of the estimates, and the masks that they are made of."""

import math

import numpy as np
import pytest
from every_mask import elbo, subsets
from policy_cases import PROMPT, SLOTS, TABLE, drawn, look_up, made_batch, small

from maskdiff.rl import table


def token_values(name, s, rows=4000):
  """Returns estimates of the log-probability of each slot, [rows, 4]."""
  batch = made_batch(rows)
  queries = drawn(name, s, batch, np.arange(rows))
  weighed = np.array(queries.weight)[..., None] * look_up(queries)
  values = np.where(queries.scored, weighed, 0).sum(axis=0)
  return values[:, PROMPT : PROMPT + SLOTS], batch


def assert_mean(values, expected):
  """Compares the mean over rows to four standard errors."""
  error = values.std(axis=0, ddof=1) / math.sqrt(len(values))
  assert (abs(values.mean(axis=0) - expected) < 4 * error).all()


@pytest.mark.parametrize(
  'changes',
  [{'coupled': True}, {'coupled': False}, {'times': 2, 'masks_per_time': 3}],
)
def test_bound_is_unbiased(changes):
  """The exact bound is the mean over all masks of each size."""
  s = table.settings('vrpo', **{'times': 2, **changes})
  values, _ = token_values('vrpo', s)
  assert_mean(values.sum(axis=1), elbo(TABLE))


def test_coupled_grpo_has_the_stated_expectation():
  """Half of: the value with all masked, and those with masks at t and 1 - t."""
  s = table.settings('coupled_grpo', time_range=(0.3, 0.3))
  # All rows share the time; the masks are those of the rows.
  values, _ = token_values('coupled_grpo', s)
  sets = subsets(SLOTS)
  others = sets.sum(axis=1)[:, None] - sets
  at = lambda t: (
    np.where(sets, t**others * (1 - t) ** (SLOTS - 1 - others), 0) * TABLE
  ).sum(axis=0)
  assert_mean(values, (TABLE[-1] + at(0.3) + at(0.7)) / 2)


def test_trace_and_justgrpo_are_the_chain_rule():
  """In the order of the sampler, and from left to right; no noise."""
  values, batch = token_values('tracerl', small('justgrpo'), 5)
  left, _ = token_values('justgrpo', small('justgrpo'), 5)
  for row, (found, steps) in enumerate(zip(values, batch.steps, strict=True)):
    steps = steps[PROMPT : PROMPT + SLOTS]
    for j in range(SLOTS):
      still = ((steps >= steps[j]) * 2 ** np.arange(SLOTS)).sum()
      assert found[j] == pytest.approx(TABLE[still, j])
      later = (2 ** np.arange(j, SLOTS)).sum()
      assert left[row, j] == pytest.approx(TABLE[later, j])


def test_slots_after_eos_are_always_masked_and_not_scored():
  batch = made_batch(ends=2)
  for name in ('reinforce', 'd1', 'coupled_grpo', 'spg', 'random_masks'):
    queries = drawn(name, small(name), batch, np.arange(4))
    after = np.array(queries.masked)[..., PROMPT + 2 : PROMPT + SLOTS]
    scored = np.array(queries.scored)
    # The complement of a mask of coupled-GRPO sees some, as in its code.
    exist = np.array(scored.any(axis=2))
    assert after[exist].all() or name == 'coupled_grpo'
    assert not scored[..., PROMPT + 2 :].any() and scored.any()
