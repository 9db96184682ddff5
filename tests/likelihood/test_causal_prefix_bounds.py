"""Likelihoods of block diffusion whose clean copy is causal."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from test_block_bounds import (
  ANSWERS,
  BLOCK,
  CONFIG,
  MASK,
  NETWORK,
  ROW,
  masked_at,
)

from maskdiff.likelihood import bounds
from maskdiff.model import masks, transformer

CAUSAL = dataclasses.replace(NETWORK, clean_attention='causal')


def log_p(masked):
  """Returns log p of the tokens of ROW given a set of masked positions.

  One pass for each block, over a causal prefix and the block.
  """
  model = transformer.bind(CAUSAL.config, CAUSAL.params)
  found = np.zeros(len(ROW))
  for start in range(0, len(ROW), BLOCK):
    end = min(start + BLOCK, len(ROW))
    row = np.array([ROW[:end]])
    row[0, start:] = np.where(masked[start:end], MASK, row[0, start:])
    index = np.arange(end)
    current = index >= start
    labels = masks.Labels(
      doc=jnp.zeros((1, end), jnp.int32),
      pos=jnp.asarray(index)[None],
      block=jnp.asarray(np.where(current, 0, -1))[None],
      reach=jnp.asarray(np.where(current, start, index + 1))[None],
    )
    logits = np.array(model.logits(model(row, labels)), np.float64)[0]
    logits[:, MASK] = -np.inf
    logits -= np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    found[start:end] = logits[np.arange(start, end), ROW[start:end]]
  return found


def test_chain_rule_sees_causal_text_before_the_block():
  order = [0, 3, 1, 2, 5, 4]
  (found,) = bounds.chain_rule(CAUSAL, CONFIG, ANSWERS, [np.array([order])])
  left, expected = list(order), 0.0
  while left:
    masked = masked_at([2 + i for i in left])
    expected += log_p(masked)[2 + left.pop(0)]
  np.testing.assert_allclose(found, [expected], rtol=1e-5)
  (other,) = bounds.chain_rule(NETWORK, CONFIG, ANSWERS, [np.array([order])])
  assert abs(other[0] - expected) > 1e-3 * abs(expected)
