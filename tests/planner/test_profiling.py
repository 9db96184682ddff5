"""Profiles of a train step on a CPU, and their flag in the scripts."""

import dataclasses
import json
import os
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import tiny

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.model import masks
from maskdiff.monitoring.ledger import Ledger
from maskdiff.planner import comparison, profiling
from maskdiff.training.stage import Stage, compile_step

STEPS = 2


class State(NamedTuple):
  step: jax.Array
  params: jax.Array


def train_step(state, batch, key):
  with jax.named_scope('network(mlp down)'):
    y = batch @ state.params
  with jax.named_scope('part(optimizer)'):
    params = state.params - 1e-3 * y.T @ y
  return State(state.step + 1, params), y.sum()


def make_stage(config, setup):
  compiled = lambda *args: compile_step(
    jax.jit(train_step, donate_argnums=0), *args
  )
  return Stage(
    **dict.fromkeys(('identity', 'tokenizer', 'start', 'next_batch', 'row')),
    name='pretraining',
    header='',
    compile=compiled,
    evaluate=lambda step, params, average: step,
  )


def profiled(tmp_path, steps=STEPS, **changes):
  """Returns the profiled stage of a config."""
  keys = tiny.TRAIN_KEYS | {'train.steps': 12, 'train.batch': 8} | changes
  setup = types.SimpleNamespace(
    mesh=mesh_lib.make_mesh(devices=jax.devices()[:1]),
    ledger=Ledger(tmp_path / 'ledger.jsonl', False),
  )
  make = profiling.profiled(make_stage, str(tmp_path), steps)
  return make(tiny.config(keys), setup)


def state(step=0):
  return State(jnp.int32(step), jnp.ones((128, 128)) / 128)


def run(stage, calls, step=0):
  """Runs some train steps of a stage; returns the last TrainState."""
  batch, key, now = jnp.ones((128, 128)), jax.random.key(0), state(step)
  compiled, _ = stage.compile(now, batch, key)
  assert compiled.as_text().startswith('HloModule jit_train_step')
  for _ in range(calls):
    now, _ = compiled(now, batch, key)
  return now


def test_profile_has_a_trace_a_table_and_what_makes_it_again(tmp_path, capsys):
  folder = tmp_path / 'profile'
  (folder / 'plugins' / 'profile' / 'process_0').mkdir(parents=True)
  old = folder / 'plugins' / 'profile' / 'process_0' / 'old.xplane.pb'
  old.write_text('of an earlier run')
  last = run(profiled(tmp_path), 7, step=3)
  assert int(last.step) == 10  # the training continues after the trace
  table = (folder / 'table.txt').read_text()
  assert table.startswith('steps 7 to 8, mean of 1 x cpu\n')
  assert table in capsys.readouterr().err
  result = json.loads((folder / 'parts.json').read_text())
  parts = {r['part']: r['measured_s'] for r in result['rows']}
  assert parts['mlp down forward'] > 0 and parts['optimizer'] > 0
  assert comparison.IDLE in parts
  assert sum(parts.values()) == pytest.approx(result['step_s'])
  assert result['warnings'] == [] and result['period_s'] > 0
  assert result['estimated_s'] is None and result['mfu'] is None
  assert result['facts']['flops'] > 0 and 0 < result['facts']['share_done'] < 1
  (folder / 'table.txt').unlink()
  assert profiling.remake(folder) + '\n' == table
  assert (folder / 'table.txt').read_text() == table


def test_no_table_before_the_last_traced_step(tmp_path):
  stage = profiled(tmp_path)
  run(stage, profiling.WARM_UP)
  assert not (tmp_path / 'profile').exists()


def test_other_processes_only_trace(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, 'process_index', lambda: 3)
  run(profiled(tmp_path), 5)
  folder = tmp_path / 'profile'
  assert list(folder.glob('plugins/profile/process_3/*.xplane.pb'))
  assert [p.name for p in folder.iterdir()] == ['plugins']
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize('done', [8, 12])
def test_a_run_without_enough_steps_is_an_error(tmp_path, done):
  stage = profiled(tmp_path)
  message = (
    rf'--profile=2 needs 5 steps, of which the first 3 are not traced, and the '
    rf'run has {12 - done} left: raise --config.train.steps=12'
  )
  with pytest.raises(UserError, match=message):
    if done == 12:  # the loop evaluates and compiles nothing
      stage.evaluate(done, None, None)
    else:
      stage.compile(state(done), None, None)


def test_evaluation_of_a_run_with_a_profile_is_that_of_the_stage(tmp_path):
  stage = profiled(tmp_path)
  run(stage, 1)
  assert stage.evaluate(12, None, None) == 12


def test_a_trace_without_instructions_does_not_end_the_training(
  tmp_path, monkeypatch, capsys
):
  def no_trace(*_, **__):
    raise UserError('the trace has no instructions')

  monkeypatch.setattr(comparison, 'compare', no_trace)
  assert int(run(profiled(tmp_path), 6).step) == 6
  assert 'warning: no profile in' in capsys.readouterr().err


def test_phase_in_the_trace_is_reported(tmp_path):
  plan = ((0.0, 4), (0.5, 8))
  keys = {
    'objective.name': 'block_diffusion',
    'objective.block_length': 8,
    'objective.block_plan': plan,
    'train.steps': 10,
  }
  config = tiny.config(tiny.TRAIN_KEYS | {'train.batch': 8} | keys)
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  stage = make_stage(config, None)
  (warning,) = profiling.facts_of(config, mesh, stage, 4, 0).warnings
  assert 'a phase of config.objective begins' in warning
  assert not profiling.facts_of(config, mesh, stage, 4, 5).warnings


def test_train_step_of_a_policy_has_no_utilization():
  config = tiny.config(tiny.TRAIN_KEYS)
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  stage = dataclasses.replace(
    make_stage(config, None), name='preference learning'
  )
  facts = profiling.facts_of(config, mesh, stage, STEPS, 0)
  assert (facts.flops, facts.share_done) == (None, None)
  assert facts.regime == masks.BIDIRECTIONAL
  assert (facts.first_step, facts.steps) == (4, STEPS)


@pytest.mark.parametrize(
  'device, expected',
  [
    ('/dev/nvidiactl', '--a=1 --xla_gpu_enable_command_buffer='),
    ('/dev/accel0', '--a=1'),
  ],
)
def test_kernels_of_an_nvidia_gpu_are_launched_one_by_one(
  monkeypatch, device, expected
):
  monkeypatch.setattr(os.path, 'exists', lambda path: path == device)
  environ = {'XLA_FLAGS': '--a=1'}
  profiling.without_command_buffers(environ)
  assert environ == {'XLA_FLAGS': expected}
