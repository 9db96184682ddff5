"""Attention of a window of positions to itself and to a KV cache.

Sampling with a cache has few queries, many keys and no gradient. The scores are
[B, H, W, S + W], which is small for one block of slots. The function reads the
cache in place and does not write to it.
"""

import functools
import math

import jax
import jax.numpy as jnp

from maskdiff.model import masks


def attend_cached(q, k, v, window, cached_k, cached_v, cached):
  """Returns softmax attention over a window and a cache.

  A query sees the keys of the window and of the cache that `masks.visible`
  allows. Scores are scaled and normalised as in attention.py.

  Args:
    q: [B, H, W, K], queries of the window.
    k: [B, G, W, K], keys of the window; G divides H.
    v: [B, G, W, K], values of the window.
    window: masks.Labels of the W positions; doc is -1 on padding.
    cached_k: [B, G, S, K], rotated keys.
    cached_v: [B, G, S, K], values.
    cached: masks.Labels of the S positions; doc is -1 on positions that no
      query may see.

  Returns:
    [B, H, W, K] in the dtype of q.
  """
  batch, heads, size, head_dim = q.shape
  groups = k.shape[1]
  q = q.reshape(batch, groups, heads // groups, size, head_dim)

  def scores(k, labels):
    products = jnp.einsum(
      'bghwk,bgsk->bghws', q, k, preferred_element_type=jnp.float32
    )
    products *= 1 / math.sqrt(head_dim)
    # Padding of the window sees hidden keys, since both have doc -1. Its output
    # is not used.
    visible = masks.visible(window, labels)[:, None, None]
    return jnp.where(visible, products, jnp.finfo(jnp.float32).min)

  all_scores = jnp.concatenate(
    [scores(cached_k, cached), scores(k, window)], axis=-1
  )
  weights = jax.nn.softmax(all_scores, axis=-1).astype(v.dtype)
  cache_weights, window_weights = jnp.split(
    weights, [cached_k.shape[2]], axis=-1
  )
  mix = functools.partial(
    jnp.einsum, 'bghws,bgsk->bghwk', preferred_element_type=jnp.float32
  )
  out = mix(cache_weights, cached_v) + mix(window_weights, v)
  return out.astype(q.dtype).reshape(batch, heads, size, head_dim)
