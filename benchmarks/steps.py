"""Train steps of a config on random rows, for benchmarks."""

import functools

import jax
import numpy as np

from maskdiff.data.rows import Rows
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import transformer
from maskdiff.training import step as step_lib
from maskdiff.training import train_state
from maskdiff.training.optimizer import OptimizerConfig, make_optimizer


def setup(config):
  """Returns the StepConfig and the optimizer of a ConfigDict."""
  c = step_lib.step_config(config)
  return c, make_optimizer(
    OptimizerConfig(**config.optimizer),
    config.train.steps,
    transformer.axes(c.model),
  )


def random_rows(config, mesh):
  """Returns Rows of [B, L] random tokens on the mesh."""
  random = np.random.default_rng(0)
  shape = config.train.batch, config.data.length
  tokens = random.integers(9, config.model.vocab_size, shape, np.int32)
  return jax.device_put(Rows(tokens), mesh_lib.batch_sharding(mesh))


def start(c, optimizer, mesh, key):
  """Returns a new TrainState on the mesh, under `jax.set_mesh`."""
  init = functools.partial(train_state.init, c.model, optimizer)
  shardings = train_state.shardings(c.model, optimizer, mesh)
  return jax.jit(init, out_shardings=shardings)(key)


def next_step(compiled, state, rows, key):
  """Returns a function that takes one more step and returns its metrics."""

  def step():
    nonlocal state
    state, metrics = compiled(state, rows, key)
    return metrics

  return step
