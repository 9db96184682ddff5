"""What all methods share: ratios, constant rewards, expectations, errors."""

import dataclasses
import functools
import itertools
import math
import pathlib
import re

import fake_networks
import golden_rl
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from every_mask import elbo, subsets

from maskdiff.errors import UserError
from maskdiff.rl import batch as batch_lib
from maskdiff.rl import clipped, divergence, policy_loss, table, trace
from maskdiff.rl.advantages import advantages
from maskdiff.rl.policy_loss import LogProbs
from maskdiff.rl.units import Units

METHODS = sorted(table.METHODS)
KEY = jax.random.key(5)
PROMPT, SLOTS = 2, 4
TABLE = np.random.default_rng(1).uniform(-3, 0, (2**SLOTS, SLOTS))


def made_batch(rows=4, ends=SLOTS):
  """Returns a Batch of prompts of 2 tokens and answers of 4 slots."""
  rng = np.random.default_rng(2)
  steps = rng.permuted(np.tile(np.arange(SLOTS), (rows, 1)), axis=1)
  counted = np.tile(np.arange(SLOTS) < ends, (rows, 1))
  tokens = rng.integers(5, 90, (rows, PROMPT + SLOTS))
  return golden_rl.batch_of(tokens, PROMPT, counted, steps=steps)


def small(name):
  """Returns published settings with few copies."""
  s = table.METHODS[name].settings
  s = dataclasses.replace(s, times=min(s.times, 4), block_length=2)
  return dataclasses.replace(s, copies=SLOTS)


@functools.partial(jax.jit, static_argnums=(0, 1))
def drawn(name, s, batch, numbers, key=KEY):
  network = dataclasses.replace(golden_rl.network('model_a'), params=None)
  return policy_loss.draw(name, network, s, batch, key, numbers)


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


def test_rewards_without_a_baseline_have_an_update():
  rewards = np.float32([0.3, 0.3])
  assert (advantages(rewards, 2, 'none') == rewards).all()


def look_up(queries):
  """Returns log-probabilities of the tokens of a table, [n, B, L]."""
  at = lambda x: np.array(x)[..., PROMPT : PROMPT + SLOTS]
  masked = at(queries.masked)
  index = (masked * 2 ** np.arange(SLOTS)).sum(axis=2)
  return golden_rl.pad(np.pad(TABLE[index], ((0, 0), (0, 0), (PROMPT, 0))))


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


# Divergence


def test_estimates_and_gradients_of_the_divergence():
  """Exact for three outcomes: sums over outcomes replace the samples."""
  logits = jnp.array([0.3, -0.5, 1.1])
  reference = jax.nn.log_softmax(jnp.array([-0.2, 0.4, 0.1]))
  kl = lambda p, q: (jnp.exp(p) * (p - q)).sum()
  exact = lambda x: kl(jax.nn.log_softmax(x), reference)
  backward = lambda x: kl(reference, jax.nn.log_softmax(x))
  p = jnp.exp(jax.nn.log_softmax(logits))
  mean = lambda estimate: (
    lambda x: (p * estimate(jax.nn.log_softmax(x) - reference)).sum()
  )
  for name in ('k1', 'k3'):
    found = mean(divergence.ESTIMATES[name])(logits)
    np.testing.assert_allclose(found, exact(logits), rtol=1e-5)
  for name, expected in (('k2', exact), ('k3', backward), ('k1', None)):
    found = jax.grad(mean(divergence.ESTIMATES[name]))(logits)
    wanted = jax.grad(expected)(logits) if expected else np.zeros(3)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
  close = logits + 0.01 * jnp.arange(3)
  near = lambda x: (
    p * divergence.k2(jax.nn.log_softmax(logits) - jax.nn.log_softmax(x))
  ).sum()
  exact_near = kl(jax.nn.log_softmax(logits), jax.nn.log_softmax(close))
  np.testing.assert_allclose(near(close), exact_near, rtol=0.02)


