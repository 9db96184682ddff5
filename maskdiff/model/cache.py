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
    k: [N, B, G, S, K], rotated keys in the compute dtype. If a drafter has keys
      of its own (drafter.py), a pair: of the network and of the drafter.
    v: values, as k.
    labels: masks.Labels of the places, [B, S] each.
  """

  k: jax.Array | tuple[jax.Array, jax.Array]
  v: jax.Array | tuple[jax.Array, jax.Array]
  labels: masks.Labels

  @property
  def places(self):
    """S, the number of places of a row."""
    return self.labels.doc.shape[1]


def empty(c, labels):
  """Returns a Cache of zeros whose places are all hidden.

  Args:
    c: TransformerConfig.
    labels: masks.Labels [B, S] of the positions that the places are for.
  """
  batch, places = labels.doc.shape
  zeros = lambda layers: jnp.zeros(
    (layers, batch, c.kv_heads, places, c.head_dim), jnp.dtype(c.dtype)
  )
  keys, of_drafter = zeros(c.layers), c.drafter.cached_layers
  if of_drafter:
    keys = keys, zeros(of_drafter)
  return split(Cache(keys, keys, hide(labels)))


def split(cache):
  """Returns the Cache with rows and heads split over the mesh, if there is one.

  The labels are on all devices.
  """
  axes = (None, 'batch', 'kv_heads', None, 'head_dim')
  k, v = jax.tree.map(lambda x: shard(x, *axes), (cache.k, cache.v))
  return Cache(k, v, replicate(cache.labels))


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
    k: [N, B, G, W, K], or a pair, as in the Cache.
    v: [N, B, G, W, K], or a pair.
    labels: masks.Labels of the W positions, [B, W] each.
  """
  places = jnp.where(places < 0, cache.places, places)
  # By vmap over the rows, so that a mesh that splits the rows needs no
  # communication; over the layers first, so that no axis is moved, which would
  # copy the whole cache.
  of_layer = jax.vmap(lambda old, at, new: old.at[:, at].set(new, mode='drop'))
  of_layers = jax.vmap(of_layer, in_axes=(0, None, 0))
  put = lambda old, new: of_layers(old, places, new)
  mark = jax.vmap(lambda old, at, new: old.at[at].set(new, mode='drop'))
  old = cache.labels
  return Cache(
    jax.tree.map(put, cache.k, k),
    jax.tree.map(put, cache.v, v),
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
  if places == cache.places:
    return cache
  k, v = jax.tree.map(lambda x: x[:, :, :, :places], (cache.k, cache.v))
  return Cache(k, v, jax.tree.map(lambda x: x[:, :places], cache.labels))


def replace_first_places(cache, part):
  """Returns the Cache with its first places replaced.

  Args:
    cache: Cache of S places per row.
    part: Cache of at most S places. The remaining places of `cache` are hidden,
      because their keys and values are older than those of `part`.
  """
  if part.places == cache.places:
    return part
  start = lambda old, new: jax.lax.dynamic_update_slice(
    old, new, (0,) * old.ndim
  )
  k, v, labels = jax.tree.map(
    start, (cache.k, cache.v, cache.labels), (part.k, part.v, part.labels)
  )
  return Cache(k, v, hide(labels, jnp.arange(cache.places) >= part.places))


def widen(cache, places):
  """Returns the Cache with hidden places added at the end of each row."""
  added = places - cache.places
  last = lambda x, axis, value: jnp.pad(
    x,
    [(0, added if a == axis else 0) for a in range(x.ndim)],
    constant_values=value,
  )
  labels = jax.tree.map(lambda x: last(x, 1, -1), cache.labels)
  k, v = jax.tree.map(lambda x: last(x, 3, 0), (cache.k, cache.v))
  return Cache(k, v, labels)


def put_rows(cache, rows, part):
  """Returns the Cache with some rows replaced.

  Args:
    cache: Cache of B rows.
    rows: [n] int32.
    part: Cache of n rows, with the same number of places.
  """
  put = lambda x, y: x.at[:, rows].set(y)
  mark = lambda x, y: x.at[rows].set(y)
  k, v = jax.tree.map(put, (cache.k, cache.v), (part.k, part.v))
  return Cache(k, v, jax.tree.map(mark, cache.labels, part.labels))
