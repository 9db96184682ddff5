"""A second stage, with arrays in its position, runs in the same loop.

The stage of this file resembles reinforcement learning: it draws tokens from
the parameters, trains on them for INNER steps, and draws again.
"""

import dataclasses
import json
import os
import shutil
import signal
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import saved
import tiny

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import InUse, Preempted, UserError
from maskdiff.files import lock
from maskdiff.monitoring import curves, history, ledger, metrics, skipped
from maskdiff.monitoring.stage_file import Curve
from maskdiff.training import inputs, loop
from maskdiff.training import step as step_lib
from maskdiff.training.stage import Evaluation, Stage, compile_step

INNER, STEPS = 3, 8
BATCH, LENGTH = 16, 16


class Sums(NamedTuple):
  loss: jax.Array
  divisor: jax.Array


def gradients(c, state, tokens, key):
  """Shrinks the embeddings of the tokens."""
  loss = lambda params: jnp.square(params['embed'][tokens]).sum()
  total, tree = jax.value_and_grad(loss)(state.params)
  return tree, Sums(total / tokens.size, jnp.float32(tokens.size))


@jax.jit
def sample(params, number):
  """Draws the tokens with the largest logits in random directions."""
  key = jax.random.fold_in(jax.random.key(0), number)
  embed = params['embed']
  shape = embed.shape[1], INNER * BATCH * LENGTH
  tokens = jnp.argmax(embed @ jax.random.normal(key, shape), axis=0)
  return tokens.reshape(INNER, BATCH, LENGTH).astype(jnp.int32)


def toy(config, setup, stop_at=None):
  """Returns the stage; it sends SIGTERM to the run in round `stop_at`."""
  rows = mesh_lib.batch_sharding(setup.mesh)
  take = jax.jit(lambda tokens, i: tokens[i], out_shardings=rows)

  def next_batch(position, params):
    if position['inner'] == 0:
      with setup.ledger.span('rollout'):
        if position['round'] == stop_at:
          os.kill(os.getpid(), signal.SIGTERM)
        setup.between()
        tokens = sample(params, position['round'])
      position = position | {'rollout': {'tokens': tokens}}
    batch = take(position['rollout']['tokens'], position['inner'])
    following = position | {'inner': position['inner'] + 1}
    if following['inner'] == INNER:
      following = {'round': position['round'] + 1, 'inner': 0}
    return batch, following, {'round': position['round']}

  def compile(state, batch, key):
    c = step_lib.step_config(config)
    optimizer, mesh = setup.optimizer, setup.mesh
    jitted = step_lib.compile_train_step(c, optimizer, mesh, gradients)
    return compile_step(jitted, state, batch, key)

  def evaluate(step, params, average):
    norm = float(optax.tree.norm(params))
    text = f'norm {norm:.3f}'
    return Evaluation({'eval/norm': norm}, [], text, text)

  def row(metrics, facts, step_s):
    loss = np.mean([m.sums.loss for m in metrics])
    rounds = [f['round'] for f in facts]
    return {'train/policy_loss': float(loss), 'train/round': max(rounds)}

  return Stage(
    name='toy',
    identity={'version': 1},
    header='toy: no data',
    tokenizer=inputs.open_tokenizer(config),
    start={'round': 0, 'inner': 0},
    next_batch=next_batch,
    compile=compile,
    evaluate=evaluate,
    row=row,
    line=lambda row: f'policy loss {row["train/policy_loss"]:.3f}',
    loss_name='loss_policy',
    panels=(Curve('loss', 'Policy loss', 'A note.', 'train/policy_loss'),),
  )


@pytest.fixture(scope='module')
def config(tokenizer):
  return tiny.config(
    {
      **tiny.TRAIN_KEYS,
      'data.tokenizer': tokenizer.path,
      'train.steps': STEPS,
      'train.batch': BATCH,
      'train.log_every_steps': 1,
      'eval.every_steps': 2 * INNER,
      'checkpoint.every_steps': 2,
      'checkpoint.keep': 10,
    }
  )


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('toy') / 'run'
  loop.run(config, str(workdir), toy)
  return workdir


def killed(finished, tmp_path, last):
  """Copies a run as a kill after the checkpoint of step `last` leaves it."""
  workdir = shutil.copytree(finished, tmp_path / 'killed')
  for step in (workdir / 'checkpoints').iterdir():
    if int(step.name) > last:
      shutil.rmtree(step)
  return workdir


def assert_same(workdir, other, name='step'):
  """Compares the last steps, and the rows of metrics that have a name."""
  (step, meta, arrays), (last, expected_meta, expected) = map(
    saved.newest, (workdir, other)
  )
  assert step == last == STEPS
  assert meta['position'] == expected_meta['position']
  for array, value in arrays.items():
    assert value.tobytes() == expected[array].tobytes(), array
  assert rows(workdir, name) == rows(other, name)


def rows(workdir, name='step'):
  """Returns the rows of metrics that have a name, without times."""
  found = [r for r in metrics.read(workdir / 'metrics.jsonl') if name in r]
  return [{k: v for k, v in r.items() if k != 'train/step_s'} for r in found]


@pytest.mark.slow
def test_position_with_arrays_resumes_within_a_round(
  config, finished, tmp_path
):
  """Step 4 is the first of its round, so tokens drawn again would differ."""
  workdir = killed(finished, tmp_path, 4)
  _, meta, _ = saved.newest(workdir)
  assert meta['stage'] == 'toy'
  assert meta['position'] == {'round': 1, 'inner': 1, 'rollout': {}}
  leaf = meta['leaves']['position/rollout/tokens']
  assert leaf['shape'] == [INNER, BATCH, LENGTH]
  loop.run(config, str(workdir), toy)
  assert_same(workdir, finished)


