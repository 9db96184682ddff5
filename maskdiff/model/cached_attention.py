"""Attention of a window of positions over itself and over cached keys.

For sampling with a cache: a few queries, many keys, no gradient. Scores are
[B, H, S, L + S], which is little for a block of slots; nothing is copied out of
the cache, or into it.
"""

import functools
import math

import jax
import jax.numpy as jnp


def attend_window(q, k, v, there, cached_k, cached_v, kept):
  """Softmax attention, bidirectional; scaled and normalised as in attention.py.

  Args:
    q: [B, H, S, K], of the window.
    k, v: [B, G, S, K], of the window; G divides H.
    there: [B, S] bool, False on what is no part of the window.
    cached_k, cached_v: [B, G, L, K].
    kept: [B, L] bool, which of them are seen. Every query sees the same keys.

  Returns:
    [B, H, S, K] in the dtype of q.
  """
  batch, heads, size, head_dim = q.shape
  groups = k.shape[1]
  q = q.reshape(batch, groups, heads // groups, size, head_dim)

  def scores(k, seen):
    found = jnp.einsum(
      'bghsk,bgck->bghsc', q, k, preferred_element_type=jnp.float32
    )
    found *= 1 / math.sqrt(head_dim)
    least = jnp.finfo(jnp.float32).min
    return jnp.where(seen[:, None, None, None], found, least)

  both = jnp.concatenate([scores(cached_k, kept), scores(k, there)], axis=-1)
  weights = jax.nn.softmax(both, axis=-1).astype(v.dtype)
  of_cache, of_window = jnp.split(weights, [kept.shape[1]], axis=-1)
  values = functools.partial(
    jnp.einsum, 'bghsc,bgck->bghsk', preferred_element_type=jnp.float32
  )
  out = values(of_cache, cached_v) + values(of_window, v)
  return out.astype(q.dtype).reshape(batch, heads, size, head_dim)
