"""VRPO: loss, derivatives and variances equal exact values."""

import functools
import itertools

import golden_rl
import jax
import numpy as np
import pytest
from every_mask import subsets
from golden_rl import arrays

from maskdiff.likelihood.device_queries import RowQueries
from maskdiff.rl import copies, table
from maskdiff.rl.policy_loss import LogProbs

NETWORKS = 'policy', 'ref'
SIZES = [len(arrays('vrpo')[f'{y}.response']) for y in 'wl']
LONGEST = max(SIZES)


@functools.cache
def tables():
  """Returns log-probabilities [2^A, LONGEST] by answer and network."""
  found = {}
  for y, net in itertools.product('wl', NETWORKS):
    x = arrays('vrpo')[f'{y}.{net}.token_logp']
    found[y, net] = np.pad(x, ((0, 0), (0, LONGEST - x.shape[1])))
  return found


def loss_of(masked, weight):
  """Returns the loss, its metrics and derivative for masks [n, 2, LONGEST]."""
  index = (masked * 2 ** np.arange(LONGEST)).sum(axis=2)  # [n, 2]
  look_up = lambda net: np.stack(
    [tables()[y, net][index[:, b]] for b, y in enumerate('wl')], axis=1
  ).astype(np.float32)
  s = table.settings(
    'vrpo', preference_scale=float(arrays('vrpo')['beta']), chosen_weight=0.0
  )
  answers = np.arange(LONGEST) < np.array(SIZES)[:, None]
  ids = np.zeros((2, LONGEST), np.int32)
  batch = golden_rl.batch_of(ids, 0, answers)
  return golden_rl.loss(
    'vrpo',
    s,
    LogProbs(look_up('policy'), reference=look_up('ref')),
    RowQueries(masked, masked, np.float32(weight)),
    batch._replace(answer=batch.counted),
    np.zeros(2, np.float32),
  )


def test_loss_of_exact_bounds_equals_the_recorded_preference():
  """Each mask of an answer has its probability times A/l as its weight."""
  masked = np.zeros((2**LONGEST, 2, LONGEST), bool)
  weight = np.zeros((2**LONGEST, 2))
  for b, size in enumerate(SIZES):
    sets = subsets(size)[1:]
    counts = sets.sum(axis=1)
    masked[: len(sets), b, :size] = sets
    weight[: len(sets), b] = 1 / (np.bincount(counts)[counts] * counts)
  value, _, derivative = loss_of(masked, weight)
  of = arrays('vrpo')
  golden_rl.check_loss(value, of['loss'])
  for b, y in enumerate('wl'):
    by_bound = derivative[0, b, 0] / weight[0, b]
    assert by_bound == pytest.approx(float(of[f'dloss_dB_{y}']), rel=1e-4)


def test_loss_of_given_masks_equals_the_recorded_estimate():
  of = arrays('vrpo')
  number = len(of['draws.w.mask'])
  masked = np.zeros((number, 2, LONGEST), bool)
  weight = np.zeros((number, 2))
  for b, (y, size) in enumerate(zip('wl', SIZES, strict=True)):
    masked[:, b, :size] = of[f'draws.{y}.mask']
    weight[:, b] = size / masked[:, b].sum(axis=1) / number
  value, _, _ = loss_of(masked, weight)
  golden_rl.check_loss(value, of['draws.loss'])


@pytest.mark.slow
def test_variance_of_the_score_by_budget_and_shared_masks():
  """The draws of `copies.bound` for n_t times, n_y masks, shared or not."""
  of, number = arrays('vrpo'), 4000
  draw = jax.jit(copies.bound, static_argnums=1)
  network = golden_rl.network('model_b')

  def bounds(s, y, size, key):
    ids = np.zeros((number, LONGEST), np.int32)
    batch = golden_rl.batch_of(ids, 0, np.arange(LONGEST) < [[size]] * number)
    batch = batch._replace(answer=batch.counted)
    queries = draw(network, s, batch, jax.random.key(key), np.arange(number))
    masked = np.array(queries.masked)[..., :size]
    index = (masked * 2 ** np.arange(size)).sum(axis=2)
    values = {net: tables()[y, net].sum(axis=1)[index] for net in NETWORKS}
    return {
      net: (np.array(queries.weight) * x).sum(axis=0)
      for net, x in values.items()
    }

  for times, masks, shared, recorded in of['score_variance']:
    s = table.settings('vrpo', times=int(times), masks_per_time=int(masks))
    gaps = []
    for b, (y, size) in enumerate(zip('wl', SIZES, strict=True)):
      policy = bounds(s, y, size, b)
      other = policy if shared else bounds(s, y, size, b + 2)
      gaps.append(policy['policy'] - other['ref'])
    score = float(of['beta']) * (gaps[0] - gaps[1])
    assert score.var() == pytest.approx(recorded, rel=0.12)
    error = np.sqrt(recorded / number)
    assert abs(score.mean() - of['score']) < 4 * error
