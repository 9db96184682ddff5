"""Training steps of block diffusion do not depend on the mesh."""

import dataclasses
import functools

import numpy as np
import pytest
from test_step import (
  BATCH,
  CONFINED,
  MODEL,
  assert_close,
  gradients_on,
  make_rows,
)

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
  gradients = functools.partial(gradients_on, model=model, objective=JOINT)
  one, sums = gradients('one_device', microbatches=4)
  eight, others = gradients('fsdp2_sequence2_tensor2', microbatches=1)
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
  assert_close(eight, one)