@pytest.mark.parametrize(
  'name, kl', [('espo', 'k1'), ('espo', 'k3'), ('d1', 'k1')]
)
def test_divergence_of_answers_and_of_tokens(name, kl):
  batch, rng = made_batch(), np.random.default_rng(3)
  s = dataclasses.replace(small(name), kl=kl, kl_weight=0.5, clip_low=math.inf)
  s = dataclasses.replace(s, clip_high=math.inf)
  queries = drawn(name, s, batch, np.arange(4))
  new, reference = rng.normal(size=(2, *queries.masked.shape)).astype(
    np.float32
  )
  value, metrics, _ = golden_rl.loss(
    name, s, LogProbs(new, None, reference), queries, batch,
    np.zeros(4, np.float32), pads=False,
  )  # fmt: skip
  weight = np.array(queries.weight)[..., None] * np.array(queries.scored)
  gap = (weight * (new - reference)).sum(axis=0)
  if name == 'espo':  # of the sum over tokens, then per token
    gap = gap.sum(axis=1)
    expected = np.mean(divergence.ESTIMATES[kl](gap)) / SLOTS
  else:
    expected = np.mean(divergence.ESTIMATES[kl](gap[batch.counted]))
  assert metrics['kl'] == pytest.approx(float(expected), rel=1e-5)
  assert value == pytest.approx(0.5 * float(expected), rel=1e-5)


# Clipping


def test_gradient_of_clipped_ratios():
  """Each sign of the advantage, below, on and above both bounds."""
  ratio = np.float32([0.7, 0.8, 1.0, 1.2, 1.3])
  log_ratio, a = map(
    np.float32,
    zip(*itertools.product(np.log(ratio), (1.0, -2.0)), strict=True),
  )
  # Bounds that equal the ratios exactly, in float32.
  s = table.settings('espo', clip_low=0.2, clip_high=0.2)
  exp = np.exp(log_ratio)
  s = dataclasses.replace(
    s, clip_low=float(1 - exp[2]), clip_high=float(exp[6] - 1)
  )

  def of(log_ratio):
    ones = jnp.ones(len(a))
    units = Units(log_ratio, log_ratio, None, 1.0, ones > 0, a, ones)
    return clipped.objective(s, units, clipped.over_answers) * len(a)

  value, found = jax.value_and_grad(of)(log_ratio)
  keeps = np.where(a > 0, exp <= exp[6], exp >= exp[2])
  np.testing.assert_allclose(found, np.where(keeps, -exp * a, 0), rtol=1e-6)
  bounded = np.clip(exp, exp[2], exp[6])
  assert value == pytest.approx(-np.minimum(exp * a, bounded * a).sum())


def test_overflowing_ratio_that_is_clipped_has_gradient_0():
  units = lambda x: Units(
    x, x, None, 1.0, jnp.array([True]), np.float32([1]), 1
  )
  loss = lambda x: clipped.objective(
    table.settings('espo'), units(x), clipped.over_answers
  )
  assert jax.grad(lambda x: loss(x[None]))(200.0) == 0


# JustGRPO


def test_justgrpo_divides_by_answers_with_an_advantage():
  """As its code: the sum over tokens, / slots / (number + 1e-5)."""
  batch, s = made_batch(), small('justgrpo')
  queries = drawn('justgrpo', s, batch, np.arange(4))
  new = look_up(queries).astype(np.float32)
  a = np.float32([1.5, 0, -0.5, 0])
  value, _, derivative = golden_rl.loss(
    'justgrpo', s, LogProbs(new), queries, batch, a, pads=False
  )
  assert value == pytest.approx(-a.sum() / (2 + 1e-5), rel=1e-6)
  of_rows = derivative.sum(axis=(0, 2))
  np.testing.assert_allclose(of_rows, -a / (2 + 1e-5), rtol=1e-6)


# StableDRL


def test_stable_drl_weighs_by_clipped_ratios():
  batch, s = made_batch(), small('stable_drl')
  queries = drawn('stable_drl', s, batch, np.arange(4))
  rng = np.random.default_rng(4)
  new, old = rng.normal(size=(2, *queries.masked.shape)).astype(np.float32)
  a = np.float32([1.0, 2.0, 0.5, 3.0])  # the score is the lower bound
  value, _, _ = golden_rl.loss(
    'stable_drl', s, LogProbs(new, old), queries, batch, a, pads=False
  )
  weight = np.array(queries.weight)[..., None] * np.array(queries.scored)
  bound = lambda x: (weight * x).sum(axis=(0, 2))
  w = np.minimum(np.exp(bound(new) - bound(old)), s.max_ratio)
  expected = -(w / w.sum() * a * bound(new)).sum()
  assert value == pytest.approx(expected, rel=1e-5)


# Batches and errors


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
