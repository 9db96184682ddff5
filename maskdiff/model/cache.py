"""The KV cache of a network: keys, values and the labels of their positions.

A cache has S places per row. `Transformer.prefill` makes one with a place for
every position of a row. `Transformer.extend` computes a window of positions
that attend to the cache, and `Transformer.append` also stores the window. A
cached position has masks.Labels like any other position, so the visibility rule
decides which queries see it. A place is hidden, with doc -1, if its keys and
values are missing or out of date.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from maskdiff.distributed.mesh import replicate, shard
from maskdiff.model import masks


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['k', 'v', 'labels'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of all layers.

  Attributes:
    k: [N, B, G, S, K], rotated keys in the compute dtype.
    v: [N, B, G, S, K], values.
    labels: masks.Labels of the places, [B, S] each.
  """

  k: jax.Array
  v: jax.Array
  labels: masks.Labels


def empty(c, labels):
  """Returns a Cache of zeros whose places are all hidden.

  Args:
    c: TransformerConfig.
    labels: masks.Labels [B, S] of the positions that the places are for.
  """
  batch, places = labels.doc.shape
  zeros = jnp.zeros(
    (c.layers, batch, c.kv_heads, places, c.head_dim), jnp.dtype(c.dtype)
  )
  return split(Cache(zeros, zeros, hide(labels)))


def split(cache):
  """Returns the Cache with rows and heads split over the mesh, if there is one.

  The labels are on all devices.
  """
  axes = (None, 'batch', 'kv_heads', None, 'head_dim')
  return Cache(
    shard(cache.k, *axes), shard(cache.v, *axes), replicate(cache.labels)
  )


def hide(labels, hidden=True):
  """Returns Labels with doc -1 where `hidden`, [B, S] bool, is True."""
  return dataclasses.replace(labels, doc=jnp.where(hidden, -1, labels.doc))


def hide_places(cache, hidden):
  """Returns the Cache with some places hidden, [B, S] bool."""
  return dataclasses.replace(cache, labels=hide(cache.labels, hidden))


def write(cache, places, k, v, labels):
  """Returns the Cache with the keys and values of a window in some places.

  Args:
    cache: Cache.
    places: [B, W] int32, distinct in each row. A position whose number is
      outside of [0, S) is not stored.
    k: [N, B, G, W, K].
    v: [N, B, G, W, K].
    labels: masks.Labels of the W positions, [B, W] each.
  """
  places = jnp.where(places < 0, cache.k.shape[3], places)
  # By vmap over the rows, so that a mesh that splits the rows needs no
  # communication; over the layers first, so that no axis is moved, which would
  # copy the whole cache.
  of_layer = jax.vmap(lambda old, at, new: old.at[:, at].set(new, mode='drop'))
  put = jax.vmap(of_layer, in_axes=(0, None, 0))
  mark = jax.vmap(lambda old, at, new: old.at[at].set(new, mode='drop'))
  old = cache.labels
  return Cache(
    put(cache.k, places, k),
    put(cache.v, places, v),
    dataclasses.replace(
      old,
      doc=mark(old.doc, places, labels.doc),
      pos=mark(old.pos, places, labels.pos),
      block=mark(old.block, places, labels.block),
      reach=mark(old.reach, places, labels.reach),
    ),
  )


def first_places(cache, places):
  """Returns a Cache of the first `places` places of each row."""
  if places == cache.k.shape[3]:
    return cache
  return Cache(
    cache.k[:, :, :, :places],
    cache.v[:, :, :, :places],
    jax.tree.map(lambda x: x[:, :places], cache.labels),
  )


def replace_first_places(cache, part):
  """Returns the Cache with its first places replaced.

  Args:
    cache: Cache of S places per row.
    part: Cache of at most S places. The remaining places of `cache` are hidden,
      because their keys and values are older than those of `part`.
  """
  if part.k.shape == cache.k.shape:
    return part
  start = lambda old, new: jax.lax.dynamic_update_slice(
    old, new, (0,) * old.ndim
  )
  places = part.k.shape[3]
  labels = jax.tree.map(start, cache.labels, part.labels)
  after = jnp.arange(cache.k.shape[3]) >= places
  return Cache(
    start(cache.k, part.k), start(cache.v, part.v), hide(labels, after)
  )


def widen(cache, places):
  """Returns the Cache with hidden places added at the end of each row."""
  added = places - cache.k.shape[3]
  last = lambda x, axis, value: jnp.pad(
    x,
    [(0, added if a == axis else 0) for a in range(x.ndim)],
    constant_values=value,
  )
  labels = jax.tree.map(lambda x: last(x, 1, -1), cache.labels)
  return Cache(last(cache.k, 3, 0), last(cache.v, 3, 0), labels)


def put_rows(cache, rows, part):
  """Returns the Cache with some rows replaced.

  Args:
    cache: Cache of B rows.
    rows: [n] int32.
    part: Cache of n rows, with the same number of places.
  """
  return Cache(
    cache.k.at[:, rows].set(part.k),
    cache.v.at[:, rows].set(part.v),
    jax.tree.map(lambda x, y: x.at[rows].set(y), cache.labels, part.labels),
  )
