"""Training steps of SDLM do not depend on the mesh."""

import dataclasses
import functools

import numpy as np
import pytest
from test_step import (
  CONFINED,
  MODEL,
  assert_close,
  gradients_on,
  make_rows,
)


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
  assert_close(eight, one)
