"""Every implementation of attention gives the answer of the visibility rule."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff import attention, masks, mesh
from maskdiff.masks import Labels


def draw(batch, length, heads, kv_heads, head_dim):
  """Random q, k, v, and the cotangent of the output."""
  random = np.random.default_rng(0)
  return tuple(
    jnp.asarray(random.normal(size=(batch, length, n, head_dim)), jnp.float32)
    for n in (heads, kv_heads, kv_heads, heads)
  )


def query_by_query(q, k, v, labels):
  """Attention by loops over rows, queries, heads and keys, in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  doc, pos, block, reach = (
    np.asarray(x) for x in (labels.doc, labels.pos, labels.block, labels.reach)
  )
  batch, length, heads, head_dim = q.shape
  group = heads // k.shape[2]

  def sees(b, i, j):
    if doc[b, i] != doc[b, j]:
      return False
    if block[b, j] < 0:
      return pos[b, j] < reach[b, i]
    return block[b, j] == block[b, i]

  out = np.zeros_like(q)
  for b, i, h in np.ndindex(batch, length, heads):
    seen = [j for j in range(length) if sees(b, i, j)]
    scores = k[b, seen, h // group] @ q[b, i, h] / np.sqrt(head_dim)
    weights = np.exp(scores - scores.max())
    out[b, i, h] = weights / weights.sum() @ v[b, seen, h // group]
  return out


def padded(length):
  """[3, length] bool: nothing, the left and the right side padded."""
  places = np.arange(length)
  return jnp.asarray(
    [places >= 0, places >= length // 3, places < length - length // 4]
  )


def block_diffusion(batch, n, size):
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


def packed(length):
  """[3, length] int32 documents, other ones in each row."""
  starts = np.random.default_rng(0).random((3, length)) < 4 / length
  return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


LABELS = {
  'bidirectional': masks.bidirectional(padded(12)),
  'causal': masks.causal(padded(12)),
  'bidirectional, packed': masks.bidirectional(padded(12), packed(12)),
  'causal, packed': masks.causal(padded(12), packed(12)),
  'general': block_diffusion(3, 6, 2),
}


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
@pytest.mark.parametrize('labels', LABELS.values(), ids=LABELS)
def test_xla_equals_a_loop_over_queries_and_the_keys_they_see(labels, kv_heads):
  q, k, v, _ = draw(3, 12, 4, kv_heads, 8)
  np.testing.assert_allclose(
    attention.xla(q, k, v, labels),
    query_by_query(q, k, v, labels),
    atol=2e-6,
  )


@pytest.mark.parametrize('labels', LABELS.values(), ids=LABELS)
def test_invisible_keys_and_values_have_no_influence(labels):
  """Not even when their scores are enormous."""
  q, k, v, _ = draw(3, 12, 4, 2, 8)
  query = 7
  hidden = ~masks.visible(labels, labels)[:, query, :, None, None]
  out = attention.xla(q, k, v, labels)[:, query]
  poisoned = attention.xla(
    q, jnp.where(hidden, 1e4, k), jnp.where(hidden, 1e4, v), labels
  )[:, query]
  np.testing.assert_array_equal(out, poisoned)


def test_xla_returns_the_dtype_of_the_query_and_sums_scores_in_float32():
  q, k, v, _ = draw(3, 12, 4, 2, 64)
  half = lambda *arrays: [x.astype(jnp.bfloat16) for x in arrays]
  q, k, v = half(q, k, v)
  out = attention.xla(q, k, v, LABELS['bidirectional'])
  assert out.dtype == jnp.bfloat16
  exact = query_by_query(q, k, v, LABELS['bidirectional'])
  np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize('labels', LABELS.values(), ids=LABELS)
def test_auto_is_xla_on_the_cpu(labels):
  q, k, v, _ = draw(3, 12, 4, 2, 8)
  np.testing.assert_array_equal(
    attention.attend(q, k, v, labels, 'auto'),
    attention.attend(q, k, v, labels, 'xla'),
  )


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, q, k, v, g, labels):
  """The output and d sum(out * g) at the positions that mean something."""
  g = jnp.where((labels.doc >= 0)[..., None, None], g, 0)
  out, pullback = jax.vjp(lambda q, k, v: attend(q, k, v, labels), q, k, v)
  return jnp.where(g != 0, out, 0), *pullback(g)


def assert_splash_equals_xla(labels, heads, kv_heads, m=None, head_dim=128):
  arrays = draw(len(labels.doc), 256, heads, kv_heads, head_dim)
  splash = functools.partial(attention.splash, interpret=True)
  expected = value_and_gradients(attention.xla, *arrays, labels)
  with jax.set_mesh(m) if m else contextlib.nullcontext():
    actual = value_and_gradients(splash, *arrays, labels)
  for e, a in zip(expected, actual, strict=True):
    np.testing.assert_allclose(a, e, atol=2e-5 * float(jnp.abs(e).max()))


@pytest.mark.parametrize('heads, kv_heads', [(2, 2), (4, 2)])
@pytest.mark.parametrize('make', [masks.bidirectional, masks.causal])
def test_splash_equals_xla_with_gradients(make, heads, kv_heads):
  assert_splash_equals_xla(make(padded(256)), heads, kv_heads)


@pytest.mark.parametrize('make', [masks.bidirectional, masks.causal])
def test_splash_equals_xla_where_whole_tiles_are_other_documents(
  monkeypatch, make
):
  """Tiles of 128: most documents see nothing of the one or of the other."""
  monkeypatch.setattr(attention, 'SPLASH_BLOCK', 128)
  assert_splash_equals_xla(make(padded(256), packed(256)), 2, 2)


def test_splash_serves_heads_that_are_narrower_than_its_tiles():
  """LLaDA 1B has heads of 64."""
  labels = masks.bidirectional(padded(256))
  assert_splash_equals_xla(labels, 4, 2, head_dim=64)


@pytest.mark.parametrize(
  'batch, heads, chosen', [(8, 4, True), (1, 4, False), (8, 3, False)]
)
def test_auto_leaves_splash_what_a_mesh_can_split(
  monkeypatch, batch, heads, chosen
):
  """A single prompt on a pod must not reach a kernel that splits the batch."""
  monkeypatch.setattr(attention, '_platform', lambda mesh: 'tpu')
  m = mesh.make_mesh(fsdp=4, tensor=2)
  labels = masks.bidirectional(jnp.ones((batch, 128), bool))
  q = jnp.zeros((batch, 128, heads, 64))
  with jax.set_mesh(m):
    assert attention._suits_splash(q, heads, labels) == chosen


def test_splash_equals_xla_with_rows_and_heads_split_over_a_mesh():
  m = mesh.make_mesh(replica=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  valid = padded(256)[1:]
  assert_splash_equals_xla(masks.bidirectional(valid), 4, 4, m)


def test_splash_refuses_labels_that_promise_nothing():
  labels = block_diffusion(3, 128, 16)
  with pytest.raises(ValueError, match='regime'):
    attention.splash(*draw(3, 256, 2, 2, 128)[:3], labels, interpret=True)
