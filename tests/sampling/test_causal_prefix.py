"""Block diffusion whose blocks, once complete, attend causally."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled
from test_block_sampling import BLOCK, MASK, MODEL, NETWORK, REQUESTS, values_of

from maskdiff.model import masks, transformer
from maskdiff.sampling import layouts

pytestmark = pytest.mark.usefixtures('two_lengths')

CAUSAL = dataclasses.replace(
  NETWORK,
  # Larger weights than those of NETWORK, so that the tokens vary.
  params=jax.tree.map(
    lambda w: 3 * w if w.ndim > 1 else w,
    transformer.init(MODEL, jax.random.key(2)),
  ),
  clean_attention='causal',
)


@jax.jit
def logits_of(tokens):
  """Returns logits of the last block of a row, after a causal prefix."""
  length = tokens.shape[1]
  index = np.arange(length)
  start = (length - 1) // BLOCK * BLOCK
  current = index >= start
  labels = masks.Labels(
    *(
      jnp.asarray(x, jnp.int32)[None]
      for x in (
        np.zeros(length),
        index,
        np.where(current, start // BLOCK, -1),
        np.where(current, start, index + 1),
      )
    )
  )
  model = transformer.bind(MODEL, CAUSAL.params)
  return model.logits(model(tokens, labels))


@pytest.mark.slow
def test_tokens_are_those_of_a_loop_over_blocks():
  """Greedy, one token per step: the most confident masked token."""
  length = 16
  prompt = [7, 8, 9]
  values = values_of('greedy', steps=16, gen_length=13)
  request = layouts.continue_prompts([prompt], 13)
  row = np.array([prompt + [MASK] * 13])
  for end in range(BLOCK, length + 1, BLOCK):
    while (row[:, :end] == MASK).any():
      logits = np.array(logits_of(jnp.asarray(row[:, :end])), np.float64)[0]
      logits[:, MASK] = -np.inf
      p = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
      confidence = np.where(row[0, :end] == MASK, p.max(axis=1), -1)
      best = confidence.argmax()
      row[0, best] = logits[best].argmax()
  found = np.asarray(sampled.complete(CAUSAL, values, request).canvas)
  np.testing.assert_array_equal(found[:, :length], row)
  assert len(np.unique(found)) > 5


@pytest.mark.slow
@pytest.mark.parametrize(
  'name, option',
  [('prompts', 'threshold'), ('gaps', 'sub-blocks')],
)
def test_cache_changes_no_token(name, option):
  plain, cached = (
    sampled.complete(CAUSAL, values_of(option, **cache), REQUESTS[name])
    for cache in ({}, dict(cache='prefix'))
  )
  for field in ('canvas', 'filled_at', 'forwards'):
    np.testing.assert_array_equal(getattr(cached, field), getattr(plain, field))
  assert np.sum(cached.positions) < np.sum(plain.positions)
