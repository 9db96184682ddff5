"""Short runs of policy optimization: their configs, a reward, their stage."""

import functools

import jax
import numpy as np
import pytest
import tiny

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.interop import load
from maskdiff.monitoring import ledger
from maskdiff.rl import stage, stage_config
from maskdiff.training import run_setup, train_state

REWARD = """
def share(question, text):
  return {'total': text.count('e') / max(1, len(text)), 'correct': 0.0}

def not_finite(question, text):
  return 0.0 if text in ('', question['answer']) else float('nan')
"""
INNER, STEPS = 3, 6


def keys(model, program):
  """Returns the keys of a run of three rounds on one reward.

  Args:
    model: pathlib.Path of the model to start from.
    program: pathlib.Path, to which REWARD is written.
  """
  program.write_text(REWARD)
  return {
    **tiny.TRAIN_KEYS,
    'init_from': str(model),
    'policy.task': 'addition',
    'policy.reward': f'{program}:share',
    'policy.prompts': 4,
    'policy.group': 4,
    'policy.inner_steps': INNER,
    'policy.sampling_dtype': 'float32',
    'policy.reward_workers': 1,
    # The rate does not depend on the steps of a run, so runs share programs.
    'optimizer.schedule': 'piecewise',
    'optimizer.pieces': ((STEPS, 1e-2, 1e-2),),
    'optimizer.weight_decay': 0.0,
    'optimizer.warmup_steps': 0,
    'optimizer.decay_steps': 0,
    'train.steps': STEPS,
    'train.log_every_steps': 1,
    'eval.answers': 4,
    'eval.every_steps': 100,
    'checkpoint.every_steps': 4,
    'checkpoint.keep': 10,
    'data.length': 16,
    'sample.gen_length': 6,
    'sample.block_length': 6,
    'sample.steps': 6,
    'sample.temperature': 1.0,
  }


def completed(keys, **changes):
  """Returns a config; `changes` have _ for the dot of the section."""
  changes = {key.replace('_', '.', 1): value for key, value in changes.items()}
  return stage_config.complete(tiny.config(keys | changes))


class Opened:
  """A stage on some devices, with the state of a new run."""

  def __init__(self, config, devices, make_stage=stage.make_stage):
    self.mesh = mesh_lib.make_mesh(devices=jax.devices()[:devices])
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(mesh_lib, 'make_mesh', lambda **sizes: self.mesh)
      book = ledger.Ledger('', False)
      self.setup = run_setup.open_setup(config, book, lambda: None)
    self.config = config
    self.stage = make_stage(config, self.setup)
    self.start()
    self.batch, self.position = self.next_batch(self.stage.start)

  @functools.cached_property
  def _step(self):
    with jax.set_mesh(self.mesh):
      return self.stage.compile(self.state, self.batch, jax.random.key(0))[0]

  def start(self):
    """Sets the state to that of a new run."""
    make_state = functools.partial(
      train_state.from_params, self.setup.model, self.setup.optimizer
    )
    with jax.set_mesh(self.mesh):
      self.state = jax.jit(make_state, out_shardings=self.setup.shardings)(
        load.warm_start(self.config, self.mesh)
      )

  def next_batch(self, position):
    with jax.set_mesh(self.mesh):
      return self.stage.next_batch(position, self.state.params)[:2]

  def step(self, batch):
    """Makes a train step; returns its StepMetrics."""
    train_step = self._step
    with jax.set_mesh(self.mesh):
      self.state, found = train_step(self.state, batch, jax.random.key(0))
    return jax.device_get(found)


def require_equal_steps(many, one, atol):
  """Makes two steps of two opened stages, whose parameters must be close."""
  np.testing.assert_allclose(many.batch.fixed, one.batch.fixed, atol=1e-5)
  for opened in (one, many):
    opened.step(opened.batch)
    opened.step(opened.next_batch(opened.position)[0])
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=atol)
  jax.tree.map(close, *jax.device_get((many.state.params, one.state.params)))
