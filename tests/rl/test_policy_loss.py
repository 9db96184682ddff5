"""What all methods share: ratios, constant rewards, expectations, errors."""

import dataclasses
import functools
import pathlib
import re

import fake_networks
import golden_rl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from policy_cases import KEY, drawn, made_batch, small

from maskdiff.errors import UserError
from maskdiff.rl import batch as batch_lib
from maskdiff.rl import policy_loss, table, trace, weighted
from maskdiff.rl.advantages import advantages
from maskdiff.rl.policy_loss import LogProbs

METHODS = sorted(table.METHODS)


@pytest.mark.parametrize('name', METHODS)
def test_first_inner_step_has_ratio_1_and_constant_rewards_no_update(name):
  """The log-probabilities are computed twice by the network.

  Constant rewards give exactly no update, also with the published divergence
  of a policy that equals its reference. Preferences have no rewards: their
  update is never 0.
  """
  batch, s = made_batch(), small(name)
  queries = drawn(name, s, batch, np.arange(4))
  network = golden_rl.network('model_a')
  new, _ = golden_rl.log_probs(network, batch, queries)
  again, _ = golden_rl.log_probs(network, batch, queries)
  rewards = np.float32([0.1, 0.1, 0.1, 0.1])
  constant = advantages(rewards, 4, 'group_mean', 'sample')
  assert not constant.any()
  probs = LogProbs(new, again, again)
  value, metrics, derivative = golden_rl.loss(
    name, s, probs, queries, batch, constant, pads=False
  )
  if name == 'vrpo':
    assert (metrics['margin'], metrics['preference_accuracy']) == (0, 0.5)
    assert metrics['preference_loss'] == pytest.approx(np.log(2))
  else:
    ratios = [metrics[f'ratio_{x}'] for x in ('mean', 'std', 'min', 'max')]
    np.testing.assert_array_equal(ratios, [1, 0, 1, 1])
    assert metrics['clip_fraction'] == metrics['kl'] == 0
  assert np.isfinite(value)
  assert derivative.any() == (name == 'vrpo')
  _, _, derivative = golden_rl.loss(
    name, s, probs, queries, batch, np.float32([2, -1, 0, -1]), pads=False
  )
  assert np.isfinite(derivative).all() and derivative.any()
  # Only scored tokens have a gradient.
  assert not derivative[~np.array(queries.scored)].any()


def test_equal_rewards_have_advantages_of_exactly_0():
  """Also where the rounded mean of a group differs from its rewards."""
  rewards = np.linspace(0.1, 3, 200, dtype=np.float32).repeat(7)
  rounded = rewards.reshape(-1, 7).mean(axis=1).repeat(7)
  assert (rounded != rewards).any()
  for baseline in ('group_mean', 'leave_one_out'):
    for deviation in ('none', 'population', 'sample'):
      assert not advantages(rewards, 7, baseline, deviation).any()
  assert (advantages(rewards, 7, 'none') == rewards).all()


# Batches and errors


def odd():
  return golden_rl.sequence_units(np.zeros(3), np.zeros(3))


def test_answers_end_at_the_first_eos():
  tokens = np.array([[9, 7, 9, 7, 7, 3], [7, 1, 2, 3, 4, 5]])
  answer = np.arange(6) >= np.array([[2], [1]])
  until = lambda n: np.array(batch_lib.until_eos(tokens, answer, 9, n))
  np.testing.assert_array_equal(until(1)[0], [0, 0, 1, 0, 0, 0])
  np.testing.assert_array_equal(until(0)[0], np.zeros(6))
  np.testing.assert_array_equal(until(3)[0], [0, 0, 1, 1, 1, 0])
  np.testing.assert_array_equal(until(1)[1], answer[1])
  np.testing.assert_array_equal(until(-1), answer)


