"""The loss of packed conversations is the sum of their separate losses."""

import dataclasses

import numpy as np
import pytest
from objective_cases import CONFIG, TINY, loss, strong_params

from maskdiff.data import packing
from maskdiff.data.documents import Document
from maskdiff.data.rows import Rows
from maskdiff.objectives import block_diffusion, masked_diffusion

LENGTH, BLOCK = 24, 4
SIZES = (9, 5, 8, 6, 11, 4, 7, 10)
CONFINED = dataclasses.replace(
  CONFIG, attend_within='document', block_length=BLOCK
)


def conversations():
  """Returns documents of three tokens, each with a prompt and an answer."""
  random = np.random.default_rng(0)
  return [
    Document(str(n), random.integers(0, 3, size), np.arange(size) >= size // 3)
    for n, size in enumerate(SIZES)
  ]


def rows_of(given, align):
  layout = packing.Layout('packed', align)
  (rows,) = packing.rows(layout, given, LENGTH, eos_id=1, pad_id=1)
  return rows


def places(rows, given):
  """Yields (index of a document, row, positions) of all documents in Rows."""
  for row, doc in enumerate(rows.doc):
    for n in range(doc.max() + 1):
      (at,) = np.nonzero(doc == n)
      tokens = rows.tokens[row, at].tolist()
      (i,) = [i for i, d in enumerate(given) if d.tokens.tolist() == tokens]
      yield i, row, at


def summed_loss(c, corrupt, params, rows, given):
  """Returns the loss of rows. Noise and times are keyed by the document."""
  random = np.random.default_rng(1)
  uniform = random.random((len(SIZES), LENGTH), np.float32)
  times = random.random((len(SIZES), LENGTH // BLOCK), np.float32)
  if corrupt is masked_diffusion.corrupt:
    times[:] = times[0, 0]  # a row has a single time
  noise = np.ones(rows.tokens.shape, np.float32)
  u = np.full((len(noise), LENGTH // BLOCK), times[0, 0])
  for i, row, at in places(rows, given):
    noise[row, at] = uniform[i, : len(at)]
    blocks = np.arange(-(-len(at) // BLOCK))
    u[row, at[0] // BLOCK + blocks] = times[i, blocks]
  if corrupt is masked_diffusion.corrupt:
    u = u[:, 0]
  canvas = corrupt(c, rows, u, noise, np.full(len(u), LENGTH))
  answers = sum(int(d.answer.sum()) for d in given)
  assert int(canvas.num_tokens.sum()) == answers
  return float(loss(c, TINY, params, canvas)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
  'module, align', [(masked_diffusion, 1), (block_diffusion, BLOCK)]
)
def test_loss_of_a_pack_is_the_sum_of_the_losses_alone(module, align):
  c, corrupt = CONFINED, module.corrupt
  params, given = strong_params(TINY), conversations()
  packed = rows_of(given, align)
  alone = [rows_of([d], align) for d in given]
  alone = Rows(*map(np.concatenate, zip(*alone, strict=True)))
  assert len(packed.tokens) <= len(alone.tokens) // 2
  whole = summed_loss(c, corrupt, params, packed, given)
  apart = summed_loss(c, corrupt, params, alone, given)
  assert whole == pytest.approx(apart, rel=1e-6)
  # With attention to the whole row, the loss is another one.
  mixed = dataclasses.replace(c, attend_within='row')
  other = summed_loss(mixed, corrupt, params, packed, given)
  assert abs(other - whole) > 1e-3 * abs(whole)
