"""Networks with a drafter sample what the network samples without it."""

import collections
import dataclasses

import drafter_cases as cases
import jax
import numpy as np
import pytest
import sampled
from slow import SLOW

from maskdiff.errors import UserError
from maskdiff.sampling import layouts, passes
from maskdiff.sampling.serve import RowRequest, serve
from maskdiff.sampling.settings import split

SPECULATIVE = dict(block_length=1, remasking='speculative')
ONE_BY_ONE = dict(block_length=1, remasking='low_confidence')
CONTINUED = layouts.continue_prompts([[5, 6, 7], [8, 9], [10]], 12)
GAPS = layouts.fill_gaps(
  ['ab{{5}}cde{{3}}', 'a{{2}}bcdefghijk{{1}}n{{4}}'],
  lambda text: [5 + ord(letter) % 8 for letter in text],
)


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
  """Compiles the passes for one length only."""
  monkeypatch.setattr(passes, 'MAX_SHAPES', 1)


@pytest.mark.parametrize(
  'kind, length, cache, request_of',
  [
    ('block', 4, 'prefix', GAPS),
    SLOW('medusa', 4, 'prefix', CONTINUED),
    SLOW('mtp', 4, 'prefix', GAPS),
    SLOW('mtp', 2, 'none', CONTINUED),
  ],
)
def test_tokens_are_those_of_the_network(kind, length, cache, request_of):
  plain = sampled.complete(cases.without_drafter(), ONE_BY_ONE, request_of)
  values = SPECULATIVE | dict(cache=cache)
  found = sampled.complete(cases.network(kind, length), values, request_of)
  np.testing.assert_array_equal(found.canvas, plain.canvas)
  np.testing.assert_allclose(found.confidence, plain.confidence, atol=1e-5)
  assert np.sum(found.forwards) <= np.sum(plain.forwards)
  # A step fills the slots that its pass has verified, from left to right.
  assert (np.asarray(found.filled_at).max(axis=1) == found.forwards).all()


def oracle(kind):
  """Returns a network whose tokens are all equal, so that drafts are right."""
  network = cases.network(kind)
  params = jax.tree.map(lambda x: 0 * x, network.params)
  params['norm'] = params['norm'] + 1
  if kind != 'medusa':
    params['drafter']['norm'] = params['drafter']['norm'] + 1
  params['embed'] = params['embed'].at[:, 0].set(1.0).at[7, 0].set(2.0)
  return dataclasses.replace(network, params=params)


@pytest.mark.parametrize('kind', ['block', SLOW('medusa'), SLOW('mtp')])
def test_right_drafts_fill_a_row_in_the_fewest_passes(kind):
  """One token in the first pass, which has no draft, then four per pass."""
  network = oracle(kind)
  if kind == 'block':  # the masks take the place of the embedding of 7
    mask = network.params['embed'][7]
    network.params['drafter']['mask'] = mask
  values = SPECULATIVE | dict(cache='prefix')
  found = sampled.complete(network, values, CONTINUED)
  assert (np.asarray(found.canvas)[CONTINUED.fill] == 7).all()
  assert (np.asarray(found.forwards) == 4).all()  # 1 + 4 + 4 + 3 tokens


@pytest.mark.parametrize('kind', [SLOW('block'), SLOW('mtp')])
def test_rows_of_a_server_are_those_of_single_requests(kind):
  network = cases.network(kind)
  c, settings = split(SPECULATIVE | dict(cache='prefix'))
  rows = [[5, 6, *[None] * 7], [9, *[None] * 3], [8, 7, 6, *[None] * 5]]
  requests = [RowRequest(i, row, i, settings) for i, row in enumerate(rows)]
  for answer in serve(network, c, requests, rows=2, length=9):
    row = rows[answer.id]
    alone = layouts.lay_out([row], [answer.id], settings)
    found = sampled.complete(network, SPECULATIVE | dict(cache='prefix'), alone)
    np.testing.assert_array_equal(answer.recording.tokens, found.canvas[0])


@pytest.mark.slow
def test_at_a_temperature_the_distribution_is_that_of_the_network():
  """Chi-square of pairs of tokens in 4,096 rows; the first has no draft."""
  network = cases.network('block', 3)
  rows = layouts.continue_prompts([[5, 6]] * 4096, 3)
  rows = rows._replace(seeds=np.arange(4096))
  hot = dict(temperature=0.7)
  plain = sampled.complete(cases.without_drafter(), ONE_BY_ONE | hot, rows)
  found = sampled.complete(network, SPECULATIVE | hot, rows)
  count = lambda carry: collections.Counter(
    map(tuple, np.asarray(carry.canvas)[:, 3:].tolist())
  )
  a, b = count(plain), count(found)
  pairs = [p for p in a | b if a[p] + b[p] >= 10]
  statistic = sum((a[p] - b[p]) ** 2 / (a[p] + b[p]) for p in pairs)
  # Mean and standard deviation of chi-square with this many degrees of freedom.
  assert statistic < len(pairs) + 5 * (2 * len(pairs)) ** 0.5
  assert np.sum(found.forwards) < 3 * 4096


def test_other_rules_name_the_fix():
  with pytest.raises(UserError, match='set remasking=speculative'):
    sampled.complete(cases.network('medusa'), ONE_BY_ONE, CONTINUED)
  with pytest.raises(
    UserError, match='trained with objective sdlm or drafting'
  ):
    sampled.complete(cases.without_drafter(), SPECULATIVE, CONTINUED)
