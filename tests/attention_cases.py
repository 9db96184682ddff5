"""Inputs and comparisons for the tests of attention."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.distributed import mesh
from maskdiff.model import attention
from maskdiff.model.masks import Labels


def draw(batch, length, heads, kv_heads, head_dim):
  """Returns random q, k, v and cotangents of the output, [B, heads, L, K]."""
  random = np.random.default_rng(0)
  return tuple(
    jnp.asarray(random.normal(size=(batch, n, length, head_dim)), jnp.float32)
    for n in (heads, kv_heads, kv_heads, heads)
  )


def padded(length):
  """Returns [3, length] bool: no padding, padding left, padding right."""
  index = np.arange(length)
  return jnp.asarray(
    [index >= 0, index >= length // 3, index < length - length // 4]
  )


def packed(length):
  """Returns [3, length] int32, random documents in each row."""
  starts = np.random.default_rng(0).random((3, length)) < 4 / length
  return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def two_documents(batch, n, size):
  """Returns Labels of [noisy ; clean] of two documents, regime GENERAL."""
  half = np.arange(n)
  own = half // size
  rows = lambda *halves: jnp.tile(
    jnp.asarray(np.concatenate(halves), jnp.int32), (batch, 1)
  )
  doc = (half >= n // 2).astype(int)
  return Labels(
    doc=rows(doc, doc),
    pos=rows(half, half),
    block=rows(own, np.full(n, -1)),
    reach=rows(own * size, (own + 1) * size),
  )


def sdlm(index, clean, size, *anchors):
  """Returns pos, block and reach of SDLM's training rows, [clean ; windows].

  A window begins at its anchor. It sees itself and the tokens before the
  anchor.
  """
  window, offset = np.divmod(np.maximum(index - clean, 0), size)
  anchor = np.asarray(anchors)[window]
  in_window = index >= clean
  return (
    np.where(in_window, anchor + offset, index),
    np.where(in_window, window, -1),
    np.where(in_window, anchor, index + 1),
  )


def valid_only(x, labels):
  """Returns x [B, H, L, K] with zeros at padding."""
  return jnp.where((labels.doc >= 0)[:, None, :, None], x, 0)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, q, k, v, g, labels):
  """Returns the output and the gradients of sum(out * g), without padding."""
  out, pullback = jax.vjp(
    lambda q, k, v: attend(q, k, v, labels, labels), q, k, v
  )
  return valid_only(out, labels), *pullback(valid_only(g, labels))


def assert_equals_xla(
  attend, labels, heads, kv_heads, head_dim=128, m=None, **options
):
  """Compares an implementation with attention.xla in value and gradients.

  Args:
    attend: (q, k, v, query labels, key labels, **options) -> output.
    labels: masks.Labels.
    heads: H.
    kv_heads: G.
    head_dim: K.
    m: the mesh of `attend`, or None.
    **options: passed to `attend`.
  """
  batch, length = labels.doc.shape
  arrays = draw(batch, length, heads, kv_heads, head_dim)
  expected = value_and_gradients(attention.xla, *arrays, labels)
  # A new function for each test, because jit caches by the function and tests
  # change the tiles.
  attend = functools.partial(attend, **options)
  with jax.set_mesh(m) if m else contextlib.nullcontext():
    actual = value_and_gradients(attend, *arrays, labels)
  for e, a in zip(expected, actual, strict=True):
    np.testing.assert_allclose(a, e, atol=2e-5 * float(jnp.abs(e).max()))


def cpu_mesh(**sizes):
  """Returns a mesh of the first fake devices with axes of these sizes."""
  count = math.prod(sizes.values())
  return mesh.make_mesh(**{'fsdp': 1} | sizes, devices=jax.devices()[:count])
