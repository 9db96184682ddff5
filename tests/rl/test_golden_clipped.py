"""ESPO, diffu-GRPO (d1) and coupled-GRPO equal their published code."""

import functools

import golden_rl
import numpy as np
import pytest
from every_mask import reference_counts
from golden_rl import NAMES, case, cases

from maskdiff.rl import table
from maskdiff.rl.policy_loss import LogProbs


def clip_settings(name, of, **changes):
  """Returns the Settings that a recorded case names."""
  eps = float(of['eps']) if 'eps' in of else None
  return table.settings(
    name,
    clip_low=float(of['eps_low']) if eps is None else eps,
    clip_high=float(of['eps_high']) if eps is None else eps,
    kl_weight=float(of['beta']),
    **changes,
  )


# ESPO


@functools.cache
def espo_case(name, elbo):
  """Returns Batch, RowQueries, the recorded arrays and log-probabilities."""
  of = case('espo', f'{name}.{elbo}')
  batch = golden_rl.batch_of(of['ids'], of['prompt_len'])
  rows, start = len(of['ids']), int(of['prompt_len'])
  size = of['ids'].shape[1] - start
  counts = np.array(
    [reference_counts(int(k), size + 1, rows) for k in of['k']]
  ) % (size + 1)
  noise = golden_rl.at_slots(batch, of['perms'] / size)
  queries = golden_rl.exact_count(
    ((counts + 0.5) / (size + 1)).astype(np.float32),
    noise.astype(np.float32),
    batch.answer,
    True,
  )
  if not of['coupled']:  # the counts are those of a pair
    queries = queries._replace(
      **{k: getattr(queries, k)[::2] for k in queries._fields}
    )
  mask = golden_rl.mask_id(name)
  np.testing.assert_array_equal(
    queries.masked, golden_rl.pad(of['noisy'] == mask)
  )
  queries = queries._replace(weight=queries.weight / len(queries.weight))
  found, _ = golden_rl.log_probs(golden_rl.network(name), batch, queries)
  return batch, queries, of, found


@pytest.mark.parametrize('elbo', cases('espo', 'elbo'))
@pytest.mark.parametrize('name', NAMES)
def test_bound_equals_espo(name, elbo):
  batch, queries, of, found = espo_case(name, elbo)
  u = table.METHODS['espo'].units(
    table.settings('reinforce', after_eos=True),
    found, found, None, queries, batch, np.zeros(len(found[0])),
  )  # fmt: skip
  np.testing.assert_allclose(u.score, of['elbo'], atol=2e-4)


@pytest.mark.parametrize('j', cases('espo', 'loss'))
@pytest.mark.parametrize('name', NAMES)
def test_loss_and_gradient_equal_espo(name, j):
  batch, queries, of, found = espo_case(name, 'elbo1')
  of = case('espo', f'{name}.elbo1.{j}')
  total = lambda sums: as_tokens(queries, sums)
  probs = LogProbs(
    found,
    None if of['old_is_detached_self'] else total(of['old']),
    total(of['ref']),
  )
  s = clip_settings('espo', of)
  value, _, derivative = golden_rl.loss(
    'espo', s, probs, queries, batch, of['advantages']
  )
  golden_rl.check_loss(value, of['loss'])
  network = golden_rl.network(name)
  golden_rl.check_gradient(network, batch, queries, derivative, of)


def as_tokens(queries, sums):
  """Returns log-probabilities of tokens [n, B, L] with given weighted sums.

  All of the sum is at the first scored token of a row.
  """
  found = np.zeros(queries.scored.shape)
  for b, total in enumerate(sums):
    n, token = np.argwhere(np.array(queries.scored[:, b]))[0]
    found[n, b, token] = total / queries.weight[n, b]
  return found.astype(np.float32)


# diffu-GRPO


@functools.cache
def d1_case(name, i, iteration):
  of = case('d1', name)
  batch = golden_rl.batch_of(of['ids'], of['prompt_len'], of['completion_mask'])
  of = case('d1', f'{name}.{i}')
  s = table.settings('d1', prompt_mask=float(of['p_mask_prompt']))
  queries = golden_rl.whole_answer_masks(
    s, batch, golden_rl.pad(of['u'][iteration])
  )
  noisy = of['noisy'][iteration] == golden_rl.mask_id(name)
  np.testing.assert_array_equal(queries.masked[0], golden_rl.pad(noisy))
  # The published code also computes the slots after eos.
  everywhere = queries._replace(scored=batch.answer[None])
  found, _ = golden_rl.log_probs(
    golden_rl.network(name),
    batch,
    everywhere,
    guidance=float(of['cfg_scale']),
  )
  recorded = golden_rl.at_slots(batch, of['logps'][iteration][None])
  np.testing.assert_allclose(found, recorded, atol=2e-4)
  return batch, queries, found


@pytest.mark.parametrize('i', cases('d1', 'logp'))
@pytest.mark.parametrize('name', NAMES)
def test_log_probabilities_equal_d1(name, i):
  for iteration in range(len(case('d1', f'{name}.{i}')['u'])):
    d1_case(name, i, iteration)


@pytest.mark.parametrize('j', cases('d1', 'loss'))
@pytest.mark.parametrize('name', NAMES)
def test_loss_and_gradient_equal_d1(name, j):
  of = case('d1', f'{name}.{j}')
  batch, queries, found = d1_case(name, 'logp0', int(of['iteration']))
  check_token_loss('d1', name, of, batch, queries, found)


