"""Samples of a known distribution, from its exact denoiser.

Texts have three tokens from a vocabulary of three. The network computes the
exact probabilities of each token given the known tokens, from the joint
distribution.
"""

import itertools

import fake_networks
import numpy as np
import pytest
import sampled
import scipy.stats

from maskdiff.sampling import layouts

MASK, VOCAB, IDS = 4, 8, (5, 6, 7)
JOINT = np.random.default_rng(7).dirichlet(np.full(27, 0.5)).reshape(3, 3, 3)
JOINT = (JOINT + 0.01) / (JOINT + 0.01).sum()
NETWORK = fake_networks.network(
  fake_networks.conditionals(JOINT, IDS, MASK, VOCAB), mask_id=MASK
)


@pytest.fixture(autouse=True)
def fake(monkeypatch):
  fake_networks.put_in(monkeypatch)


def counts(number, remasking, steps, **options):
  """Returns how often each of the 27 texts is sampled, [3, 3, 3]."""
  c = dict(
    steps=steps,
    block_length=3,
    temperature=1.0,
    remasking=remasking,
    **options,
  )
  request = layouts.continue_prompts([[]] * number, 3)
  out = sampled.generate(NETWORK, c, request)
  found = np.zeros((3, 3, 3), int)
  np.add.at(found, tuple(np.asarray(out).T - IDS[0]), 1)
  return found


def p_value(found, expected):
  return scipy.stats.chisquare(
    found.ravel(), expected.ravel() * found.sum()
  ).pvalue


def known(state):
  """Returns the joint distribution given a state's tokens; None is a mask."""
  matching = np.zeros_like(JOINT)
  where = tuple(slice(None) if x is None else slice(x, x + 1) for x in state)
  matching[where] = JOINT[where]
  return matching / matching.sum()


def ancestral_distribution(ratios):
  """Returns the exact distribution of texts after the steps of `ratios`.

  Step i unmasks each masked token independently, with probability
  1 - ratios[i + 1] / ratios[i]. The token is drawn from its probabilities given
  the state. The function enumerates all states, in float64.

  Args:
    ratios: mask ratios at the times of the steps, from 1 to 0.
  """
  probabilities = {(None, None, None): 1.0}
  for before, after in itertools.pairwise(ratios):
    unmask = 1 - after / before
    successors = {}
    for state, probability in probabilities.items():
      p = known(state)
      options = []
      for axis, x in enumerate(state):
        others = tuple(a for a in range(3) if a != axis)
        drawn = list(enumerate(unmask * p.sum(others)))
        options.append(
          [(x, 1.0)] if x is not None else [(None, 1 - unmask), *drawn]
        )
      for choice in itertools.product(*options):
        state = tuple(x for x, _ in choice)
        p_state = probability * np.prod([q for _, q in choice])
        if p_state > 0:
          successors[state] = successors.get(state, 0.0) + p_state
    probabilities = successors
  distribution = np.zeros((3, 3, 3))
  for state, probability in probabilities.items():
    distribution[state] = probability
  return distribution


EXACT = {
  'first_hitting': dict(remasking='first_hitting', steps=1),
  'random_one_by_one': dict(remasking='random', steps=3),
  # The order may depend on the known tokens, but not on the drawn ones.
  'by_entropy_one_by_one': dict(
    remasking='low_confidence', steps=3, confidence='entropy'
  ),
  'threshold_out_of_reach': dict(
    remasking='threshold', steps=1, threshold=2.0, confidence='margin'
  ),
}


@pytest.mark.parametrize(
  'case',
  [
    case
    if case == 'first_hitting'
    else pytest.param(case, marks=pytest.mark.slow)
    for case in EXACT
  ],
)
def test_one_token_per_step_samples_the_exact_distribution(case):
  assert p_value(counts(6000, **EXACT[case]), JOINT) > 1e-3


def test_order_by_probability_of_the_draw_is_biased():
  """Probable draws are committed first; improbable ones are drawn again."""
  found = counts(6000, 'low_confidence', steps=3)
  assert p_value(found, JOINT) < 1e-6


@pytest.mark.slow
def test_ancestral_in_many_steps_samples_the_exact_distribution():
  assert p_value(counts(4000, 'ancestral', steps=200), JOINT) > 1e-3


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
def test_ancestral_in_few_steps_follows_its_exact_distribution(schedule):
  """Tokens of one step are independent, so the distribution differs."""
  times = 1 - np.arange(4) / 3
  ratios = {'linear': times, 'cosine': np.sin(np.pi / 2 * times)}[schedule]
  distribution = ancestral_distribution(ratios)
  assert distribution.sum() == pytest.approx(1)
  found = counts(6000, 'ancestral', steps=3, schedule=schedule)
  assert p_value(found, distribution) > 1e-3
  assert p_value(found, JOINT) < 1e-6


def test_ancestral_distribution_converges():
  far = [
    np.abs(ancestral_distribution(1 - np.arange(n + 1) / n) - JOINT).sum() / 2
    for n in (1, 4, 16, 64)
  ]
  assert far == sorted(far, reverse=True)
  assert far[0] > 0.1 > 0.01 > far[-1]
