"""Drafters: their logits from other formulas, training = decoding, pieces."""

import functools

import drafter_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff.model import drafter, masks, transformer
from maskdiff.model.cache import hide_places
from maskdiff.model.transformer import bind

TOKENS = np.array([[1, 5, 6, 7, 5, 8, 9, 5, 6]], np.int32)  # shifted right
LENGTH = TOKENS.shape[1]
LABELS = masks.causal(jnp.ones((1, LENGTH), bool))
STARTS = np.array([[1, 3, 7, 20]])  # the last is no window


def model(kind):
  return bind(cases.model(kind), cases.params(kind))


@functools.cache
def training_logits(kind):
  """Returns the logits of the drafts of all windows, [W, n, V]."""
  of = model(kind)

  @jax.jit
  def run():
    _, states = drafter.windows(of, jnp.asarray(TOKENS), LABELS, STARTS)
    return drafter.logits(of, states)

  return np.asarray(run())[0]


@pytest.mark.parametrize('kind', cases.KINDS)
def test_windows_of_training_are_the_drafts_of_decoding(kind):
  """From a pass over the prefix, and from one more position with a cache."""
  of, tokens = model(kind), jnp.asarray(TOKENS)

  @jax.jit
  def decode(start):
    index = jnp.arange(LENGTH)[None]
    labels = masks.causal(index < start)
    token, begin = tokens[:, start], start[None]
    whole = drafter.prefill(of, tokens, labels)
    first = drafter.propose(of, whole, begin - 1, token, begin)
    last = lambda x: jax.lax.dynamic_slice_in_dim(x, start - 1, 1, axis=1)
    step = drafter.append(
      of,
      last(tokens),
      jax.tree.map(last, labels),
      hide_places(whole.cache, index == start - 1),
      begin[:, None] - 1,
    )
    return first, drafter.propose(of, step, np.array([0]), token, begin)

  for start, expected in zip((1, 3, 7), training_logits(kind), strict=False):
    for found in decode(jnp.int32(start)):
      np.testing.assert_allclose(found[0], expected, atol=1e-5)


def test_heads_of_medusa_begin_as_the_network():
  """Zero residuals and differences predict the next token again."""
  fresh = transformer.init(cases.model('medusa'), jax.random.key(0))['drafter']
  assert not any(np.any(x) for x in jax.tree.leaves(fresh))
  of = bind(cases.model('medusa'), {**cases.params('medusa'), 'drafter': fresh})
  hidden, states = drafter.windows(of, TOKENS, LABELS, STARTS)
  expected = np.asarray(of.logits(hidden))[0, [0, 2, 6]]
  found = np.asarray(drafter.logits(of, states))[0, :3]
  for draft in found.swapaxes(0, 1):
    np.testing.assert_allclose(draft, expected, atol=1e-5)


def test_medusa_is_its_formula():
  p, own = cases.params('medusa'), cases.params('medusa')['drafter']
  hidden = np.asarray(model('medusa')(TOKENS, LABELS))[0]
  for window, start in enumerate([1, 3, 7]):
    x = hidden[start - 1]
    for k in range(3):
      inner = x @ own['residual'][k] + own['bias'][k]
      y = x + inner / (1 + np.exp(-inner))
      expected = y @ (p['embed'].T + own['vocabulary'][k])
      found = training_logits('medusa')[window, k]
      np.testing.assert_allclose(found, expected, atol=1e-5)


def test_head_of_mtp_is_a_network_with_another_last_layer():
  p, own = cases.params('mtp'), cases.params('mtp')['drafter']
  found = training_logits('mtp')
  for head in range(3):
    blocks = jax.tree.map(
      lambda w, v, head=head: jnp.concatenate([w[:-1], v[head : head + 1]]),
      dict(p['blocks']),
      dict(own['blocks']),
    )
    other = {
      'embed': p['embed'],
      'blocks': blocks,
      'norm': own['norm'][head],
    }
    of = bind(cases.PLAIN, other)
    expected = np.asarray(of.logits(of(TOKENS, LABELS)))[0, [0, 2, 6]]
    np.testing.assert_allclose(found[:3, head], expected, atol=1e-5)


