"""The forward pass of a denoising step: over the canvas, or over a window.

Without a cache every step computes the whole canvas. With a cache, a pass over
the canvas stores keys and values, and later steps compute a window only. There
are three kinds of cache:

- A network whose positions see only positions to their left has an exact
  cache. The window is one slot. Its keys and values are appended to the cache.
- A network trained on blocks has an exact cache, too. Its window is a block of
  the training (block_window.py).
- Any other network has an approximate cache (Fast-dLLM, arXiv 2505.22618),
  which is computed again for each block. The window is the current block
  (`dual`), or all positions from the block to the end of the row (`prefix`).
  Passes over a window do not change the cache.

Only slots of the current block are projected onto the vocabulary. state.py
explains the letters in shapes. V is the vocabulary size, W the length of a
window, and R the batch size of the network: B, or 2 B with guidance.
"""

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.model import cache as cache_lib
from maskdiff.model import masks
from maskdiff.model.transformer import bind
from maskdiff.objectives.table import OBJECTIVES, show
from maskdiff.sampling import candidates
from maskdiff.sampling.state import current, in_progress, visible

MAX_SHAPES = 5  # compile at most this many sequence lengths per program


@jax.named_scope('part(sampling: bookkeeping)')
def over_canvas(network, c, shape, carry, layout):
  """Computes the first shape[0] positions of all rows.

  Args:
    network: Network.
    c: SamplerConfig.
    shape: one of `shapes`.
    carry: Carry.
    layout: Layout.

  Returns:
    - logits [B, S, V] float32 of each row's current block;
    - [B] int32, number of positions computed for each row;
    - model.cache.Cache of R rows and shape[0] places; None if c.cache is
      'none'.
  """
  length, _ = shape
  slots = current(layout.slots, carry.block)
  tokens, valid = (x[:, :length] for x in shown(network, c, carry, layout))
  model = bind(network.config, network.params)
  inputs, labels = show(network, tokens, valid)
  if c.cache == 'none':
    hidden, cache = model(inputs, labels), None
  else:
    hidden, cache = model.prefill(inputs, labels)
  logits = logits_at(c, layout.settings, model, hidden, slots)
  return logits, num_positions(layout.settings, valid), cache


@jax.named_scope('part(sampling: bookkeeping)')
def over_window(network, c, shape, carry, cache, layout):
  """Computes a window of shape[1] positions per row, which attends to a cache.

  Args:
    network: Network.
    c: SamplerConfig.
    shape: one of `shapes`.
    carry: Carry. The logits of rows whose `cached` is False are meaningless.
    cache: Cache of shape[0] places.
    layout: Layout.

  Returns:
    - logits and number of positions, as from `over_canvas`;
    - the Cache; to an exact cache, windows of rows with `cached` are appended.
  """
  length, _ = shape
  slots = current(layout.slots, carry.block)
  tokens, valid = (x[:, :length] for x in shown(network, c, carry, layout))
  inputs, labels = show(network, tokens, valid)
  positions, indices = window(network, c, shape, slots)
  copies, rows = len(tokens) // len(slots), jnp.arange(len(tokens))[:, None]
  positions = jnp.tile(positions, (copies, 1))  # [R, W]
  inside = jnp.clip(positions, 0, length - 1)
  # False on padding of the window, and at hidden positions.
  in_window = (positions == inside) & valid[rows, inside]
  places = jnp.where(in_window, positions, length)
  # The cached keys of the window are out of date.
  outdated = (
    jnp.zeros(valid.shape, bool).at[rows, places].set(True, mode='drop')
  )
  usable = cache_lib.hide_places(cache, outdated)
  model = bind(network.config, network.params)
  arguments = (
    inputs[rows, inside],
    cache_lib.hide(masks.take(labels, inside), ~in_window),
    usable,
  )
  if exact_cache(network):
    appends = jnp.tile(carry.cached, copies)[:, None]  # [R, 1]
    places = jnp.where(appends, places, length)
    hidden, appended = model.append(*arguments, places)
    labels = jax.tree.map(
      lambda new, old: jnp.where(appends, new, old),
      appended.labels,
      cache.labels,
    )
    cache = cache_lib.Cache(appended.k, appended.v, labels)
  else:
    hidden = model.extend(*arguments)
  logits = logits_at(c, layout.settings, model, hidden, indices)
  return logits, num_positions(layout.settings, in_window), cache


def window(network, c, shape, slots):
  """Returns the positions of a window, and the index of each slot in it.

  With `predict_next`, a window also has the position before each of its slots,
  because the network predicts the slot there.

  Args:
    network: Network.
    c: SamplerConfig.
    shape: (L, W).
    slots: [B, S] int32, slots of the current block; L where there is no slot.

  Returns:
    - [B, W] int32 ascending positions, which may be outside of [0, L);
    - [B, S] int32, the index of each slot in the window.
  """
  length, size = shape
  before = _predicted_before(network)
  if to_end_of_row(network, c):
    start = slots[:, :1] - before
    return start + jnp.arange(size), slots - start
  if not before:
    return slots, jnp.broadcast_to(jnp.arange(slots.shape[1]), slots.shape)
  left = jnp.where(slots < length, slots - 1, length)
  is_slot = (left[:, :, None] == slots[:, None, :]).any(axis=2)
  left = jnp.where(is_slot, length, left)
  positions = jnp.sort(jnp.concatenate([left, slots], axis=1), axis=1)
  positions = positions[:, :size]
  indices = jnp.argmax(positions[:, None, :] == slots[:, :, None], axis=2)
  return positions, indices.astype(jnp.int32)


