"""Bounds against a known entropy: rows drawn from a random Markov chain.

The bound of a perfect denoiser equals the entropy of the rows, in any order of
unmasking. The bound of any other denoiser is above it. So the bound of a
trained model must approach the entropy from above, and a loss that is too small
anywhere shows as a bound below the entropy.

test_exact_bounds.py enumerates a smaller chain for every training loss. Here
rows are longer, and the held-out bound is a mean over drawn masks.
"""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from maskdiff import config as config_lib
from maskdiff.data.rows import Rows
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import transformer
from maskdiff.training import evaluation, step, train_state
from maskdiff.training.optimizer import OptimizerConfig, make_optimizer

STATES, FIRST_ID = 12, 5  # ids below FIRST_ID are special
LENGTH, BATCH, HELDOUT_BATCH = 32, 64, 512
STEPS, HELDOUT_BATCHES = 500, 32


class Chain:
  """A random chain that starts in its stationary distribution."""

  def __init__(self, rng):
    self.transition = rng.dirichlet(np.full(STATES, 0.3), STATES)
    power = np.linalg.matrix_power(self.transition, 1000)
    self.stationary = power[0]

  def entropy_per_token(self):
    """Exact entropy of a row of LENGTH tokens, over LENGTH, in nats."""
    p, pi = self.transition, self.stationary
    plogp = lambda x: np.sum(np.where(x > 0, x * np.log(x), 0), axis=-1)
    rate = -np.sum(pi * plogp(p))
    return (-plogp(pi) + (LENGTH - 1) * rate) / LENGTH

  def sample(self, rng, rows):
    """[rows, LENGTH] int32 token ids."""
    cumulative = np.cumsum(self.transition, axis=1)
    draw = lambda c: (rng.random((rows, 1)) > c[..., :-1]).sum(axis=-1)
    states = [draw(np.cumsum(self.stationary)[None])]
    for _ in range(LENGTH - 1):
      states.append(draw(cumulative[states[-1]]))
    return (np.stack(states, axis=1) + FIRST_ID).astype(np.int32)


def trained_bound():
  """Trains a small model on fresh rows; returns its bound, SE and entropy."""
  chain = Chain(np.random.default_rng(0))
  config = config_lib.default()
  config.update_from_flattened_dict(
    {
      'model.vocab_size': STATES + FIRST_ID,
      'model.embed': 64,
      'model.layers': 2,
      'model.head_dim': 16,
      'model.mlp': 128,
      'model.tie_embeddings': False,
      'model.dtype': 'float32',
      'objective.random_length_fraction': 0.0,
      'objective.loss_chunk_tokens': 1024,
      'optimizer.schedule': 'cosine',
      'optimizer.learning_rate': 4e-3,
      'optimizer.b2': 0.98,
      'optimizer.weight_decay': 0.01,
      'data.length': LENGTH,
      'train.steps': STEPS,
      'train.batch': BATCH,
    }
  )
  c = step.step_config(config)
  optimizer = make_optimizer(
    OptimizerConfig(**config.optimizer), STEPS, transformer.axes(c.model)
  )
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  sharding = mesh_lib.batch_sharding(mesh)
  rng = np.random.default_rng(1)
  batch = lambda rng, rows: jax.device_put(
    Rows(chain.sample(rng, rows)), sharding
  )
  key = jax.random.key(0)
  shardings = train_state.shardings(c.model, optimizer, mesh)
  init = functools.partial(train_state.init, c.model, optimizer)
  train_step = step.compile_train_step(c, optimizer, mesh)
  with jax.set_mesh(mesh):
    state = jax.jit(init, out_shardings=shardings)(key)
    for _ in range(STEPS):
      state, _ = train_step(state, batch(rng, BATCH), key)
    rng = np.random.default_rng(2)
    heldout = [batch(rng, HELDOUT_BATCH) for _ in range(HELDOUT_BATCHES)]
    bound = evaluation.evaluate(c, state.params, heldout, 1.0)
  return (
    bound.loss_nats_per_token,
    bound.stderr_nats_per_token,
    float(chain.entropy_per_token()),
  )


@pytest.mark.slow
def test_bound_approaches_the_entropy_from_above():
  # Its own process optimizes the program: conftest.py disables optimization.
  result = subprocess.run(
    [sys.executable, __file__],
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  bound, stderr, entropy = json.loads(result.stdout.splitlines()[-1])
  assert stderr < 0.004 * entropy  # else the next assertions prove little
  assert bound > entropy - 3 * stderr
  assert bound < 1.03 * entropy


if __name__ == '__main__':
  print(json.dumps(trained_bound()))
