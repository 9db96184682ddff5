"""Likelihoods of networks that predict windows, against enumeration."""

import itertools

import numpy as np
import pytest
import sampled
from window_cases import (
  LIKELIHOOD,
  NETWORK,
  PROMPT,
  SIZE,
  VOCAB,
  laid_out,
  log_p,
)

from maskdiff.errors import UserError
from maskdiff.likelihood import bounds, estimators, queries
from maskdiff.sampling import layouts

LENGTH = 4  # of answers: more than a window
ANSWERS = list(itertools.product(range(VOCAB), repeat=LENGTH))


def at_offset(answer, offset):
  """Returns log p of an answer; the first window emits `offset` tokens."""
  total, starts = 0.0, [0, *range(offset, LENGTH, SIZE)]
  for start, end in itertools.pairwise([*starts, LENGTH]):
    window = log_p([*PROMPT, *answer[:start]])
    total += sum(window[j - start, answer[j]] for j in range(start, end))
  return total


def test_likelihoods_are_those_of_single_windows():
  some = [ANSWERS[i] for i in (0, 77, 150, 255)]
  one_by_one = bounds.left_to_right(NETWORK, LIKELIHOOD, laid_out(some))
  whole = bounds.whole_windows(NETWORK, LIKELIHOOD, laid_out(some))
  for i, answer in enumerate(some):
    chain = sum(
      log_p([*PROMPT, *answer[:j]])[0, answer[j]] for j in range(LENGTH)
    )
    assert one_by_one.log_likelihood[i] == pytest.approx(chain, abs=1e-4)
    mean = np.mean([at_offset(answer, o) for o in range(1, SIZE + 1)])
    assert whole.log_likelihood[i] == pytest.approx(mean, abs=1e-4)
  estimate = bounds.bound(
    NETWORK, LIKELIHOOD, laid_out(some), estimators.Estimator(), range(4)
  )
  np.testing.assert_array_equal(
    estimate.log_likelihood, one_by_one.log_likelihood
  )
  assert not estimate.stderr.any()


def test_every_offset_is_a_distribution_and_the_mean_is_below_the_mixture():
  """So that no mean of `whole_windows` is below the entropy of a source."""
  rows = queries.rows_of(NETWORK, LIKELIHOOD, laid_out(ANSWERS))
  made = estimators.windows(LENGTH, SIZE)
  first, *others = np.array(
    queries.evaluate(
      NETWORK,
      LIKELIHOOD,
      rows * SIZE,
      lambda i: estimators.Queries(
        made.masked[i // len(rows)][None].repeat(LENGTH, axis=0),
        np.eye(LENGTH, dtype=bool),
        np.ones(LENGTH),
      ),
    )
  ).reshape(SIZE, len(rows), LENGTH)
  by_offset = [first.sum(axis=1)]
  for offset, query in enumerate(others, 1):
    by_offset.append(
      first[:, :offset].sum(axis=1) + query[:, offset:].sum(axis=1)
    )
  np.testing.assert_allclose(np.exp(by_offset).sum(axis=1), 1, atol=1e-4)
  whole = bounds.whole_windows(NETWORK, LIKELIHOOD, laid_out(ANSWERS))
  found = whole.log_likelihood
  np.testing.assert_allclose(found, np.mean(by_offset, axis=0), atol=1e-4)
  mixture = np.log(np.mean(np.exp(by_offset), axis=0))
  assert (found <= mixture + 1e-6).all()
  one_by_one = bounds.left_to_right(NETWORK, LIKELIHOOD, laid_out(ANSWERS))
  assert np.exp(one_by_one.log_likelihood).sum() == pytest.approx(1, abs=1e-4)
  # Neither bounds the other.
  difference = found - one_by_one.log_likelihood
  assert difference.min() < -0.1 and difference.max() > 0.1


def test_greedy_answers_are_those_of_the_sampler():
  request = layouts.continue_prompts([PROMPT], LENGTH)
  values = dict(block_length=1, remasking='longest_prefix', threshold=1.0)
  answer = sampled.generate(NETWORK, values, request)[0, len(PROMPT) :].tolist()
  wrong = [*answer[:-1], (answer[-1] + 1) % VOCAB]
  answers = laid_out([answer, wrong, [(answer[0] + 1) % VOCAB, *answer[1:]]])
  found = bounds.greedy_matches(NETWORK, LIKELIHOOD, answers)
  np.testing.assert_array_equal(found, [True, False, False])


def test_other_networks_have_no_windows():
  causal = NETWORK.__class__(
    NETWORK.config, NETWORK.params, 'autoregressive', False, 4, 3
  )
  with pytest.raises(UserError, match='only networks trained with sdlm'):
    bounds.whole_windows(causal, LIKELIHOOD, laid_out())