def test_tokens_of_another_time_would_differ(config, finished, tmp_path):
  """Without the saved arrays the comparison above would fail."""
  workdir = killed(finished, tmp_path, 4)

  def forgetful(config, setup):
    stage = toy(config, setup)

    def next_batch(position, params):
      if 'rollout' in position and position['inner'] == 1:
        tokens = sample(params, position['round'])
        position = position | {'rollout': {'tokens': tokens}}
      return stage.next_batch(position, params)

    return dataclasses.replace(stage, next_batch=next_batch)

  loop.run(config, str(workdir), forgetful)
  with pytest.raises(AssertionError):
    assert_same(workdir, finished)


@pytest.mark.slow
def test_damaged_position_falls_back_to_the_step_before(
  config, finished, tmp_path, capfd
):
  workdir = killed(finished, tmp_path, 4)
  for path in (workdir / 'checkpoints' / '4' / 'position').rglob('d/*'):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
  loop.run(config, str(workdir), toy)
  err = capfd.readouterr().err
  assert 'checkpoints/4 is damaged' in err
  assert (workdir / 'checkpoints.aside' / '4').is_dir()
  assert 'resuming at step 2\n' in err
  assert_same(workdir, finished)


@pytest.mark.slow
def test_sigterm_during_a_rollout_saves_the_last_step(
  config, finished, tmp_path
):
  """The evaluation of this step is done after the restart."""
  stopped = lambda config, setup: toy(config, setup, stop_at=2)
  with pytest.raises(Preempted) as preempted:
    loop.run(config, str(tmp_path / 'run'), stopped)
  assert preempted.value.step == 2 * INNER
  step, meta, _ = saved.newest(tmp_path / 'run')
  assert (step, meta['position']) == (2 * INNER, {'round': 2, 'inner': 0})
  assert meta['evaluation_due']
  assert max(r['step'] for r in rows(tmp_path / 'run')) == step
  loop.run(config, str(tmp_path / 'run'), toy)
  assert_same(tmp_path / 'run', finished, 'eval/norm')


def test_run_resumes_only_with_its_stage(config, finished, tmp_path):
  workdir = killed(finished, tmp_path, STEPS)

  def other(config, setup):
    return dataclasses.replace(toy(config, setup), name='other')

  def newer(config, setup):
    return dataclasses.replace(toy(config, setup), identity={'version': 2})

  with pytest.raises(UserError, match='8 is a checkpoint of toy, not of other'):
    loop.run(config, str(workdir), other)
  with pytest.raises(UserError, match='trained on data with version=1, not 2'):
    loop.run(config, str(workdir), newer)


def test_stage_writes_header_rows_and_panels(finished):
  assert (finished / 'header.txt').read_text().endswith('\ntoy: no data\n')
  train = [r for r in rows(finished) if 'train/policy_loss' in r]
  assert [r['train/round'] for r in train] == [0, 0, 0, 1, 1, 1, 2, 2]
  assert {'train/learning_rate', 'train/grad_norm'} <= train[0].keys()
  found = curves.panels([history.read_run(str(finished))])
  assert found[0].title == 'Policy loss'
  (trace,) = found[0].figure.data
  assert list(trace.x) == list(range(1, STEPS + 1))
  assert list(trace.y) == pytest.approx(
    [r['train/policy_loss'] for r in train], rel=1e-5
  )
  assert 'heldout' not in [panel.id for panel in found]
  total = ledger.goodput(finished / 'ledger.jsonl')
  assert total['seconds']['rollout'] > 0


def test_skipped_update_is_described_by_its_facts():
  class Metrics(NamedTuple):
    sums: Sums
    grad_norm: float = 2.0
    skipped: bool = True
    skipped_in_a_row: int = 1

  found = skipped.find(
    [6, 7],
    [Metrics(Sums(0.5, 1), skipped=False), Metrics(Sums(0.25, 1))],
    [{}, {'round': 2, 'prompts': (8, 16)}],
    'loss_policy',
  )
  (update,) = json.loads(json.dumps(found))
  line = {'time': 1.0, 'event': 'skipped', 'seconds': {}} | update
  assert skipped.describe(line) == (
    'step 7: update skipped, loss 0.25 policy, gradient norm 2, round 2, '
    'prompts 8 to 15'
  )


def test_run_whose_lock_another_host_took_stops(config, tmp_path, monkeypatch):
  """Where flock is not shared, a stopped process can lose its lock."""
  monkeypatch.setattr(lock, 'REFRESH_S', 0.01)
  others = '{"host": "host-3", "pid": 12}'

  def taken(config, setup):
    stage = toy(config, setup)

    def next_batch(position, params):
      if position['round'] == 1:
        lock._write(tmp_path / lock.NAME, others.encode())
        time.sleep(0.2)
      return stage.next_batch(position, params)

    return dataclasses.replace(stage, next_batch=next_batch)

  with pytest.raises(InUse, match='process 12 on host-3 writes to it'):
    loop.run(config, str(tmp_path), taken)
  assert (tmp_path / lock.NAME).read_text() == others
  assert max(row['step'] for row in rows(tmp_path)) <= INNER
