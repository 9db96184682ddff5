"""Training steps of SDLM: any mesh, and losses by position in a window."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import (
  CONFINED,
  MODEL,
  OBJECTIVE,
  assert_close,
  gradients_on,
  make_rows,
)

from maskdiff.data.rows import Rows
from maskdiff.objectives import sdlm, table
from maskdiff.training import evaluation, step


@pytest.mark.slow
def test_windows_do_not_depend_on_mesh_or_microbatches():
  """Rows have documents, padding and prompts. The mesh shards all axes."""
  objective = dataclasses.replace(CONFINED, name='sdlm', window_length=4)
  gradients = functools.partial(gradients_on, model=MODEL, objective=objective)
  one, sums = gradients('one_device', microbatches=4)
  eight, others = gradients('fsdp2_sequence2_tensor2', microbatches=1)
  assert sums.num_tokens == others.num_tokens == sums.num_predicted
  answers = make_rows()
  count = (answers.answer & (answers.doc >= 0)).sum()
  assert 0.1 * count < sums.num_tokens < count
  np.testing.assert_allclose(others.total, sums.total, rtol=2e-5)
  np.testing.assert_array_equal(others.window_count, sums.window_count)
  np.testing.assert_allclose(others.window_nll, sums.window_nll, rtol=1e-4)
  assert_close(eight, one)


def test_losses_by_position_in_a_window():
  """Windows of 12 tokens; a window of row 1 has 10 targets."""
  size = 12
  objective = dataclasses.replace(OBJECTIVE, name='sdlm', window_length=size)
  tokens = Rows(jnp.full((2, 2 * size), 9))
  clean = sdlm.clean_copy(objective, tokens)
  answer = clean.answer.at[1, 10].set(False)
  canvas = sdlm.at_stride(objective, clean._replace(answer=answer))
  position = jnp.arange(2 * size) % size + 1.0
  nll = jnp.where(canvas.weights != 0, position, 0)
  sums = jax.device_get(step.summarize(objective, canvas, 0.0, nll))
  np.testing.assert_array_equal(sums.window_count, [4] * 10 + [3] * 2)
  found = evaluation.nll_of_parts(sums)
  name = 'nll_at_window_position_'
  logged = {key: x for key, x in found.items() if key.startswith(name)}
  assert logged == {f'{name}{n}': n for n in (*range(1, 9), 12)}
  # Without windows the metrics have no such part.
  one = dataclasses.replace(objective, window_length=1)
  canvas = table.make_canvas(one, tokens, jnp.arange(2), jax.random.key(0), 2)
  assert step.summarize(one, canvas, 0.0, nll).window_nll is None
