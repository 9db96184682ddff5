"""wd1, SPG and VRPO equal their published code or exact values."""

import itertools

import golden_rl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_mask import subsets
from golden_rl import NAMES, arrays, case

from maskdiff.likelihood.device_queries import RowQueries
from maskdiff.rl import copies, spg, table, weighted
from maskdiff.rl.policy_loss import LogProbs

# wd1


def wd1_cases():
  names = {key.split('.')[1] for key in arrays('wd1') if key.endswith('.u')}
  return sorted(names)


@pytest.mark.parametrize('which', wd1_cases())
@pytest.mark.parametrize('name', NAMES)
def test_loss_and_gradient_equal_wd1(name, which):
  of = case('wd1', name)
  batch = golden_rl.batch_of(of['ids'], of['prompt_len'], of['completion_mask'])
  of = case('wd1', f'{name}.{which}')
  s = table.settings('wd1', prompt_mask=float(of['p_mask_prompt']))
  queries = golden_rl.whole_answer_masks(s, batch, golden_rl.pad(of['u']))
  network = golden_rl.network(name)
  found, _ = golden_rl.log_probs(network, batch, queries)
  recorded = golden_rl.at_slots(batch, of['logps'][None])
  np.testing.assert_allclose(
    found, np.where(batch.counted, recorded, 0), atol=2e-4
  )
  value, _, derivative = golden_rl.loss(
    'wd1', s, LogProbs(found), queries, batch, of['advantages']
  )
  golden_rl.check_loss(value, of['loss'])
  expected = golden_rl.at_slots(batch, of['dloss_dlogps'][None])
  if expected.any():
    golden_rl.check_derivative(derivative, expected)
    golden_rl.check_gradient(network, batch, queries, derivative, of)
  else:  # equal rewards
    assert value == 0 and not derivative.any()


def test_softmax_over_groups_is_that_of_each_group():
  s = table.settings('wd1', softmax_over='group', group=2)
  units = lambda a, x: golden_rl.sequence_units(np.float32(a), np.float32(x))
  a, x = [1.0, 0.0, 3.0, -1.0], [-2.0, -3.0, -5.0, -7.0]
  parts = [
    weighted.wd1(table.settings('wd1'), units(a[i : i + 2], x[i : i + 2]))
    for i in (0, 2)
  ]
  found = float(weighted.wd1(s, units(a, x)))
  assert found == pytest.approx(float(sum(parts)), rel=1e-6)


# SPG


def spg_settings(estimate):
  kind, _, power = estimate.partition('_')
  share = {'elbo': 0.0, 'eubo': 1.0, 'mix': 0.5, 'zero': 0.0}[kind]
  return table.settings(
    'spg',
    upper_share=share,
    upper_power=float(power or 1),
    negative_weight=0.0 if kind == 'zero' else 1.0,
  )


def spg_cases():
  keys = [key.split('.') for key in arrays('spg')]
  return sorted({key[1] for key in keys if len(key) == 3})


@pytest.mark.parametrize('which', spg_cases())
@pytest.mark.parametrize('name', NAMES)
def test_scores_loss_and_gradient_equal_spg(name, which):
  of = case('spg', name)
  padding = of['ids'].shape[1] - int(of['prompt_len'])
  batch = golden_rl.batch_of(
    of['ids'],
    of['prompt_len'],
    of['completion_mask'],
    valid=np.pad(
      of['prompt_mask'] == 1, ((0, 0), (0, padding)), constant_values=True
    ),
  )
  advantages = of['advantages']
  of = case('spg', f'{name}.{which}')
  masked = (of['noisy'] == golden_rl.IDS[name][0]).swapaxes(0, 1)
  masked = golden_rl.pad(masked)
  network = golden_rl.network(name)
  queries = golden_rl.spg_copies(table.settings('spg'), batch, masked)
  found, _ = golden_rl.log_probs(network, batch, queries)
  recorded = golden_rl.at_slots(batch, of['token_logps'].swapaxes(0, 1))
  np.testing.assert_allclose(
    found, np.where(queries.scored, recorded, 0), atol=2e-4
  )
  for estimate in sorted(
    k.removesuffix('.loss') for k in of if k.endswith('.loss')
  ):
    s = spg_settings(estimate)
    u = golden_rl.spg_units(s, found, found, None, queries, batch, advantages)
    used = advantages > (0 if estimate == 'zero' else -np.inf)
    np.testing.assert_allclose(
      u.score[used], of[f'{estimate}.seq_logps'][used], atol=2e-4
    )
    value, _, derivative = golden_rl.loss(
      'spg', s, LogProbs(found), queries, batch, advantages, pads=False
    )
    golden_rl.check_loss(value, of[f'{estimate}.loss'])
    norm = {'gradnorm_total': of[f'{estimate}.gradnorm_total']}
    golden_rl.check_gradient(network, batch, queries, derivative, norm)


