"""Forward passes of autoregressive networks that have a drafter.

A pass computes D positions of a row: the newest token and the draft of D - 1
tokens after it. Their hidden states verify the draft (speculation.py), and the
drafter makes the next one from the state before the new token
(model/drafter.py). The keys of the draft enter the cache with the same pass.
The result is that of the network alone, for any drafter.

state.py and windows.py explain the letters in shapes.
"""

import jax
import jax.numpy as jnp

from maskdiff.model import drafter, masks
from maskdiff.model.transformer import bind
from maskdiff.sampling import windows


@jax.named_scope('part(sampling: bookkeeping)')
def over_canvas(network, c, shape, carry, layout):
  """Computes the first shape[0] positions of all rows, up to their drafts.

  Arguments as for passes.over_canvas.

  Returns:
    - drafter.Pass of D positions per row;
    - [B] int32, number of positions computed for each row;
    - model.cache.Cache of shape[0] places; None if c.cache is 'none'.
  """
  length, first = shape[0], windows.first_slot(carry, layout)
  inputs, has_input = windows.shown(network, carry, layout, first)
  end = first + network.draft_length
  shown = has_input[:, :length] & (jnp.arange(length) < end)
  model = bind(network.config, network.params)
  found = drafter.prefill(model, inputs[:, :length], masks.causal(shown))
  index = jnp.minimum(first + jnp.arange(network.draft_length), length - 1)
  at = jax.vmap(lambda x, index: x[index])
  heads = None if found.heads is None else at(found.heads, index)
  outputs = drafter.Pass(at(found.hidden, index), heads, found.cache)
  cache = None if c.cache == 'none' else found.cache
  return outputs, shown.sum(axis=1, dtype=jnp.int32), cache


@jax.named_scope('part(sampling: bookkeeping)')
def over_cache(network, c, shape, carry, cache, layout):
  """Computes the newest token and the draft, which attend to a cache.

  Arguments as for passes.over_window.

  Returns:
    As `over_canvas`; the Cache has the positions of rows with `cached`.
  """
  first = windows.first_slot(carry, layout)
  inputs, has_input = windows.shown(network, carry, layout, first)
  pos = first + jnp.arange(network.draft_length)
  clean = windows.new_clean(carry, cache, has_input, pos, first)
  tokens = jnp.take_along_axis(inputs, clean.inside, axis=1)
  outputs = drafter.append(
    bind(network.config, network.params),
    tokens,
    clean.labels,
    clean.usable,
    clean.places,
  )
  computed = (clean.labels.doc >= 0).sum(axis=1, dtype=jnp.int32)
  return outputs, computed, windows.of_cached_rows(carry, outputs.cache, cache)


def proposals(network, carry, layout, outputs):
  """Returns `logits` and `propose` of speculation.verify.

  Args:
    network: Network.
    carry: Carry before the step.
    layout: Layout.
    outputs: drafter.Pass of D positions per row, from `over_canvas`.
  """
  model = bind(network.config, network.params)
  first = windows.first_slot(carry, layout)[:, 0]

  def propose(accepted, token):
    start = first + accepted + 1
    return drafter.propose(model, outputs, accepted, token, start)

  return model.logits(outputs.hidden), propose