@pytest.mark.parametrize(
  'call, message',
  [
    (lambda: table.find('ppo'), "method 'ppo': choose one of espo"),
    (lambda: table.settings('espo', kl='k4'), "kl='k4': choose one of k1"),
    (lambda: table.settings('espo', times=0), 'times=0 must be at least 1'),
    (lambda: table.settings('d1', clip_low=-1), 'must not be negative'),
    (lambda: table.settings('d1', prompt_mask=2), 'must lie in'),
    (lambda: table.settings('d1', time_range=(1, 0)), 'must ascend'),
    (lambda: table.settings('wd1', softmax_over='group'), 'needs group=2'),
    (lambda: weighted.preference(None, odd()), '3 rows are not pairs'),
    (lambda: advantages(np.ones(4), 3, 'group_mean'), 'multiple of group=3'),
    (lambda: advantages(np.ones(4), 1, 'group_mean'), 'set group=2'),
    (lambda: advantages(np.ones(4), 2, 'mean'), "baseline='mean'"),
    (lambda: advantages(np.ones(4), 2, 'none', 'std'), "deviation='std'"),
  ],
)
def test_bad_settings_are_user_errors(call, message):
  with pytest.raises(UserError, match=message):
    call()


def test_missing_inputs_are_user_errors():
  batch = made_batch()
  network = dataclasses.replace(golden_rl.network('model_a'), params=None)
  causal = dataclasses.replace(network, objective='autoregressive')
  call = lambda name, network, batch, **changes: policy_loss.draw(
    name, network, table.settings(name, **changes), batch, KEY, np.arange(4)
  )
  with pytest.raises(UserError, match='use one of espo, justgrpo, reinforce'):
    call('d1', causal, batch)
  with pytest.raises(UserError, match='needs the step at which'):
    call('tracerl', network, batch._replace(steps=None))
  blocks = dataclasses.replace(
    network, objective='block_diffusion', block_length=2
  )
  with pytest.raises(UserError, match='set masks_per_time=1'):
    call('vrpo', blocks, batch, masks_per_time=2)
  with pytest.raises(UserError, match='set copies=4 or 0'):
    s = table.settings('justgrpo', copies=3)
    trace.check_copies(network, s, trace.in_order(batch))
  for name in ('vrpo', 'espo'):
    with pytest.raises(UserError, match='needs a reference network'):
      policy_loss.loss(
        name, small(name), LogProbs(np.zeros(4)), None, batch, None
      )


def test_causal_networks_have_one_copy_of_their_exact_log_likelihood():
  batch = made_batch()
  network = dataclasses.replace(
    golden_rl.network('model_a'), params=None, objective='autoregressive'
  )
  for name in ('espo', 'justgrpo', 'reinforce', 'vrpo'):
    queries = policy_loss.draw(
      name, network, small(name), batch, KEY, np.arange(4)
    )
    assert not np.array(queries.masked).any()
    np.testing.assert_array_equal(queries.scored, batch.answer[None])
    np.testing.assert_array_equal(queries.weight, np.ones((1, 4)))


@pytest.mark.slow
def test_code_of_the_page_runs_in_jit():
  """The page's example, differentiated by the parameters of a tiny network."""
  page = (pathlib.Path(__file__).parents[2] / 'docs' / 'rl.md').read_text()
  code = compile(
    re.search(r'```python\n(.*?)```', page, re.S)[1], 'rl.md', 'exec'
  )
  params = tiny.strong_params()
  network = fake_networks.network(tiny.MODEL, params, mask_id=4)
  tokens = np.random.default_rng(0).integers(5, 24, (6, 8))
  batch = golden_rl.batch_of(tokens, 3)
  rewards = np.float32([0, 1, 0, 0, 1, 0])

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def of(params, reference):
    names = dict(
      policy=dataclasses.replace(network, params=params),
      reference=dataclasses.replace(network, params=reference),
      batch=batch,
      key=KEY,
      numbers=np.arange(6),
      chunk=16,
      rewards=rewards,
    )
    exec(code, names)
    return names['value'], names['metrics']

  (value, metrics), gradient = of(params, params)
  assert metrics['ratio_min'] == metrics['ratio_max'] == 1
  assert metrics['kl'] == 0
  assert abs(value) < 1e-6  # the advantages of a group have the mean 0
  norms = [float(jnp.abs(x).max()) for x in jax.tree.leaves(gradient)]
  assert all(0 < norm < np.inf for norm in norms)
  other = jax.tree.map(lambda x: 1.1 * x, params)
  (_, metrics), _ = of(params, other)
  assert metrics['kl'] > 0 and metrics['ratio_max'] == 1