def norm(x, gain):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5) * gain


def rotate(x, pos):
  """Rotates [..., K] at a position."""
  half = x.shape[-1] // 2
  angle = pos * 1e4 ** (-np.arange(half) / half)
  a, b = x[..., :half], x[..., half:]
  cos, sin = np.cos(angle), np.sin(angle)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


@functools.cache
def tapped():
  of = model('block')
  run = lambda: of.run(TOKENS, LABELS, of.attention(LABELS), tapped=True)[2]
  return jax.device_get(jax.jit(run)())


@pytest.mark.parametrize('start', [1, 3, 7])
def test_block_is_its_formula(start):
  """In NumPy: one position after the other, from hidden states of layers."""
  p, own = (
    jax.tree.map(np.float64, tree)
    for tree in (cases.params('block'), cases.params('block')['drafter'])
  )
  assert cases.model('block').drafter.taps(3) == (1, 1)
  context = norm(
    sum(
      np.asarray(x)[0] @ w for x, w in zip(tapped(), own['fuse'], strict=True)
    ),
    own['fuse_norm'],
  )
  x = np.stack([p['embed'][TOKENS[0, start]], *[own['mask']] * 3])
  for n in range(2):
    w = {name: weights[n] for name, weights in own['blocks'].items()}
    h = norm(x, w['norm1'])
    keys = [(j, context[j]) for j in range(start)]
    keys += [(start + j, h[j]) for j in range(4)]
    k = np.stack([rotate(y @ w['k'][:, 0], pos) for pos, y in keys])
    v = np.stack([y @ w['v'][:, 0] for _, y in keys])
    attended = np.zeros_like(x)
    for j in range(4):
      for head in range(2):
        q = rotate(h[j] @ w['q'][:, head], start + j)
        scores = k @ q / np.sqrt(8)
        share = np.exp(scores - scores.max())
        attended[j] += (share / share.sum()) @ v @ w['o'][head]
    x = x + attended
    h = norm(x, w['norm2'])
    gate = h @ w['gate']
    x = x + (gate / (1 + np.exp(-gate)) * (h @ w['up'])) @ w['down']
  expected = norm(x, own['norm'])[1:] @ p['embed'].T
  found = training_logits('block')[STARTS[0].tolist().index(start)]
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_layers_that_a_block_drafter_reads_are_evenly_spaced():
  taps = lambda layers, own: drafter.DrafterConfig('block', own).taps(layers)
  assert taps(36, 5) == (1, 9, 17, 25, 33)  # Qwen3-8B in DFlash
  assert taps(28, 1) == (14,)
  assert taps(5, 2) == (1, 2)
  for layers in (1, 2):
    assert all(0 <= tap < layers for tap in taps(layers, 5))


def test_attention_in_pieces_changes_nothing(monkeypatch):
  starts = np.array([[1, 2, 4, 5, 7]])
  states = lambda: drafter.windows(model('block'), TOKENS, LABELS, starts)[1]
  whole = states()
  monkeypatch.setattr(drafter, 'QUERIES', 8)  # two windows
  np.testing.assert_allclose(states(), whole, atol=1e-5)


@pytest.mark.parametrize('kind', cases.KINDS)
def test_a_window_depends_on_the_tokens_before_it_only(kind):
  changed = TOKENS.copy()
  changed[0, 4:] = 10  # from the fourth input on: tokens 3, 4, ...
  of = model(kind)
  run = jax.jit(lambda tokens: drafter.windows(of, tokens, LABELS, STARTS)[1])
  states = lambda tokens: np.asarray(run(tokens))[0]
  before, after = states(TOKENS), states(changed)
  np.testing.assert_array_equal(before[:2], after[:2])
  assert np.all(np.abs(before[2] - after[2]).max(axis=1) > 1e-3)
