"""Training steps of block diffusion do not depend on the mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from test_step import (
  BATCH,
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

JOINT = dataclasses.replace(
  CONFINED,
  name='block_diffusion',
  complementary_masks=True,
  clean_attention='causal',
  autoregressive_weight=0.3,
  position_power=2.0,
)


@pytest.mark.slow
def test_all_options_together_do_not_depend_on_mesh_or_microbatches():
  """Complementary masks, a joint loss, and outputs that predict the next token.

  Rows have documents, padding and prompts. The mesh shards all axes.
  """
  model = dataclasses.replace(MODEL, predict_next=True)
  key = jax.random.key(KEY)
  params = initial_params(std=1.0)

  def gradients(mesh_name, microbatches):
    c = step.StepConfig(model, JOINT, LENGTH, microbatches, GuardConfig(0.0))
    m = make_mesh(mesh_name)
    tx = optimizer.make_optimizer(OPTIMIZER, 100, transformer.axes(model))
    with jax.set_mesh(m):
      placed = jax.device_put(
        params, train_state.shardings(model, tx, m).params
      )
      rows = jax.device_put(make_rows(), mesh.batch_sharding(m))
      compute = jax.jit(functools.partial(step.batch_gradients, c))
      return jax.tree.map(np.asarray, compute(placed, rows, key))

  one, sums = gradients('one_device', 4)
  eight, others = gradients('fsdp2_sequence2_tensor2', 1)
  for name in ('num_predicted', 'num_tokens', 'ratio_count', 'next_count'):
    np.testing.assert_array_equal(getattr(sums, name), getattr(others, name))
  for name in ('weighted_nll', 'ratio_nll', 'next_nll'):
    found, expected = (getattr(x, name) for x in (others, sums))
    np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=name)
  # Each answer token is masked once in its two copies.
  answers = make_rows()
  count = (answers.answer & (answers.doc >= 0)).sum()
  assert sums.num_tokens == 2 * sums.num_predicted
  assert 0.8 * count < sums.num_predicted <= count  # some rows are cut
  assert BATCH < sums.next_count < sums.num_tokens
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
    assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a)
