"""The stage of policy optimization, in short runs of a tiny model."""

import dataclasses
import functools
import shutil
import types

import compiled
import jax
import jax.numpy as jnp
import made_answers
import numpy as np
import optax
import pytest
import rl_runs
import saved
from rl_runs import INNER, STEPS, completed

from maskdiff.errors import UserError
from maskdiff.model import lora, transformer
from maskdiff.model.trainable import join
from maskdiff.monitoring import history, ledger, metrics
from maskdiff.planner import target_rl
from maskdiff.rl import policy_step, reference, stage, stage_config
from maskdiff.training import loop
from maskdiff.training import step as step_lib


@pytest.fixture(scope='module')
def model(tmp_path_factory, tokenizer):
  return made_answers.save_model(tmp_path_factory.mktemp('model'), tokenizer)


@pytest.fixture(scope='module')
def keys(model, tmp_path_factory):
  program = tmp_path_factory.mktemp('rewards') / 'rewards.py'
  return rl_runs.keys(model, program)


@pytest.fixture(scope='module')
def config(keys):
  return completed(keys)


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
  """Returns a work directory, and the compilations of each batch."""
  workdir, counts = tmp_path_factory.mktemp('rl') / 'run', []

  def counting(config, setup):
    made = stage.make_stage(config, setup)

    def next_batch(position, params):
      before = len(compiled.compilations)
      found = made.next_batch(position, params)
      counts.append(compiled.compilations[before:])
      return found

    return dataclasses.replace(made, next_batch=next_batch)

  loop.run(config, str(workdir), counting)
  return workdir, counts


def train_rows(workdir):
  rows = metrics.read(workdir / 'metrics.jsonl')
  return [
    {k: v for k, v in row.items() if k != 'train/step_s'}
    for row in rows
    if 'train/policy_loss' in row
  ]


@pytest.mark.slow
def test_first_inner_step_has_ratio_1(finished):
  rows = train_rows(finished[0])
  assert len(rows) == STEPS
  ratios = ('train/ratio_min', 'train/ratio_mean', 'train/ratio_max')
  for i, row in enumerate(rows):
    first = i % INNER == 0
    assert ('train/reward' in row) == first
    if first:
      assert [row[name] for name in ratios] == [1, 1, 1]
      assert row['train/clip_fraction'] == row['train/ratio_std'] == 0
    else:
      assert row['train/ratio_std'] > 1e-6
  assert rows[0]['train/kl'] == 0 < rows[1]['train/kl']


@pytest.mark.slow
def test_metrics_of_a_run(finished):
  first, second, *_ = train_rows(finished[0])
  assert first['train/sampling_forwards'] == 16 * 6  # a step per token
  # 4 copies of 16 answers: two fixed networks in 3 inner steps, and the step.
  assert first['train/training_forwards'] == 4 * 16 * (2 * INNER + 1)
  assert second['train/training_forwards'] == 4 * 16
  assert first['train/answer_tokens'] <= 6
  assert first['train/constant_groups'] < 1
  assert first['train/sampled_nats_per_token'] > 0
  spent = ledger.goodput(finished[0] / 'ledger.jsonl')
  assert spent['seconds']['rollout'] > 0
  run = history.read_run(str(finished[0]))
  assert run.panels[0].id == 'reward' and not run.warnings
  (last,) = [row for row in run.rows if row['step'] and 'eval/reward' in row]
  assert last['eval/correct'] == 0 <= last['eval/reward']


@pytest.mark.slow
def test_each_program_is_compiled_once(finished):
  """The train step is compiled ahead of time, so it cannot compile again."""
  _, (first, *later) = finished
  assert {'jit(run)', 'jit(fixed)', 'jit(choose)'} <= set(first)
  assert later == [[]] * (STEPS - 1)


@pytest.mark.slow
def test_resume_within_a_round_is_bitwise_exact(config, finished, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / 'run')
  for step in (workdir / 'checkpoints').iterdir():
    if int(step.name) > 4:
      shutil.rmtree(step)
  _, meta, _ = saved.newest(workdir)
  assert meta['position']['round'] == meta['position']['inner'] == 1
  assert 'position/rollout/log_probs' in meta['leaves']
  loop.run(config, str(workdir), stage.make_stage)
  (step, _, arrays), (last, _, expected) = map(
    saved.newest, (workdir, finished[0])
  )
  assert step == last == STEPS
  for name, x in arrays.items():
    assert x.tobytes() == expected[name].tobytes(), name
  assert train_rows(workdir) == train_rows(finished[0])
  other = config.copy_and_resolve_references()
  other.sample.temperature = 0.5
  with pytest.raises(UserError, match='sample.temperature=1.0, not 0.5'):
    loop.run(other, str(workdir), stage.make_stage)


@pytest.fixture(scope='module')
def one(keys):
  return rl_runs.Opened(completed(keys), 1)


