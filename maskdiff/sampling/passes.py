"""The forward pass of a denoising step: over the canvas, or over a window.

Without a cache every step computes the whole canvas. With a cache (Fast-dLLM,
arXiv 2505.22618), a pass over the canvas stores keys and values, and later
steps compute a window only. The window is the current block (`dual`), or
everything from the block to the end of the row (`prefix`).

Only slots of the current block are projected onto the vocabulary. state.py
explains the letters in shapes. V is the vocabulary size, W the length of a
window, and R the batch size of the network: B, or 2 B with guidance.
"""

import jax
import jax.numpy as jnp

from maskdiff.model.transformer import bind
from maskdiff.objectives.table import show
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
    - the cache for `over_window`; None if c.cache is 'none'.
  """
  length, _ = shape
  slots = current(layout.slots, carry.block)
  tokens, valid = (x[:, :length] for x in shown(network, c, carry, layout))
  model = bind(network.config, network.params)
  inputs, labels = show(network.objective, tokens, valid, network.bos_id)
  if c.cache == 'none':
    hidden, cache = model(inputs, labels), None
  else:
    hidden, cache = model.prefill(inputs, labels)
  logits = logits_at(c, layout.settings, model, hidden, slots)
  return logits, num_positions(layout.settings, valid), cache


@jax.named_scope('part(sampling: bookkeeping)')
def over_window(network, c, shape, carry, cache, layout):
  """Computes a window of shape[1] positions per row, beside cached keys.

  Args:
    network: Network.
    c: SamplerConfig.
    shape: the argument `shape` of the pass that made the cache.
    carry: Carry.
    cache: keys and values, from `over_canvas`.
    layout: Layout.

  Returns:
    logits and number of positions, as in `over_canvas`.
  """
  length, size = shape
  slots = current(layout.slots, carry.block)
  tokens, valid = (x[:, :length] for x in shown(network, c, carry, layout))
  start = slots[:, :1]
  positions = slots if c.cache == 'dual' else start + jnp.arange(size)
  copies = len(tokens) // len(slots)
  positions = jnp.tile(positions, (copies, 1))  # [R, W]
  rows = jnp.arange(len(tokens))[:, None]
  inside = jnp.minimum(positions, length - 1)
  # False where the block has no slot (position L) or the position is hidden.
  in_window = (positions < length) & valid[rows, inside]
  cache_valid = valid.at[rows, jnp.where(in_window, positions, length)].set(
    False, mode='drop'
  )
  model = bind(network.config, network.params)
  hidden = model.extend(
    tokens[rows, inside], positions, in_window, cache_valid, cache
  )
  columns = jnp.arange(slots.shape[1]) if c.cache == 'dual' else slots - start
  columns = jnp.broadcast_to(columns, slots.shape)
  logits = logits_at(c, layout.settings, model, hidden, columns)
  return logits, num_positions(layout.settings, in_window)


def shown(network, c, carry, layout):
  """Returns the tokens that the network sees.

  A guided program has two copies of the canvas, the second with the prompt
  masked (LLaDA's generate.py). Both copies have the committed tokens.

  Returns:
    tokens [R, L] int32; and [R, L] bool, True on visible positions.
  """
  canvas, valid = carry.canvas, visible(c, carry, layout)
  if not c.guided:
    return canvas, valid
  no_prompt = jnp.where(layout.fill, canvas, network.mask_id)
  return jnp.concatenate([canvas, no_prompt]), jnp.concatenate([valid, valid])


def num_positions(settings, computed):
  """Returns the number of positions computed for each row, [B] int32.

  The second copy of `shown` counts for rows with guidance only.

  Args:
    settings: Settings, each field [B].
    computed: [R, ...] bool.
  """
  rows = len(settings.guidance)
  count = computed.reshape(-1, rows, computed.shape[1]).sum(2, dtype=jnp.int32)
  return jnp.where(settings.guidance > 0, count.sum(0), count[0])


def logits_at(c, settings, model, hidden, columns):
  """Returns logits of the slots of a block, [B, S, V] float32.

  Args:
    c: SamplerConfig; if guided, both copies of `shown` are combined.
    settings: Settings, each field [B].
    model: Transformer.
    hidden: [R, L, D] hidden states.
    columns: [B, S] int32, index of each slot along axis L of `hidden`. Where
      the block has no slot, the index is arbitrary and the logits are
      meaningless.
  """
  copies, (_, length) = len(hidden) // len(columns), hidden.shape[:2]
  rows = jnp.arange(len(hidden))[:, None]
  columns = jnp.minimum(jnp.tile(columns, (copies, 1)), length - 1)
  logits = model.logits(hidden[rows, columns])
  if not c.guided:
    return logits
  return candidates.guide(*jnp.split(logits, 2), settings.guidance)


def shapes(c, length, size):
  """Returns the lengths that passes are compiled for, at most MAX_SHAPES.

  A pass uses the shortest length that covers the visible positions of all rows.
  The lengths do not depend on the prompts, so that one program serves all
  requests of a length.

  Args:
    c: SamplerConfig.
    length: L.
    size: S, slots per block.

  Returns:
    Tuple of (positions of a pass over the canvas, positions of a window), in
    increasing order.
  """
  if c.lookahead < 0 and c.cache != 'prefix':
    return ((length, size),)
  if c.lookahead < 0:
    return tuple((length, window) for window in halves(length, size))
  ahead = min((1 + c.lookahead) * size, length)
  window = ahead if c.cache == 'prefix' else size
  return tuple((n, window) for n in halves(length, ahead))


def halves(largest, smallest):
  """Returns `largest`, a half of it, a quarter, ..., in increasing order.

  The list has at most MAX_SHAPES numbers, rounded up, all at least `smallest`.
  """
  sizes = [largest]
  while len(sizes) < MAX_SHAPES and -(-sizes[-1] // 2) >= smallest:
    sizes.append(-(-sizes[-1] // 2))
  return sizes[::-1]


def choose_shape(c, shapes, carry, layout):
  """Returns the index of the first shape that covers all rows in progress."""
  valid = visible(c, carry, layout)
  length = valid.shape[1]
  end = jnp.where(valid, jnp.arange(length) + 1, 0).max(axis=1)
  window = end - current(layout.slots, carry.block)[:, 0]
  if c.cache != 'prefix':
    window = jnp.zeros_like(window)
  active = in_progress(carry)
  longest = jnp.max(jnp.where(active, jnp.stack([end, window]), 0), axis=1)
  return jnp.argmax((jnp.array(shapes) >= longest).all(axis=1))
