"""Small batches and drawn copies, for tests of all methods."""

import dataclasses

import golden_rl
import jax
import numpy as np

from maskdiff.rl import policy_loss, table

KEY = jax.random.key(5)
PROMPT, SLOTS = 2, 4
TABLE = np.random.default_rng(1).uniform(-3, 0, (2**SLOTS, SLOTS))


def made_batch(rows=4, ends=SLOTS):
  """Returns a Batch of prompts of 2 tokens and answers of 4 slots.

  The first `ends` slots of an answer, a number or [rows, 1], carry a loss.
  """
  rng = np.random.default_rng(2)
  steps = rng.permuted(np.tile(np.arange(SLOTS), (rows, 1)), axis=1)
  counted = np.arange(SLOTS) < np.broadcast_to(ends, (rows, 1))
  tokens = rng.integers(5, 90, (rows, PROMPT + SLOTS))
  return golden_rl.batch_of(tokens, PROMPT, counted, steps=steps)


def small(name):
  """Returns published settings with few copies."""
  s = table.METHODS[name].settings
  s = dataclasses.replace(s, times=min(s.times, 4), block_length=2)
  return dataclasses.replace(s, copies=SLOTS)


def _draw(name, s, batch, numbers):
  network = dataclasses.replace(golden_rl.network('model_a'), params=None)
  return policy_loss.draw(name, network, s, batch, KEY, numbers)


# The RowQueries of a method, for a network of masked diffusion.
drawn = golden_rl.compiled(_draw, 0, 1)


def look_up(queries):
  """Returns log-probabilities of the tokens of a table, [n, B, L]."""
  at = lambda x: np.array(x)[..., PROMPT : PROMPT + SLOTS]
  masked = at(queries.masked)
  index = (masked * 2 ** np.arange(SLOTS)).sum(axis=2)
  return golden_rl.pad(np.pad(TABLE[index], ((0, 0), (0, 0), (PROMPT, 0))))
