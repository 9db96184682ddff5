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
  """Random q, k, v, and the cotangent of the output, [B, heads, L, K]."""
  random = np.random.default_rng(0)
  return tuple(
    jnp.asarray(random.normal(size=(batch, n, length, head_dim)), jnp.float32)
    for n in (heads, kv_heads, kv_heads, heads)
  )


def padded(length):
  """[3, length] bool: nothing, the left and the right side padded."""
  places = np.arange(length)
  return jnp.asarray(
    [places >= 0, places >= length // 3, places < length - length // 4]
  )


def packed(length):
  """[3, length] int32 documents, other ones in each row."""
  starts = np.random.default_rng(0).random((3, length)) < 4 / length
  return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def two_documents(batch, n, size):
  """[noisy ; clean] of two documents; the regime promises nothing."""
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


def sdlm(place, clean, size, *anchors):
  """[clean ; windows]: pos, block and reach of SDLM's training rows.

  A window repeats its anchor, and sees itself and what is before the anchor.
  """
  window, offset = np.divmod(np.maximum(place - clean, 0), size)
  anchor = np.asarray(anchors)[window]
  of_window = place >= clean
  return (
    np.where(of_window, anchor + offset, place),
    np.where(of_window, window, -1),
    np.where(of_window, anchor, place + 1),
  )


def valid_only(x, labels):
  """x [B, H, L, K] with zeros at padding, whose output means nothing."""
  return jnp.where((labels.doc >= 0)[:, None, :, None], x, 0)


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, q, k, v, g, labels):
  """The output and d sum(out * g) at the positions that mean something."""
  out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, labels), q, k, v)
  return valid_only(out, labels), *pullback(valid_only(g, labels))


def assert_equals_xla(
  attend, labels, heads, kv_heads, head_dim=128, m=None, **options
):
  """In value and in gradients.

  Args:
    attend: takes q, k, v and labels, and the options.
    m: the mesh that it runs on.
  """
  batch, length = labels.doc.shape
  arrays = draw(batch, length, heads, kv_heads, head_dim)
  expected = value_and_gradients(attention.xla, *arrays, labels)
  # Made here so that no other test has compiled it with other tiles.
  attend = functools.partial(attend, **options)
  with jax.set_mesh(m) if m else contextlib.nullcontext():
    actual = value_and_gradients(attend, *arrays, labels)
  for e, a in zip(expected, actual, strict=True):
    np.testing.assert_allclose(a, e, atol=2e-5 * float(jnp.abs(e).max()))


def cpu_mesh(**sizes):
  """A mesh of the first fake devices, on axes of these sizes."""
  count = math.prod(sizes.values())
  return mesh.make_mesh(**{'fsdp': 1} | sizes, devices=jax.devices()[:count])