def shown(network, c, carry, layout):
  """Returns the tokens of a forward pass, and which of them are visible.

  A guided program has two copies of the canvas, the second with the prompt
  masked (LLaDA's generate.py). Both copies have the committed tokens.

  Returns:
    tokens [R, L] int32; and [R, L] bool, True on visible positions.
  """
  canvas, valid = carry.canvas, visible(network, c, carry, layout)
  if not c.guided:
    return canvas, valid
  no_prompt = jnp.where(layout.fill, canvas, network.mask_id)
  return jnp.concatenate([canvas, no_prompt]), jnp.concatenate([valid, valid])


def num_positions(settings, computed):
  """Returns the number of positions computed for each row, [B] int32.

  The second copy of `shown` is counted only for rows with guidance.

  Args:
    settings: Settings, each field [B].
    computed: [R, W] bool, True at positions to count.
  """
  rows = len(settings.guidance)
  count = computed.reshape(-1, rows, computed.shape[1]).sum(2, dtype=jnp.int32)
  return jnp.where(settings.guidance > 0, count.sum(0), count[0])


def logits_at(c, settings, model, hidden, indices):
  """Returns logits of the slots of a block, [B, S, V] float32.

  Args:
    c: SamplerConfig; if guided, both copies of `shown` are combined.
    settings: Settings, each field [B].
    model: Transformer.
    hidden: [R, L, D] hidden states.
    indices: [B, S] int32, index of each slot along axis L of `hidden`. Where
      the block has no slot, the index is arbitrary and the logits are
      meaningless.
  """
  copies, (_, length) = len(hidden) // len(indices), hidden.shape[:2]
  rows = jnp.arange(len(hidden))[:, None]
  indices = jnp.minimum(jnp.tile(indices, (copies, 1)), length - 1)
  logits = model.logits(hidden[rows, indices])
  if not c.guided:
    return logits
  scale = settings.guidance[:, None, None]
  return candidates.guide(*jnp.split(logits, 2), scale)


def shapes(network, c, length, slots):
  """Returns the lengths that passes are compiled for, at most MAX_SHAPES.

  A pass uses the shortest length that covers the visible positions of all rows.
  The lengths do not depend on the prompts, so that one program serves all
  requests of a length.

  Args:
    network: Network.
    c: SamplerConfig.
    length: L.
    slots: [B, blocks, S] int32, positions of the slots.

  Returns:
    Tuple of (positions of a pass over the canvas, positions of a window), in
    increasing order.
  """
  size = slots.shape[2]
  if network.ahead:
    return tuple((n, 0) for n in halves(length, network.ahead))
  if network.block_length:
    return tuple(
      (n, network.block_length) for n in halves(length, network.block_length)
    )
  before = 0 if c.cache == 'none' else _predicted_before(network)
  # The position before each run of adjacent slots.
  gaps = np.any((np.diff(slots) != 1) & (slots[..., 1:] < length))
  block = size + before * (size if gaps else 1)
  to_end = to_end_of_row(network, c)
  if c.lookahead < 0 and not to_end:
    return ((length, block),)
  if c.lookahead < 0:
    return tuple((length, n + before) for n in halves(length, size))
  ahead = min((1 + c.lookahead) * size, length)
  width = ahead + before if to_end else block
  return tuple((n, width) for n in halves(length, ahead))


def wider(shapes, others):
  """Returns the elementwise maximum of two tuples of shapes."""
  return tuple(
    tuple(map(max, a, b)) for a, b in zip(shapes, others, strict=True)
  )


def halves(largest, smallest):
  """Returns `largest`, a half of it, a quarter, ..., in increasing order.

  The list has at most MAX_SHAPES numbers, rounded up, all at least `smallest`.
  """
  sizes = [largest]
  while len(sizes) < MAX_SHAPES and -(-sizes[-1] // 2) >= smallest:
    sizes.append(-(-sizes[-1] // 2))
  return sizes[::-1]


def choose_shape(network, c, shapes, carry, layout):
  """Returns the index of the shortest shape that covers all rows, int32."""
  covered = [covers(network, c, shape, carry, layout) for shape in shapes]
  return jnp.argmax(jnp.stack(covered))


def covers(network, c, shape, carry, layout):
  """Returns a bool: a shape covers the visible positions of active rows."""
  if network.ahead:
    end = current(layout.slots, carry.block)[:, 0] + network.ahead
    fits = jnp.minimum(end, layout.valid.shape[1]) <= shape[0]
    return (fits | ~in_progress(carry)).all()
  valid = visible(network, c, carry, layout)
  end = jnp.where(valid, jnp.arange(valid.shape[1]) + 1, 0).max(axis=1)
  fits = end <= shape[0]
  if to_end_of_row(network, c):
    start = current(layout.slots, carry.block)[:, 0]
    fits &= end - start + _predicted_before(network) <= shape[1]
  return (fits | ~in_progress(carry)).all()


def empty_cache(network, c, layout):
  """Returns a Cache for all rows and positions whose places are hidden."""
  copies = 2 if c.guided else 1
  valid = jnp.tile(layout.valid, (copies, 1))
  _, labels = show(network, valid.astype(jnp.int32), valid)
  return cache_lib.empty(network.config, labels)


def to_end_of_row(network, c):
  """Returns whether windows reach from the current block to the row's end."""
  return c.cache == 'prefix' and not exact_cache(network)


def exact_cache(network):
  """Returns whether a KV cache of the network is exact."""
  return OBJECTIVES[network.objective].exact_cache


def _predicted_before(network):
  """Returns 1 if a token is predicted at the position before it, else 0."""
  return int(network.config.predict_next)