def check_token_loss(method, name, of, batch, queries, found, scale=1.0):
  """Compares the loss of tokens with recorded arrays.

  Args:
    method: name of the method.
    name: name of the network.
    of: recorded arrays.
    batch: Batch.
    queries: RowQueries.
    found: [n, B, L], the log-probabilities.
    scale: of the network's derivatives, [n, 1, 1] or a number.
  """
  wide = lambda x: golden_rl.at_slots(batch, x[None])
  one = golden_rl.token_queries(batch, batch.counted)
  new = found if len(found) == 1 else wide(of['logps'])
  old = None if of['old_is_detached_self'] else wide(of['old'])
  s = clip_settings(method, of)
  value, metrics, derivative = golden_rl.loss(
    method, s, LogProbs(new, old, wide(of['ref'])), one, batch,
    of['advantages'],
  )  # fmt: skip
  golden_rl.check_loss(value, of['loss'])
  golden_rl.check_derivative(derivative, wide(of['dloss_dlogps']))
  if 'kl' in of:
    assert metrics['kl'] == pytest.approx(of['kl'], rel=1e-4)
  if 'clip_ratio' in of:
    # The published metric counts where the clip would bind for the opposite
    # advantages. The clip fraction here counts where it binds.
    _, opposite, _ = golden_rl.loss(
      method, s, LogProbs(new, old, wide(of['ref'])), one, batch,
      -of['advantages'],
    )  # fmt: skip
    assert opposite['clip_fraction'] == pytest.approx(of['clip_ratio'])
  network = golden_rl.network(name, method == 'coupled_grpo')
  golden_rl.check_gradient(network, batch, queries, derivative * scale, of)


def test_advantages_equal_d1():
  of = case('d1', 'adv')
  found = golden_rl.advantages(
    of['rewards'], int(of['num_generations']), 'group_mean'
  )
  np.testing.assert_allclose(found, of['advantages'], atol=1e-6)


@pytest.mark.parametrize('tie', ['0', '1'])
def test_derivative_at_ratio_1_is_the_advantage(tie):
  """Also with a clip of 0, where a minimum of a clip would split it."""
  of = case('d1', f'tie.{tie}')
  number, eps = len(of['advantages']), float(of['eps'])
  batch = golden_rl.batch_of(np.zeros((number, 1), np.int32), 0)
  s = table.settings('d1', clip_low=eps, clip_high=eps, kl_weight=0.0)
  zeros = np.zeros((1, *batch.tokens.shape), np.float32)
  queries = golden_rl.token_queries(batch, batch.answer)
  _, _, derivative = golden_rl.loss(
    'd1', s, LogProbs(zeros, zeros), queries, batch, of['advantages']
  )
  np.testing.assert_allclose(
    -number * derivative[0, :, 0], of['dobjective_dlogp'], rtol=1e-6
  )


# coupled-GRPO


def coupled_batch(name):
  of = case('coupled_grpo', name)
  return golden_rl.batch_of(of['ids'], of['prompt_len'], of['completion_mask'])


def coupled_log_probs(name, batch, time, noise, recorded):
  """Returns queries, and log-probabilities, which equal recorded ones."""
  s = table.settings('coupled_grpo', after_eos=True)
  queries = golden_rl.coupled_token_masks(
    s, batch, np.float32(time), golden_rl.pad(noise)
  )
  network = golden_rl.network(name, predict_next=True)
  found, _ = golden_rl.log_probs(network, batch, queries)
  tokens = (queries.weight[..., None] * found).sum(axis=0)
  np.testing.assert_allclose(
    tokens, golden_rl.at_slots(batch, recorded), atol=2e-4
  )
  return queries, found


@pytest.mark.parametrize('name', NAMES)
def test_log_probabilities_equal_coupled_grpo(name):
  batch = coupled_batch(name)
  of = case('coupled_grpo', f'{name}.single')
  queries, _ = coupled_log_probs(name, batch, of['t'][0], of['u'], of['logps'])
  noisy = of['noisy'] == golden_rl.mask_id(name)
  np.testing.assert_array_equal(queries.masked, golden_rl.pad(noisy))
  of = case('coupled_grpo', f'{name}.accumulated')
  for time, u, recorded in zip(of['t'], of['u'], of['logps'], strict=True):
    u = np.tile(u, (int(of['grad_accum']), 1))
    coupled_log_probs(name, batch, time, u, recorded)


@pytest.mark.parametrize('j', cases('coupled_grpo', 'loss'))
@pytest.mark.parametrize('name', NAMES)
def test_loss_and_gradient_equal_coupled_grpo(name, j):
  batch = coupled_batch(name)
  of = case('coupled_grpo', f'{name}.{j}')
  queries, found = coupled_log_probs(name, batch, of['t'], of['u'], of['logps'])
  scale = np.where(queries.scored, queries.weight[..., None], 0)
  check_token_loss('coupled_grpo', name, of, batch, queries, found, scale)


def test_advantages_equal_coupled_grpo():
  of = case('coupled_grpo', 'loo')
  for deviation, key in (('none', 'scale0'), ('sample', 'scale1')):
    found = golden_rl.advantages(
      of['rewards'], int(of['num_generations']), 'leave_one_out', deviation
    )
    np.testing.assert_allclose(found, of[f'advantages_{key}'], atol=1e-5)


def test_advantages_equal_espo():
  of = case('espo', 'loo')
  found = golden_rl.advantages(
    of['rewards'], int(of['num_generations']), 'leave_one_out'
  )
  np.testing.assert_allclose(found, of['advantages'], atol=1e-6)
