"""wd1 and SPG equal their published code."""

import itertools

import golden_rl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_rl import NAMES, arrays, case

from maskdiff.rl import table, weighted
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
  masked = (of['noisy'] == golden_rl.mask_id(name)).swapaxes(0, 1)
  masked = golden_rl.pad(masked)
  network = golden_rl.network(name)
  queries = golden_rl.spg_copies(table.settings('spg'), batch, masked)
  found, _ = golden_rl.log_probs(network, batch, queries)
  recorded = golden_rl.at_slots(batch, of['token_logps'].swapaxes(0, 1))
  np.testing.assert_allclose(
    found, np.where(queries.scored, recorded, 0), atol=2e-4
  )
  # Copies are repeated, which changes no mean, so that all cases compile once.
  number = len(masked)
  repeat = lambda x: np.tile(x, (golden_rl.COPIES // number, 1, 1))
  repeated = golden_rl.spg_copies(table.settings('spg'), batch, repeat(masked))
  for estimate in sorted(k.removesuffix('.loss') for k in of if 'loss' in k):
    s = spg_settings(estimate)
    probs = LogProbs(repeat(found))
    u = golden_rl.spg_units(
      s, probs.new, probs.new, None, repeated, batch, advantages
    )
    used = advantages > (0 if estimate == 'zero' else -np.inf)
    np.testing.assert_allclose(
      u.score[used], of[f'{estimate}.seq_logps'][used], atol=2e-4
    )
    value, _, derivative = golden_rl.loss(
      'spg', s, probs, repeated, batch, advantages, pads=False
    )
    golden_rl.check_loss(value, of[f'{estimate}.loss'])
    derivative = derivative.reshape(-1, *found.shape).sum(axis=0)
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
  of_block = golden_rl.block_mask_copies(
    s, batch, jnp.ones((3, 2), int), shares, *noise
  )
  counts = np.array(of_block.scored)[..., 7:11].sum(axis=2)
  np.testing.assert_array_equal(counts, [[1, 1], [3, 2], [4, 2]])
