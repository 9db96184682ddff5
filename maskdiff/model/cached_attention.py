"""Attention of a window of positions to itself and to a KV cache.

Sampling with a cache has few queries, many keys and no gradient. The scores are
[B, H, S, L + S], which is small for one block of slots. The function reads the
cache in place and does not write to it.
"""

import functools
import math

import jax
import jax.numpy as jnp


def attend_window(q, k, v, in_window, cached_k, cached_v, cache_valid):
  """Returns bidirectional softmax attention over the window and the cache.

  Scores are scaled and normalised as in attention.py. All queries of a row
  attend to the same keys.

  Args:
    q: [B, H, S, K], queries of the window.
    k: [B, G, S, K], keys of the window; G divides H.
    v: [B, G, S, K], values of the window.
    in_window: [B, S] bool, False on padding of the window.
    cached_k: [B, G, L, K], rotated keys.
    cached_v: [B, G, L, K], values.
    cache_valid: [B, L] bool, the cached positions to attend to.

  Returns:
    [B, H, S, K] in the dtype of q.
  """
  batch, heads, size, head_dim = q.shape
  groups = k.shape[1]
  q = q.reshape(batch, groups, heads // groups, size, head_dim)

  def scores(k, valid):
    products = jnp.einsum(
      'bghsk,bgck->bghsc', q, k, preferred_element_type=jnp.float32
    )
    products *= 1 / math.sqrt(head_dim)
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(valid[:, None, None, None], products, lowest)

  both = jnp.concatenate(
    [scores(cached_k, cache_valid), scores(k, in_window)], axis=-1
  )
  weights = jax.nn.softmax(both, axis=-1).astype(v.dtype)
  cache_weights, window_weights = jnp.split(
    weights, [cache_valid.shape[1]], axis=-1
  )
  mix = functools.partial(
    jnp.einsum, 'bghsc,bgck->bghsk', preferred_element_type=jnp.float32
  )
  out = mix(cache_weights, cached_v) + mix(window_weights, v)
  return out.astype(q.dtype).reshape(batch, heads, size, head_dim)
