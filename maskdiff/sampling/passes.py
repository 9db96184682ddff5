"""Passes through the network for a denoising step: canvas, or windows of it.

With a cache a pass over the canvas keeps keys and values, and later passes are
over windows: the block (`dual`), or from the block to the end (`prefix`).
"""

import jax.numpy as jnp

from maskdiff.model.transformer import bind
from maskdiff.objectives.table import show
from maskdiff.sampling import candidates
from maskdiff.sampling.commit import of_block


def over_canvas(network, c, shape, carry, layout):
  """A pass over the first shape[0] positions of all rows.

  Args:
    network: Network.
    c: SamplerConfig.
    shape: one of request.shapes.
    carry, layout: Carry and Layout.

  Returns:
    logits [B, S, V] float32 of each row's block; [B] int32, the positions of
    the row that it is about; and the cache, or None if there is none.
  """
  length, _ = shape
  slots = of_block(layout.slots, carry.block)
  tokens, valid = (x[:, :length] for x in view(network, c, carry, layout))
  model = bind(network.config, network.params)
  inputs, labels = show(network.objective, tokens, valid, network.bos_id)
  if c.cache == 'none':
    hidden, cache = model(inputs, labels), None
  else:
    hidden, cache = model.prefill(inputs, labels)
  logits = logits_at(c, model, hidden, slots)
  needed = valid.reshape(-1, len(slots), length).sum((0, 2), dtype=jnp.int32)
  return logits, needed, cache


def over_windows(network, c, shape, carry, cache, layout):
  """A pass over windows of shape[1] positions beside a cache.

  Args:
    cache: from `over_canvas`, of the same shape; the others as there.

  Returns:
    logits and positions, as there.
  """
  length, size = shape
  slots = of_block(layout.slots, carry.block)
  tokens, valid = (x[:, :length] for x in view(network, c, carry, layout))
  first = slots[:, :1]
  where = slots if c.cache == 'dual' else first + jnp.arange(size)
  copies = len(tokens) // len(slots)
  where = jnp.tile(where, (copies, 1))
  rows = jnp.arange(len(tokens))[:, None]
  inside = jnp.minimum(where, length - 1)
  # An absent slot (position L) is not there, like what is not visible.
  there = (where < length) & valid[rows, inside]
  kept = valid.at[rows, jnp.where(there, where, length)].set(False, mode='drop')
  model = bind(network.config, network.params)
  hidden = model.extend(tokens[rows, inside], where, there, kept, cache)
  in_window = jnp.arange(slots.shape[1]) if c.cache == 'dual' else slots - first
  logits = logits_at(c, model, hidden, jnp.broadcast_to(in_window, slots.shape))
  needed = there.reshape(copies, len(slots), -1).sum((0, 2), dtype=jnp.int32)
  return logits, needed


def view(network, c, carry, layout):
  """What the network is shown: tokens [R, L] int32, and which of them, bool.

  With guidance R is 2 B, otherwise B: the network also sees the canvas with all
  but the slots masked, as in LLaDA's generate.py; tokens committed so far are
  seen by both.
  """
  canvas, valid = carry.canvas, visible(c, carry, layout)
  if not c.guidance:
    return canvas, valid
  nothing = jnp.where(layout.fill, canvas, network.mask_id)
  return jnp.concatenate([canvas, nothing]), jnp.concatenate([valid, valid])


def visible(c, carry, layout):
  """[B, L] bool: no padding, and no slots of blocks too far ahead."""
  if c.lookahead < 0:
    return layout.valid
  return layout.valid & (layout.order <= carry.block[:, None] + c.lookahead)


def logits_at(c, model, hidden, slots):
  """Logits of the slots of a block, [B, S, V] float32.

  Only those are projected onto the vocabulary.

  Args:
    hidden: [R, L, D]; see `view`.
    slots: [B, S] int32; what is read for those that are absent does not matter.
  """
  copies, (_, length) = len(hidden) // len(slots), hidden.shape[:2]
  rows = jnp.arange(len(hidden))[:, None]
  slots = jnp.minimum(jnp.tile(slots, (copies, 1)), length - 1)
  logits = model.logits(hidden[rows, slots])
  if not c.guidance:
    return logits
  return candidates.guide(*jnp.split(logits, 2), c.guidance)


def choose_shape(c, shapes, carry, layout):
  """Index of the smallest of the shapes that covers all rows in progress."""
  valid = visible(c, carry, layout)
  length = valid.shape[1]
  end = jnp.where(valid, jnp.arange(length) + 1, 0).max(axis=1)
  window = end - of_block(layout.slots, carry.block)[:, 0]
  if c.cache != 'prefix':
    window = jnp.zeros_like(window)
  busy = carry.masked.any((1, 2))
  most = jnp.max(jnp.where(busy, jnp.stack([end, window]), 0), axis=1)
  return jnp.argmax((jnp.array(shapes) >= most).all(axis=1))