@pytest.mark.slow
def test_constant_rewards_change_nothing(one):
  one.start()
  before = jax.device_get(one.state.params)
  zeros = jnp.zeros_like(one.batch.advantages)
  found = one.step(one.batch._replace(advantages=zeros))
  assert found.grad_norm == 0 and not found.skipped
  jax.tree.map(np.testing.assert_array_equal, before, one.state.params)
  assert one.step(one.batch).grad_norm > 0


@pytest.mark.slow
def test_planned_programs_are_those_of_a_run(one, monkeypatch):
  """They have the arguments of the run, with the same shardings."""
  compiled_with = []
  monkeypatch.setattr(
    target_rl,
    'compile_on',
    lambda function, mesh, *args: compiled_with.append(args),
  )
  r = target_rl.open_round(one.config, types.SimpleNamespace(mesh=one.mesh))
  target_rl.compile_step(r)
  target_rl.compile_fixed(r)
  rollout = dict(one.position['rollout'])
  rollout.pop('log_probs')
  one.start()
  params, key = one.state.params, jax.random.key(0)
  of_run = [
    (one.state, one.batch, key),
    ([params, params], rollout, np.int32(0)),
  ]
  described = lambda tree: jax.tree.map(
    lambda x: (x.shape, x.dtype, getattr(x, 'sharding', None)), tree
  )
  assert described(compiled_with[1][1]) == described(rollout)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert shapes(compiled_with) == shapes(of_run)
  with jax.set_mesh(one.mesh):
    assert described(r.copy) == described(r.programs.copy(params))


@pytest.mark.slow
def test_rollouts_do_not_depend_on_devices_or_rows(keys, one):
  """Nor do the parameters after two inner steps, except for rounding."""
  config = completed(keys, policy_sampling_rows=3)
  many = rl_runs.Opened(config, 8)
  one.start()
  for name in ('tokens', 'steps', 'answer', 'counted'):
    found, expected = (getattr(o.batch.rows, name) for o in (many, one))
    np.testing.assert_array_equal(found, expected)
  np.testing.assert_array_equal(many.batch.advantages, one.batch.advantages)
  rl_runs.require_equal_steps(many, one, atol=2e-5)


@pytest.mark.slow
def test_reward_rises(one):
  """The reward is the share of the letter e in an answer."""
  one.start()
  position, rewards = one.stage.start, []
  for i in range(60):
    batch, position = one.next_batch(position)
    found = one.step(batch)
    row = one.stage.row([found], [{'round': i // INNER}], 1.0)
    rewards += [row['train/reward']] if 'train/reward' in row else []
  assert np.mean(rewards[-5:]) > 1.5 * np.mean(rewards[:5])


@pytest.mark.slow
def test_microbatches_have_the_gradients_of_a_batch(keys, one):
  # As at a later inner step: the stored policy differs from this one.
  batch = one.batch._replace(
    step=jnp.array([0, 1]), fixed=one.batch.fixed * 0.9
  )
  one.start()
  config = completed(keys, train_microbatches=4)
  gradients = functools.partial(
    policy_step.gradients,
    stage_config.policy_config(config),
    step_lib.step_config(config),
  )
  with jax.set_mesh(one.mesh):
    tree, sums = jax.jit(gradients)(one.state, batch, None)
  expected = one.step(batch)
  assert sums.metrics['ratio_std'] > 1e-3
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
  close(optax.tree.norm(tree), expected.grad_norm)
  jax.tree.map(close, sums, expected.sums)


@pytest.mark.slow
def test_reference_of_adapters_is_the_base(keys, one):
  """It needs no copy, and its log-probabilities are those of the start."""
  config = completed(keys, lora_rank=2)
  assert reference.load_reference(config, one.mesh) is None
  c = stage_config.policy_config(config)
  params = transformer.init(c.network.config, jax.random.key(0))
  fixed = jax.jit(
    lambda params: policy_step.fixed_log_probs(
      c, [params, lora.base(params)], one.batch.rows, np.int32(0)
    )
  )
  old, base = np.moveaxis(fixed(params), 1, 0)
  np.testing.assert_array_equal(old, base)
  trained = jax.tree.map(lambda x: x + 0.1, lora.trained(params))
  old, again = np.moveaxis(fixed(join(params, trained)), 1, 0)
  assert abs(old - base).max() > 0.01
  np.testing.assert_array_equal(again, base)


@pytest.mark.slow
def test_rollout_of_another_config_is_left_out(one):
  """As after a change of config.policy.group, with data.allow_change."""
  one.start()
  rollout = {'tokens': jnp.zeros((8, 16), jnp.int32)}
  other = {'round': 4, 'inner': 1, 'rollout': rollout}
  batch, position = one.next_batch(other)
  assert (position['round'], position['inner']) == (5, 1)
  np.testing.assert_array_equal(batch.step, [5, 0])