def test_block_masks_hide_a_part_of_one_block_and_all_later_ones():
  """Also in a row whose last block is cut by eos."""
  batch = golden_rl.batch_of(
    np.zeros((2, 15), np.int32), 3, np.arange(12) < np.array([[12], [6]])
  )
  s = table.settings('spg', times=3, block_length=4, prompt_mask=0.0)
  queries = golden_rl.block_masks(
    None, s, batch, jax.random.key(0), np.arange(2)
  )
  masked = np.array(queries.masked)
  assert not masked[..., :3].any()
  blocks = masked[..., 3:15].reshape(3, 2, 3, 4)
  first = blocks.any(axis=3).argmax(axis=2)  # the drawn block
  assert sorted(first[:, 0]) == [0, 1, 2]  # without replacement
  assert set(first[:, 1]) == {0, 1}  # the second row has two blocks
  for copy, row in itertools.product(range(3), range(2)):
    assert blocks[copy, row, first[copy, row] + 1 :].all()
  assert masked[:, 1, 9:15].all() and not queries.scored[:, 1, 9:].any()
  shares = jnp.array([0.0, 0.5, 0.999])[:, None].repeat(2, axis=1)
  noise = np.random.default_rng(0).random((2, 3, 2, 20), np.float32)
  of_block = spg.block_mask_copies(
    s, batch, jnp.ones((3, 2), int), shares, *noise
  )
  counts = np.array(of_block.scored)[..., 7:11].sum(axis=2)
  np.testing.assert_array_equal(counts, [[1, 1], [3, 2], [4, 2]])


# VRPO


def vrpo():
  """Returns recorded arrays, tables [2^L, 5] by answer and network, masks."""
  of = arrays('vrpo')
  tables = {}
  for y, net in itertools.product('wl', ('policy', 'ref')):
    found = of[f'{y}.{net}.token_logp']
    tables[y, net] = np.pad(found, ((0, 0), (0, 5 - found.shape[1])))
  return of, tables


def preference_batch(of):
  """Returns the Batch of the chosen and the rejected answer."""
  counted = np.arange(5) < np.array([[len(of[f'{y}.response'])] for y in 'wl'])
  batch = golden_rl.batch_of(np.zeros((2, 5), np.int32), 0, counted)
  return batch._replace(answer=batch.counted)


def preference_of(of, tables, masked, weight):
  """Returns the loss, score and derivative for masks [n, 2, 5]."""
  index = (masked * 2 ** np.arange(5)).sum(axis=2)  # [n, 2]
  look_up = lambda net: np.stack(
    [tables['w', net][index[:, 0]], tables['l', net][index[:, 1]]], axis=1
  ).astype(np.float32)
  scale = float(of['beta'])
  s = table.settings('vrpo', preference_scale=scale, chosen_weight=0.0)
  queries = RowQueries(masked, masked, np.float32(weight))
  return golden_rl.loss(
    'vrpo', s, LogProbs(look_up('policy'), None, look_up('ref')), queries,
    preference_batch(of), np.zeros(2, np.float32),
  )  # fmt: skip


def test_loss_of_exact_bounds_equals_the_recorded_preference():
  """Every mask of each answer, with its probability times A/l as weight."""
  of, tables = vrpo()
  masked = np.zeros((32, 2, 5), bool)
  weight = np.zeros((32, 2))
  for b, y in enumerate('wl'):
    size = len(of[f'{y}.response'])
    sets = subsets(size)
    counts = sets.sum(axis=1)
    masked[: len(sets), b, :size] = sets
    per_count = np.bincount(counts)[counts]
    weight[1 : len(sets), b] = (1 / (per_count * np.maximum(counts, 1)))[1:]
  value, _, derivative = preference_of(of, tables, masked, weight)
  golden_rl.check_loss(value, of['loss'])
  by_bound = [derivative[31, 1, 0] / weight[31, 1]]
  by_bound.insert(0, derivative[15, 0, 0] / weight[15, 0])
  expected = [of['dloss_dB_w'], of['dloss_dB_l']]
  np.testing.assert_allclose(by_bound, expected, rtol=1e-4)


def test_loss_of_given_masks_equals_the_recorded_estimate():
  of, tables = vrpo()
  number = len(of['draws.w.mask'])
  masked, weight = np.zeros((number, 2, 5), bool), np.zeros((number, 2))
  for b, y in enumerate('wl'):
    drawn = of[f'draws.{y}.mask']
    masked[:, b, : drawn.shape[1]] = drawn
    weight[:, b] = drawn.shape[1] / drawn.sum(axis=1) / number
  value, _, _ = preference_of(of, tables, masked, weight)
  golden_rl.check_loss(value, of['draws.loss'])


@pytest.mark.slow
@pytest.mark.parametrize('i', range(len(arrays('vrpo')['score_variance'])))
def test_variance_of_the_score_by_budget_and_shared_masks(i):
  """The draws of `copies.bound` for n_t times, n_y masks, shared or not."""
  of, tables = vrpo()
  times, masks, shared, recorded = of['score_variance'][i]
  number = 20_000
  s = table.settings(
    'vrpo', times=int(times), masks_per_time=int(masks), chosen_weight=0.0
  )
  network = golden_rl.network('model_b')
  gaps = []
  for b, y in enumerate('wl'):
    size = len(of[f'{y}.response'])
    batch = golden_rl.batch_of(np.zeros((number, size), np.int32), 0)
    values = []
    for net in ('policy', 'ref'):
      draw = b if shared else 2 * b + (net == 'ref')
      queries = copies.bound(
        network, s, batch, jax.random.key(draw), np.arange(number)
      )
      index = np.array((queries.masked * 2 ** np.arange(size)).sum(axis=2))
      sums = tables[y, net].sum(axis=1)[index]
      values.append((np.array(queries.weight) * sums).sum(axis=0))
    gaps.append(values[0] - values[1])
  score = float(of['beta']) * (gaps[0] - gaps[1])
  assert score.var() == pytest.approx(recorded, rel=0.05)
  assert score.mean() == pytest.approx(
    float(of['score']), abs=4 * np.sqrt(recorded / number)
  )
