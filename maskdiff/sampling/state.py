"""The denoising loop: its state (Carry) and its constants (Layout).

Every row has its own blocks and its own step, so rows of a batch do not wait
for each other. Letters: B rows, L positions, S slots per block,
V vocabulary size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskdiff.sampling.settings import Settings


class Draft(NamedTuple):
  """Tokens that speculative decoding guesses for the next D - 1 slots."""

  tokens: jax.Array  # [B, D - 1] int32; -1: none
  logits: jax.Array  # [B, D - 1, V] float32, of the distributions drawn from


class Carry(NamedTuple):
  """Loop state: everything that a denoising step changes."""

  block: jax.Array  # [B] int32, the current block; number of complete blocks
  # [B] int32, denoising steps done in the current block, without the step of a
  # leading slot
  step: jax.Array
  total_steps: jax.Array  # [B] int32, denoising steps done in all blocks
  canvas: jax.Array  # [B, L] int32
  masked: jax.Array  # [B, blocks, S] bool, slots without a committed token
  # [B, L] int32 and float32: the denoising step of the row that filled the
  # slot, from 1, and the confidence of its token. See recording.Recording.
  filled_at: jax.Array
  confidence: jax.Array
  calls: jax.Array  # int32, forward passes over the whole batch
  # [B] int32: forward passes in which a row took part (guidance counts two per
  # step), and positions that these passes computed for the row. Padding and
  # hidden positions are not counted, so that neither number depends on the
  # other rows.
  forwards: jax.Array
  positions: jax.Array
  cached: jax.Array  # [B] bool, whether the next step of the row uses the cache
  broken: jax.Array  # [B] bool, abandoned: logits were NaN or infinite
  draft: Draft | None = None  # None unless the program is speculative


class Layout(NamedTuple):
  """Constants of the loop: slots, blocks, seed and settings of each row."""

  slots: jax.Array  # [B, blocks, S] int32, positions; L where there is no slot
  num_slots: jax.Array  # [B, blocks] int32
  fill: jax.Array  # [B, L] bool, True on slots
  valid: jax.Array  # [B, L] bool, False on padding
  block_of: jax.Array  # [B, L] int32, block of each slot; -1 on given tokens
  index_of: jax.Array  # [B, L] int32, index of each slot in its block; or 0
  steps: jax.Array  # [B] int32, denoising steps per block
  seeds: jax.Array  # [B] uint32
  settings: Settings  # each field [B]
  # Noise of every denoising step in place of that of the seeds, or None: Gumbel
  # noise of the tokens [B, steps, blocks, S, V], and uniform numbers of the
  # remasking rule [B, steps, blocks, S]; both float32.
  gumbel: jax.Array | None = None
  uniform: jax.Array | None = None


def current(x, block):
  """Returns the current block of every row.

  Args:
    x: [B, blocks, ...].
    block: [B] int32.

  Returns:
    [B, ...]; the last block for rows whose blocks are all complete.
  """
  rows = jnp.arange(len(x))
  return x[rows, jnp.minimum(block, x.shape[1] - 1)]


def slots_of_step(network, x, block):
  """Returns the slots that a step may fill, of every row.

  They are those of the current block. For a network that predicts windows, or
  has a drafter, a block is one slot, and they are the next D slots.

  Args:
    network: Network.
    x: [B, blocks, S].
    block: [B] int32.

  Returns:
    [B, S], or [B, D].
  """
  size = network.ahead
  if not size:
    return current(x, block)
  ahead = jnp.minimum(block[:, None] + jnp.arange(size), x.shape[1] - 1)
  return x[jnp.arange(len(x))[:, None], ahead, 0]


def put_slots_of_step(network, x, block, values):
  """Returns `x` with other values in the slots of a step.

  Args:
    network: Network.
    x: [B, blocks, S].
    block: [B] int32.
    values: as returned by `slots_of_step`.
  """
  rows = jnp.arange(len(x))
  if not network.ahead:
    return x.at[rows, block].set(values, mode='drop')
  ahead = block[:, None] + jnp.arange(network.ahead)
  return x.at[rows[:, None], ahead, 0].set(values, mode='drop')


def index_in_step(network, layout, block):
  """Returns the index of each position among the slots of a step.

  Args:
    network: Network.
    layout: Layout.
    block: [B] int32.

  Returns:
    [B, L] int32; -1 at positions that are not slots of the step.
  """
  ahead = layout.block_of - block[:, None]
  if not network.ahead:
    return jnp.where(ahead == 0, layout.index_of, -1)
  inside = (layout.block_of >= 0) & (ahead >= 0)
  return jnp.where(inside & (ahead < network.ahead), ahead, -1)


def in_progress(carry):
  """Returns [B] bool, rows with slots that have no committed token."""
  return carry.masked.any((1, 2))


def has_leading_slot(network, layout, block):
  """Returns [B] bool, whether a row's block begins with a leading slot.

  A network trained on blocks with `predict_next` predicts the first token of a
  block at the last position of the block before. This slot is the leading slot.
  It needs no other token of its block, so it is filled alone and first, and the
  network never sees it masked (Fast-dLLM v2, arXiv 2509.26328). The first
  position of a row has no position before it and is an ordinary slot.

  Args:
    network: Network.
    layout: Layout.
    block: [B] int32.
  """
  first = current(layout.slots, block)[:, 0]
  if not (network.block_length and network.config.predict_next):
    return jnp.zeros(first.shape, bool)
  return (first > 0) & (first % network.block_length == 0)


def visible(network, c, carry, layout):
  """Returns [B, L] bool, the positions that a forward pass may compute.

  They are not padding, not in a block beyond `lookahead`, and not after the
  block of the training that is being filled, since the network does not look
  beyond it.
  """
  if network.block_length:
    slot = current(layout.slots, carry.block)[:, :1]
    end = (slot // network.block_length + 1) * network.block_length
    return layout.valid & (jnp.arange(layout.valid.shape[1]) < end)
  if c.lookahead < 0:
    return layout.valid
  last_visible = carry.block + c.lookahead
  return layout.valid & (layout.block_of <= last_visible[:, None])
