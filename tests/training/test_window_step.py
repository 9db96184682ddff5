"""Training steps of SDLM do not depend on the mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_step import (
  CONFINED,
  KEY,
  LENGTH,
  MODEL,
  OPTIMIZER,
  initial_params,
  make_mesh,
  make_rows,
)

from maskdiff.distributed import mesh
from maskdiff.model import transformer
from maskdiff.training import optimizer, step, train_state
from maskdiff.training.guard import GuardConfig


@pytest.mark.slow
def test_windows_do_not_depend_on_mesh_or_microbatches():
  """Rows have documents, padding and prompts. The mesh shards all axes."""
  objective = dataclasses.replace(CONFINED, name='sdlm', window_length=4)
  params = initial_params(std=1.0)

  def gradients(mesh_name, microbatches):
    c = step.StepConfig(
      MODEL, objective, LENGTH, microbatches, GuardConfig(0.0)
    )
    m = make_mesh(mesh_name)
    tx = optimizer.make_optimizer(OPTIMIZER, 100, transformer.axes(MODEL))
    with jax.set_mesh(m):
      placed = jax.device_put(
        params, train_state.shardings(MODEL, tx, m).params
      )
      rows = jax.device_put(make_rows(), mesh.batch_sharding(m))
      compute = jax.jit(functools.partial(step.batch_gradients, c))
      return jax.tree.map(
        np.asarray, compute(placed, rows, jax.random.key(KEY))
      )

  one, sums = gradients('one_device', 4)
  eight, others = gradients('fsdp2_sequence2_tensor2', 1)
  assert sums.num_tokens == others.num_tokens == sums.num_predicted
  answers = make_rows()
  count = (answers.answer & (answers.doc >= 0)).sum()
  assert 0.1 * count < sums.num_tokens < count
  np.testing.assert_allclose(others.total, sums.total, rtol=2e-5)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a)
