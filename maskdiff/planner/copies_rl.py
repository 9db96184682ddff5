"""Numbers of the masked copies of a round that a plan needs."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.objectives.table import show_masked
from maskdiff.rl import policy_step, rollouts, table

# Rounds whose masks are drawn to find the trip count of the loss loop.
ROUNDS = 8


def regime(network, length):
  """Returns the masks.Regime of masked copies.

  Args:
    network: Network.
    length: tokens of a row.
  """
  rows = jax.ShapeDtypeStruct((1, length), jnp.int32)
  _, labels = jax.eval_shape(
    lambda x: show_masked(network, x, x >= 0, x >= 0), rows
  )
  return labels.regime


def loss_chunks(r):
  """Returns the mean iterations of the loss loop on the slowest device.

  The masks are those of the method for answers of full length, in some rounds.
  The mean is over the copies and the microbatches.

  Args:
    r: target_rl.Round.
  """
  c, sizes = r.c, r.target.mesh.shape
  rows = rollouts.to_batch(
    made_rollout(r.config),
    r.config.tokens.eos_id,
    table.find(c.method).num_eos,
  )
  scored = jax.jit(
    lambda rows, step: policy_step.draw(c, rows, step).scored.sum(axis=2)
  )
  counts = [scored(rows, np.int32([number, 0])) for number in range(ROUNDS)]
  counts = np.concatenate(counts)
  shards = sizes['replica'] * sizes['fsdp']
  devices = sizes['sequence'] * sizes['tensor']
  counts = counts.reshape(len(counts), c.microbatches, shards, -1).sum(axis=3)
  tokens = counts.max(axis=2) / devices
  most = rows.tokens.size / c.microbatches / shards
  chunk = min(c.chunk, math.ceil(most / devices))
  return float(np.ceil(tokens / chunk).mean())


def made_rollout(config):
  """Returns a rollout of full answers after the longest prompts, of NumPy.

  Args:
    config: ConfigDict.
  """
  s, length = config.sample, config.data.length
  first = length - s.gen_length
  index = np.arange(length)
  step = 1 + (index - first) * s.steps // s.gen_length
  shape = config.train.batch, length
  row = np.where(index < first, 0, step).astype(np.int32)
  return {
    'tokens': np.full(shape, int(config.tokens.eos_id == 0), np.int32),
    'steps': np.broadcast_to(row, shape),
    'slots': np.tile(np.int32([first, length]), (shape[0], 1)),
  }
