"""The forward pass over a window, for networks trained on blocks of tokens.

Such a network has an exact cache. Its window is the block that is being filled,
with its given tokens, and it attends to the cached blocks before it. A block
enters the cache once, when it is complete: the first pass over the next block
computes the complete block, too, and stores its keys and values. A complete
block therefore costs no forward pass of its own.
"""

import functools

import jax
import jax.numpy as jnp

from maskdiff.model import cache as cache_lib
from maskdiff.model import masks
from maskdiff.model.transformer import bind
from maskdiff.objectives.table import show
from maskdiff.sampling import passes
from maskdiff.sampling.state import current, in_progress


@jax.named_scope('part(sampling: bookkeeping)')
def over_blocks(network, c, shape, carry, cache, layout):
  """Computes the current block of each row, and the block before it.

  The block before is computed by rows that begin a block. If there is none, the
  pass is half as long.

  Args:
    network: Network with a block_length.
    c: SamplerConfig.
    shape: one of passes.shapes; its second number is the block_length.
    carry: Carry. The logits of rows whose `cached` is False are meaningless.
    cache: Cache of shape[0] places.
    layout: Layout.

  Returns:
    - logits [B, S, V] float32 of each row's current slots;
    - [B] int32, number of positions computed for each row;
    - the Cache, to which rows that begin a block have added the block before.
  """
  compute = functools.partial(_compute, network, c, shape, carry, layout)
  begins = carry.cached & in_progress(carry) & (carry.step == 0)
  return jax.lax.cond(
    begins.any(),
    functools.partial(compute, shape[1]),
    functools.partial(compute, 0),
    cache,
  )


def _compute(network, c, shape, carry, layout, before, cache):
  """Computes windows that begin `before` positions before the current block."""
  length, size = shape
  slots = current(layout.slots, carry.block)
  tokens, valid = (
    x[:, :length] for x in passes.shown(network, c, carry, layout)
  )
  inputs, labels = show(network, tokens, valid)
  rows = jnp.arange(len(tokens))[:, None]
  start = slots[:, :1] // size * size
  positions = start + jnp.arange(-before, size)  # [B, W]
  inside = jnp.clip(positions, 0, length - 1)
  is_current = positions >= start
  begins = (carry.cached & (carry.step == 0))[:, None]
  in_window = (positions == inside) & valid[rows, inside]
  in_window &= is_current | begins
  places = jnp.where(in_window, positions, length)
  # Cached keys of the window are from before its tokens were committed.
  outdated = (
    jnp.zeros(valid.shape, bool).at[rows, places].set(True, mode='drop')
  )
  model = bind(network.config, network.params)
  arguments = (
    inputs[rows, inside],
    cache_lib.hide(masks.take(labels, inside), ~in_window),
    cache_lib.hide_places(cache, outdated),
  )
  if before:
    stored = jnp.where(is_current | ~begins, length, places)
    hidden, added = model.append(*arguments, stored)
    # Rows that store nothing keep their labels.
    labels = jax.tree.map(
      lambda new, old: jnp.where(begins, new, old), added.labels, cache.labels
    )
    cache = cache_lib.Cache(added.k, added.v, labels)
  else:
    hidden = model.extend(*arguments)
  indices = slots - start + before
  logits = passes.logits_at(c, layout.settings, model, hidden, indices)
  return logits, passes.num_positions(layout.settings, in_window), cache
