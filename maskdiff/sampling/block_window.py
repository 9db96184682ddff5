"""The forward pass over a window, for networks trained on blocks of tokens.

Such a network has an exact cache. Its window is the block that is being filled,
with its given tokens, and it attends to the cached blocks before it. A block
enters the cache once, when it is complete: the first pass over the next block
computes the complete block, too, and stores its keys and values. A complete
block therefore costs no forward pass of its own.

With `predict_next` the first pass of a block fills its leading slot, which is
predicted at the last position of the block before. This pass computes the
complete block and the leading slot.
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
  pass is half as long. With `predict_next`, a row that begins a block computes
  the block before and the leading slot, and all passes are one position longer
  than a block.

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
  size = shape[1]
  begins = _begins(network, carry, layout)
  slots = current(layout.slots, carry.block)
  start = slots[:, :1] // size * size
  compute = functools.partial(
    _compute, network, c, shape[0], carry, layout, start, begins
  )
  if network.config.predict_next:
    first = jnp.where(begins, start - size, start)
    return compute(first, size + 1, True, cache)
  return jax.lax.cond(
    begins.any(),
    functools.partial(compute, start - size, 2 * size, True),
    functools.partial(compute, start, size, False),
    cache,
  )


def _begins(network, carry, layout):
  """Returns [B, 1] bool, rows whose pass adds the block before to the cache.

  It is their first pass over a block of the training, of which the sampler may
  fill parts one after the other.
  """
  size = network.block_length
  slots, earlier = (
    current(layout.slots, block)[:, 0] // size
    for block in (carry.block, carry.block - 1)
  )
  begins = carry.cached & in_progress(carry) & (slots > earlier)
  begins &= carry.step == 0
  if network.config.predict_next:
    # The step of a leading slot does not count. A block that begins with
    # another slot, after a gap, has no window for its first pass.
    begins &= current(carry.masked, carry.block)[:, 0]
  return begins[:, None]


def _compute(
  network, c, length, carry, layout, start, begins, first, width, stores, cache
):
  """Computes a window of each row.

  Args:
    network: Network.
    c: SamplerConfig.
    length: places of the cache.
    carry: Carry.
    layout: Layout.
    start: [B, 1] int32, the start of the current block.
    begins: [B, 1] bool, rows that compute and store the block before.
    first: [B, 1] int32, the first position of the window.
    width: positions of the window.
    stores: whether a row may store positions.
    cache: Cache.

  Returns:
    As `over_blocks`.
  """
  tokens, valid = (
    x[:, :length] for x in passes.shown(network, c, carry, layout)
  )
  inputs, labels = show(network, tokens, valid)
  rows = jnp.arange(len(tokens))[:, None]
  positions = first + jnp.arange(width)  # [B, W]
  inside = jnp.clip(positions, 0, length - 1)
  is_current = positions >= start
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
  if stores:
    stored = jnp.where(is_current | ~begins, length, places)
    hidden, added = model.append(*arguments, stored)
    # Rows that store nothing keep their labels.
    labels = jax.tree.map(
      lambda new, old: jnp.where(begins, new, old), added.labels, cache.labels
    )
    cache = cache_lib.Cache(added.k, added.v, labels)
  else:
    hidden = model.extend(*arguments)
  indices = current(layout.slots, carry.block) - first
  logits = passes.logits_at(c, layout.settings, model, hidden, indices)
  return logits, passes.num_positions(layout.settings, in_window), cache
