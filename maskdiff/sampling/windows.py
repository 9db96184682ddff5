"""Forward passes of networks that predict windows of D tokens (SDLM).

A window begins at a slot of the row. Its inputs are the token before the slot,
the anchor, and D - 1 mask tokens, and it attends to the clean tokens before the
anchor (objectives/sdlm.py). The cache has the keys and values of clean tokens
only, which never change, so it is exact. Each pass also computes the clean
tokens that the step before has committed.

Speculative decoding has D windows, one after every token of the draft: window k
begins k slots after the first one and has the first k tokens of the draft
before it. The published tree (sdlm_generator.py of OpenGVLab/SDLM) repeats
these tokens for each window. Here all windows see one clean copy of the draft,
which costs D positions instead of D (D - 1) / 2, and enters the cache with the
same pass.

A rule that commits any subset of a window leaves open slots before committed
ones. The next window begins at the first open slot, and has the committed
tokens in place of masks. They enter the cache when a window begins after them.
The network was not trained on such windows.

Letters: W windows, D tokens of a window, E embedding dimension; others as in
state.py. f is the first slot of a row without a committed token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from maskdiff.model import cache as cache_lib
from maskdiff.model import masks
from maskdiff.model.transformer import bind
from maskdiff.objectives import sdlm
from maskdiff.objectives.table import show
from maskdiff.sampling.state import Draft, current, slots_of_step


@jax.named_scope('part(sampling: bookkeeping)')
def over_canvas(network, c, shape, carry, layout):
  """Computes the windows of all rows after their whole prefix.

  Arguments as for passes.over_canvas.

  Returns:
    - hidden states of the windows, [B, W, D, E];
    - [B] int32, number of positions computed for each row;
    - model.cache.Cache of shape[0] places; None if c.cache is 'none'.
  """
  length, first = shape[0], first_slot(carry, layout)
  inputs, has_input, starts = _inputs(network, c, carry, layout, first)
  # Positions that a window sees, and the draft, whose keys are stored.
  end = first + network.window_length * _is_speculative(c)
  shown = has_input[:, :length] & (jnp.arange(length) < end)
  clean = masks.causal(shown)
  window = _window(network, c, carry, layout, inputs, starts)
  tokens, labels = _join(inputs[:, :length], clean, *window)
  model = bind(network.config, network.params)
  if c.cache == 'none':
    hidden, cache = model(tokens, labels), None
  else:
    hidden, cache = model.prefill(tokens, labels)
    # The keys of the windows are not stored.
    cache = cache_lib.first_places(cache, length)
    cache = cache_lib.Cache(cache.k, cache.v, clean)
  return _results(network, hidden, starts, shown, cache)


@jax.named_scope('part(sampling: bookkeeping)')
def over_cache(network, c, shape, carry, cache, layout):
  """Computes the windows, which attend to a cache, and new clean tokens.

  Arguments as for passes.over_window.

  Returns:
    As `over_canvas`; the Cache has the clean tokens of rows with `cached`.
  """
  length, first, size = shape[0], first_slot(carry, layout), network.ahead
  inputs, has_input, starts = _inputs(network, c, carry, layout, first)
  # D clean positions: the draft, or those that the last step has committed.
  pos = first - size * (not _is_speculative(c)) + jnp.arange(size)
  clean = new_clean(carry, cache, has_input, pos, first)
  tokens = jnp.take_along_axis(inputs, clean.inside, axis=1)
  window = _window(network, c, carry, layout, inputs, starts)
  tokens, labels = _join(tokens, clean.labels, *window)
  no_window = jnp.full((len(pos), tokens.shape[1] - size), length, pos.dtype)
  model = bind(network.config, network.params)
  hidden, added = model.append(
    tokens,
    labels,
    clean.usable,
    jnp.concatenate([clean.places, no_window], axis=1),
  )
  computed = clean.labels.doc >= 0
  cache = of_cached_rows(carry, added, cache)
  return _results(network, hidden, starts, computed, cache)


class Clean(NamedTuple):
  """Clean positions of a pass over a cache, P per row."""

  inside: jax.Array  # [B, P] int32, the positions, moved into the row
  labels: masks.Labels  # doc is -1 at positions that are not computed
  usable: cache_lib.Cache  # the cache without out-of-date places
  places: jax.Array  # [B, P] int32, where their keys are stored; L: nowhere


def new_clean(carry, cache, has_input, pos, first):
  """Returns the Clean of positions that are not in the cache yet.

  Args:
    carry: Carry.
    cache: Cache of L places.
    has_input: [B, M] bool, False on padding.
    pos: [B, P] int32, which may be outside of the row.
    first: [B, 1] int32, the first slot without a committed token. Places from
      there on may have keys of a rejected draft.
  """
  length = cache.places
  rows = jnp.arange(len(pos))[:, None]
  inside = jnp.clip(pos, 0, length - 1)
  stored = (cache.labels.doc >= 0) & (jnp.arange(length) < first)
  computed = (pos == inside) & has_input[rows, inside] & ~stored[rows, inside]
  labels = masks.Labels(
    doc=jnp.where(computed, 0, -1),
    pos=pos,
    block=jnp.full_like(pos, -1),
    reach=pos + 1,
  )
  stores = carry.cached[:, None] & computed
  return Clean(
    inside,
    labels,
    cache_lib.hide_places(cache, ~stored),
    jnp.where(stores, inside, length),
  )


def of_cached_rows(carry, added, cache):
  """Returns a Cache whose labels are new only in rows with `cached`.

  Args:
    carry: Carry.
    added: Cache that includes a pass; its keys are stored in these rows only.
    cache: Cache before the pass.
  """
  labels = jax.tree.map(
    lambda new, old: jnp.where(carry.cached[:, None], new, old),
    added.labels,
    cache.labels,
  )
  return cache_lib.Cache(added.k, added.v, labels)


def logits(network, states):
  """Returns the logits of the first window, [B, D, V], from `over_canvas`."""
  return bind(network.config, network.params).logits(states[:, 0])


def proposals(network, states):
  """Returns `logits` and `propose` of speculation.verify.

  The first token of a window is the next token, and the others are a draft:
  window k is after k tokens of the last draft.

  Args:
    network: Network.
    states: [B, D, D, E], from `over_canvas`.
  """
  model, rows = bind(network.config, network.params), jnp.arange(len(states))
  return (
    model.logits(states[:, :, 0]),
    lambda accepted, token: model.logits(states[rows, accepted, 1:]),
  )


def in_first_run(network, layout, block):
  """Returns [B, D] bool, the slots of a step before the next given token."""
  slots = slots_of_step(network, layout.slots, block)
  return slots == slots[:, :1] + jnp.arange(network.ahead)


def num_complete(network, layout, block, is_open):
  """Returns [B] int32, the slots of a step before its first open slot.

  Args:
    network: Network.
    layout: Layout.
    block: [B] int32.
    is_open: [B, D] bool, slots of the step without a committed token.
  """
  slots = slots_of_step(network, layout.slots, block)
  is_slot = slots < layout.valid.shape[1]
  return jnp.cumprod(is_slot & ~is_open, axis=1).sum(axis=1)


def continues(carry, after, layout):
  """Returns [B] bool, whether the next slot follows those just committed.

  Given tokens between them are not in the cache yet.

  Args:
    carry: Carry before a step.
    after: Carry after it.
    layout: Layout.
  """
  advance = after.block - carry.block
  first = lambda carry: first_slot(carry, layout)[:, 0]
  return first(after) == first(carry) + advance


def keep_draft(carry, after, layout, draft, active):
  """Returns the Draft for the next step.

  Args:
    carry: Carry before a step.
    after: Carry after it.
    layout: Layout.
    draft: Draft of the slots after those that the step could commit. It is of
      no use if given tokens follow.
    active: [B] bool, rows that took a step; others keep their draft.
  """
  follows = continues(carry, after, layout)[:, None]
  tokens = jnp.where(follows, draft.tokens, -1)
  rows = active[:, None]
  return Draft(
    jnp.where(rows, tokens, carry.draft.tokens),
    jnp.where(rows[..., None], draft.logits, carry.draft.logits),
  )


def first_slot(carry, layout):
  """Returns [B, 1] int32, the first slot without a committed token."""
  return current(layout.slots, carry.block)[:, :1]


def _is_speculative(c):
  return c.remasking == 'speculative'


def _inputs(network, c, carry, layout, first):
  """Returns what `shown` does, and [B, W] int32, the starts of the windows."""
  number = network.window_length if _is_speculative(c) else 1
  starts = first + jnp.arange(number, dtype=first.dtype)
  return *shown(network, carry, layout, first), starts


def shown(network, carry, layout, first):
  """Returns the rows with their drafts, if there are any, shifted right.

  Returns:
    [B, L + D] int32; and [B, L + D] bool, False on padding.
  """
  size, canvas = network.ahead, carry.canvas
  canvas = jnp.pad(canvas, ((0, 0), (0, size)), constant_values=network.mask_id)
  if carry.draft is not None:
    draft = carry.draft.tokens
    draft = jnp.where(draft < 0, network.mask_id, draft)
    at = first + jnp.arange(size - 1)
    rows = jnp.arange(len(canvas))[:, None]
    canvas = canvas.at[rows, at].set(draft, mode='drop')
  valid = jnp.pad(layout.valid, ((0, 0), (0, size)))
  inputs, labels = show(network, canvas, valid)
  return inputs, labels.doc >= 0


def _window(network, c, carry, layout, inputs, starts):
  """Returns tokens and Labels of the windows, [B, W D]."""
  tokens, labels = sdlm.windows(network, inputs, jnp.zeros_like(inputs), starts)
  if not _is_speculative(c):
    # Inputs are shifted right by one: the anchor comes before the first slot.
    slots = slots_of_step(network, layout.slots, carry.block)[:, :-1]
    is_open = slots_of_step(network, carry.masked, carry.block)[:, :-1]
    length = carry.canvas.shape[1]
    rows = jnp.arange(len(slots))[:, None]
    committed = carry.canvas[rows, jnp.minimum(slots, length - 1)]
    committed = jnp.where(
      is_open | (slots == length), network.mask_id, committed
    )
    tokens = tokens.at[:, 1:].set(committed)
  return tokens, labels


def _join(tokens, clean, window_tokens, labels):
  """Returns tokens and Labels of [clean positions ; windows]."""
  return (
    jnp.concatenate([tokens, window_tokens], axis=1),
    masks.concatenate(clean, labels),
  )


def _results(network, hidden, starts, computed, cache):
  """Returns what `over_canvas` does."""
  batch, number = starts.shape
  size = number * network.window_length
  states = hidden[:, -size:].reshape(
    batch, number, network.window_length, hidden.shape[2]
  )
  return states, computed.sum(axis=1, dtype=jnp.int32) + size, cache
