"""Likelihoods of networks trained on blocks, against enumeration."""

import dataclasses
import itertools

import fake_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled
import tiny

from maskdiff.errors import UserError
from maskdiff.likelihood import (
  answer_blocks,
  bounds,
  device_queries,
  estimators,
  queries,
  row_bounds,
)
from maskdiff.likelihood.estimators import Estimator
from maskdiff.likelihood.queries import LikelihoodConfig
from maskdiff.model import masks, transformer
from maskdiff.sampling import layouts

MASK, BLOCK = 4, 3
CONFIG = LikelihoodConfig(
  context=64, guidance=0.0, tokens_per_call=1024, loss_chunk_tokens=64
)
# The answer has 1 token in the first block, 3 in the second, 2 in the third.
PROMPT, ANSWER = [7, 8], [9, 5, 6, 20, 21, 22]
ROW = PROMPT + ANSWER
SIZES = [1, 3, 2]
WHERE = np.split(np.arange(2, 8), np.cumsum(SIZES)[:-1])
ANSWERS = bounds.lay_out([PROMPT], [ANSWER])


def network_of(block_length):
  return fake_networks.network(
    tiny.MODEL,
    tiny.strong_params(),
    mask_id=MASK,
    objective='block_diffusion',
    block_length=block_length,
  )


NETWORK = network_of(BLOCK)


def log_p(masked):
  """Returns log p of the tokens of ROW given a set of masked positions.

  By inference on the clean text before the block of each position.
  """
  model = transformer.bind(NETWORK.config, NETWORK.params)
  found = np.zeros(len(ROW))
  for start in range(0, len(ROW), BLOCK):
    end = min(start + BLOCK, len(ROW))
    row = np.array([ROW[:end]])
    row[0, start:] = np.where(masked[start:end], MASK, row[0, start:])
    labels = masks.block_causal(jnp.ones(row.shape, bool), BLOCK)
    logits = np.array(model.logits(model(row, labels)), np.float64)[0]
    logits[:, MASK] = -np.inf
    logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    found[start:end] = logits[np.arange(start, end), ROW[start:end]]
  return found


def masked_at(positions):
  masked = np.zeros(len(ROW), bool)
  masked[list(positions)] = True
  return masked


@pytest.fixture(scope='module')
def bound():
  """The sum over blocks of the bound of masked diffusion, by enumeration."""
  total = 0.0
  for where in WHERE:
    for l in range(1, len(where) + 1):
      sums = [
        log_p(masked_at(some))[list(some)].sum()
        for some in itertools.combinations(where, l)
      ]
      total += np.mean(sums) / l
  return total


def test_block_sizes_are_counted_from_the_start_of_the_row():
  (row,) = queries.rows_of(NETWORK, CONFIG, ANSWERS)
  np.testing.assert_array_equal(answer_blocks.sizes(NETWORK, row.answer), SIZES)
  whole = dataclasses.replace(
    NETWORK, objective='masked_diffusion', block_length=0
  )
  assert answer_blocks.sizes(whole, row.answer).tolist() == [6]


@pytest.mark.parametrize('coupled', [False, True])
@pytest.mark.parametrize('form', estimators.FORMS)
def test_bound_is_that_of_each_block_given_the_text_before(
  bound, form, coupled
):
  e = Estimator(form, 2048, 16, coupled)
  found = bounds.bound(NETWORK, CONFIG, ANSWERS, e, [0])
  assert 0 < found.stderr[0] < 0.04 * abs(bound)
  assert abs(found.log_likelihood[0] - bound) < 4 * found.stderr[0]


def test_blocks_of_one_token_have_an_exact_bound():
  network = network_of(1)
  e = Estimator(samples=16, strata=4)
  found = bounds.bound(network, CONFIG, ANSWERS, e, [0])
  chain = bounds.left_to_right(network, CONFIG, ANSWERS)
  assert found.stderr[0] == pytest.approx(0, abs=1e-9)
  assert found.log_likelihood[0] == pytest.approx(
    chain.log_likelihood[0], rel=1e-6
  )


def test_chain_rule_fills_blocks_from_left_to_right():
  order = [0, 3, 1, 2, 5, 4]
  (found,) = bounds.chain_rule(
    NETWORK, CONFIG, ANSWERS, [np.array([order, np.arange(6)])]
  )
  expected = []
  for tokens in (order, range(6)):
    left, total = list(tokens), 0.0
    while left:
      masked = masked_at([2 + i for i in left])
      total += log_p(masked)[2 + left.pop(0)]
    expected.append(total)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_orders_across_blocks_are_refused():
  with pytest.raises(UserError, match='blocks of 3 tokens from left to right'):
    bounds.chain_rule(
      NETWORK, CONFIG, ANSWERS, [np.array([[1, 0, 2, 3, 4, 5]])]
    )


def test_mean_over_all_orders_is_the_bound(bound):
  orders = [
    np.concatenate(parts)
    for parts in itertools.product(
      *(itertools.permutations(where - 2) for where in WHERE)
    )
  ]
  (found,) = bounds.chain_rule(NETWORK, CONFIG, ANSWERS, [np.array(orders)])
  assert found.mean() == pytest.approx(bound, rel=1e-5)
  for drawn in (2, 64):
    several = bounds.multi_sample(NETWORK, CONFIG, ANSWERS, drawn, [0])
    likelihood = np.log(np.exp(found - found.max()).mean()) + found.max()
    assert several.log_likelihood[0] < likelihood + 4 * several.stderr[0]


def test_greedy_matches_are_those_of_the_sampler():
  prompts = [[7, 8, 9, 10], [11], [12, 13], [14] * 6]
  request = layouts.continue_prompts(prompts, 5)
  canvas = sampled.generate(NETWORK, dict(block_length=BLOCK), request)
  rows = [row[ok] for row, ok in zip(canvas, request.valid, strict=True)]
  right = [r[len(p) :].tolist() for r, p in zip(rows, prompts, strict=True)]
  wrong = [[*a[:k], (a[k] + 1) % 4, *a[k + 1 :]] for k, a in enumerate(right)]
  matches = bounds.greedy_matches(
    NETWORK, CONFIG, bounds.lay_out(prompts * 2, right + wrong)
  )
  assert matches.tolist() == [True] * 4 + [False] * 4


# In jit


def test_queries_of_a_device_have_a_time_per_block():
  answer = jnp.asarray(np.arange(8) >= 2)[None]
  e = Estimator('count', 512, 16)
  drawn = device_queries.draw_blocks(
    e, answer, jax.random.key(0), jnp.array([5]), BLOCK
  )
  masked, weight = (
    np.asarray(drawn.masked)[:, 0],
    np.asarray(drawn.weight)[:, 0],
  )
  assert not masked[:, :2].any()
  for where in WHERE:
    count = masked[:, where].sum(axis=1)
    assert set(count) == set(range(1, len(where) + 1))
    np.testing.assert_allclose(
      weight[:, where], np.repeat(len(where) / count[:, None], len(where), 1)
    )
  assert len(np.unique(masked, axis=0)) > 12  # blocks are independent


@pytest.mark.slow
def test_values_on_a_device_are_those_on_the_host():
  answers = queries.Answers(*map(jnp.asarray, ANSWERS))
  e, key = Estimator(samples=8, strata=4), jax.random.key(1)
  drawn = row_bounds.draw([NETWORK], e, answers.answer, key, jnp.array([0]))
  found = row_bounds.values([NETWORK], answers, drawn, 16)[0, :, 0]
  scored = np.asarray(drawn.scored)[:, 0]
  expected = [
    (np.where(s, log_p(m), 0) * w).sum()
    for m, s, w in zip(
      np.asarray(drawn.masked)[:, 0],
      scored,
      np.asarray(drawn.weight)[:, 0],
      strict=True,
    )
  ]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_bounds_of_other_blocks_are_not_compared():
  answers = queries.Answers(*map(jnp.asarray, ANSWERS))
  with pytest.raises(UserError, match='2 .*blocks of 2.*blocks of 3'):
    row_bounds.draw(
      [NETWORK, network_of(2)],
      Estimator(),
      answers.answer,
      jax.random.key(0),
      jnp.array([0]),
    )


@pytest.mark.parametrize(
  'prompt, answer, suffix, seen',
  [([7, 8], [9], [], True), ([7], [9], [8], True), ([7], [8, 9], [8], False)],
)
def test_text_in_a_later_block_than_the_answer_is_refused(
  prompt, answer, suffix, seen
):
  """A block of 3 tokens: a suffix of the same block is seen."""
  rows = bounds.lay_out([prompt], [answer], [suffix])
  if seen:
    assert len(queries.rows_of(NETWORK, CONFIG, rows)) == 1
    return
  with pytest.raises(UserError, match='text follows the answer'):
    queries.rows_of(NETWORK, CONFIG, rows)
