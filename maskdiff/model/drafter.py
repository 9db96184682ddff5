"""Drafters: weights that guess tokens after the next one, for speculation.

A causal network predicts one token per pass. A drafter reads hidden states of
the network and guesses D - 1 more tokens, which the next pass verifies
(sampling/speculation.py). There are three kinds, each a few weights beside the
network:

- `medusa`: D - 1 heads, each a residual block and a vocabulary matrix on the
  last hidden state (arXiv 2401.10774, section 2.1). The matrix is stored as its
  difference from that of the network, so that a head begins as a copy of the
  network's own.
- `mtp`: D - 1 heads, each a Transformer layer beside the last layer of the
  network, on the same input (Gloeckle et al., arXiv 2404.19737). All share the
  network's vocabulary matrix.
- `block`: a small Transformer that fills a block of D - 1 masks after an
  anchor, the newest token. Attention in the block is bidirectional. The keys
  and values of the tokens before it are projections of hidden states of some
  layers of the network, the same for all layers of the drafter (DFlash, arXiv
  2602.06036). Embedding and vocabulary matrix are the network's.

The hidden state of position p has seen the tokens before p and predicts token
p. A window that starts at s has drafts of the tokens s, ..., s + D - 2: from
the hidden states of position s - 1, and for `block` also from token s - 1.

Letters as in transformer.py, and W windows of D positions with n = D - 1
drafts.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maskdiff.model import masks
from maskdiff.model.blocks import Blocks, scale, stacked, weight, zeros
from maskdiff.model.cache import Cache, write
from maskdiff.model.cached_attention import attend_cached
from maskdiff.model.layers import block, lookup, project_kv, rms_norm, rope
from maskdiff.model.lora import LoraConfig

QUERIES = 512  # of the windows of training rows, per piece of attention


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
  """Settings of a drafter; see config/drafter.py."""

  kind: str = 'none'  # or medusa, mtp, block
  layers: int = 0  # of `block`
  length: int = 1  # D
  frozen: bool = False  # whether only the drafter is trained

  @property
  def drafts(self):
    """The number of tokens that are guessed after the next one."""
    return self.length - 1

  @property
  def cached_layers(self):
    """The number of layers of the drafter with a KV cache."""
    return {'mtp': self.drafts, 'block': self.layers}.get(self.kind, 0)

  def taps(self, layers):
    """Returns numbers of the network's layers whose outputs are read.

    Those of `block` are evenly spaced, as in DFlash's code.

    Args:
      layers: N, of the network.
    """
    if self.kind == 'mtp':
      return (layers - 2,)
    if self.kind != 'block':
      return ()
    if self.layers == 1:
      return (layers // 2,)
    step = max(layers - 4, 0) / (self.layers - 1)
    evenly = (round(1 + i * step) for i in range(self.layers))
    return tuple(min(i, layers - 1) for i in evenly)


class Drafter(nnx.Module):
  """The weights of a drafter; Transformer has them as `drafter`."""

  def __init__(self, c, rngs):
    d, D, V = c.drafter, c.embed, c.vocab_size
    plain = dataclasses.replace(c, lora=LoraConfig(), drafter=DrafterConfig())
    if d.kind == 'medusa':
      matrix = ('drafts', 'embed', 'mlp')
      self.residual = zeros((d.drafts, D, D), matrix)
      self.bias = zeros((d.drafts, D), ('layers', 'embed'))
      self.vocabulary = zeros((d.drafts, D, V), ('drafts', 'embed', 'vocab'))
    if d.kind == 'mtp':
      self.blocks = Blocks(dataclasses.replace(plain, layers=d.drafts), rngs)
      self.norm = scale((d.drafts, D), ('layers', 'embed'))
    if d.kind == 'block':
      taps = len(d.taps(c.layers))
      self.mask = weight(rngs, (D,), ('embed',), D**-0.5)
      self.fuse = weight(
        rngs, (taps, D, D), ('taps', 'embed', 'mlp'), (taps * D) ** -0.5
      )
      self.fuse_norm = scale((D,), ('embed',))
      self.blocks = Blocks(dataclasses.replace(plain, layers=d.layers), rngs)
      self.norm = scale((D,), ('embed',))


class Pass(NamedTuple):
  """The result of a forward pass of a network with a drafter."""

  hidden: jax.Array  # [B, L, D], as Transformer.__call__ returns
  heads: jax.Array | None  # [B, L, n, D], outputs of the heads of `mtp`
  # Cache of the network and, with `mtp` and `block`, of the drafter: then k and
  # v are pairs of arrays.
  cache: Cache


def prefill(model, tokens, labels):
  """Computes whole rows; see Transformer.prefill. Returns a Pass."""
  attention = model.attention(labels)
  hidden, kv, tapped = model.run(
    tokens, labels, attention, keep=True, tapped=True
  )
  heads, own = _of_drafter(model, tapped, labels, attention)
  return Pass(hidden, heads, Cache(*_pair(kv, own), labels))


def append(model, tokens, labels, cache, places):
  """Computes windows and stores them; see Transformer.append.

  Returns:
    A Pass, whose Cache includes the window.
  """
  attention = model.cached_attention(labels, cache.labels)
  stored, own = _unpair(cache.k, cache.v)
  hidden, kv, tapped = model.run(
    tokens, labels, attention, stored, keep=True, tapped=True
  )
  heads, own = _of_drafter(model, tapped, labels, attention, own)
  cache = write(cache, places, *_pair(kv, own), labels)
  return Pass(hidden, heads, cache)


def windows(model, tokens, labels, starts):
  """Computes training rows and the drafts of windows.

  Args:
    model: Transformer with a drafter.
    tokens: [B, L] int32, shifted right: position p has token p - 1.
    labels: masks.Labels of the rows, causal.
    starts: [B, W] int32, the first drafted token of each window, from 1; L or
      more: no window.

  Returns:
    - the hidden states of the network, [B, L, D].
    - the states from which `logits` predicts drafts, [B, W, n, D].
  """
  c, attention = model.config, model.attention(labels)
  hidden, _, tapped = model.run(tokens, labels, attention, tapped=True)
  length = tokens.shape[1]
  rows = jnp.arange(len(tokens))[:, None]
  before = jnp.clip(starts - 1, 0, length - 1)
  if c.drafter.kind == 'medusa':
    return hidden, residuals(model, hidden[rows, before])
  if c.drafter.kind == 'mtp':
    select = lambda x: x[rows, before]
    heads, _ = _heads(model, tapped[0], labels, attention, select=select)
    return hidden, jnp.moveaxis(heads, 0, 2)
  inside = jnp.minimum(starts, length - 1)
  doc = jnp.where(starts < length, labels.doc[rows, inside], -1)
  context = _context(model, tapped, labels)
  return hidden, fill(model, tokens[rows, inside], starts, doc, context, labels)


def propose(model, passed, index, token, start):
  """Returns the logits of the drafts after a new token, [B, n, V] float32.

  Args:
    model: Transformer with a drafter.
    passed: Pass over windows of positions, of which one per row is taken.
    index: [B] int32, the position in the Pass that predicted the token.
    token: [B] int32.
    start: [B] int32, the first drafted token: the position after the token.
  """
  rows, kind = jnp.arange(len(index)), model.config.drafter.kind
  if kind == 'medusa':
    states = residuals(model, passed.hidden[rows, index])
  elif kind == 'mtp':
    states = passed.heads[rows, index]
  else:
    _, context = _unpair(passed.cache.k, passed.cache.v)
    start, token = start[:, None], token[:, None]
    states = fill(
      model, token, start, jnp.zeros_like(start), context, passed.cache.labels
    )[:, 0]
  return logits(model, states)


@jax.named_scope('part(logits)')
def logits(model, states):
  """Returns the logits of drafts, [..., n, V] float32, from [..., n, D]."""
  if model.config.drafter.kind != 'medusa':
    return model.logits(states)
  heads = model.vocabulary() + model.drafter.vocabulary[...]  # [n, D, V]
  return jnp.einsum(
    '...nd,ndv->...nv',
    states,
    heads.astype(states.dtype),
    preferred_element_type=jnp.float32,
  )


def residuals(model, hidden):
  """Returns x + silu(x W + b) for each head of `medusa`, [..., n, D].

  Args:
    model: Transformer.
    hidden: [..., D].
  """
  w, b = (
    getattr(model.drafter, name)[...].astype(hidden.dtype)
    for name in ('residual', 'bias')
  )
  inner = jnp.einsum('...d,nde->...ne', hidden, w) + b
  return hidden[..., None, :] + jax.nn.silu(inner)


def fill(model, anchors, starts, doc, context, labels):
  """Returns the final hidden states of the masks of `block`, [B, W, n, D].

  Args:
    model: Transformer.
    anchors: [B, W] int32, the token before each window's drafts.
    starts: [B, W] int32, the first drafted token of each window.
    doc: [B, W] int32, the document of each window; -1 hides the window.
    context: keys and values of the clean tokens, [layers, B, G, S, K] each.
    labels: masks.Labels of the clean tokens, [B, S] each.
  """
  c, drafter = model.config, model.drafter
  batch, number = anchors.shape
  anchor = lookup(model.embed[...], anchors, c.dtype)[:, :, None]
  mask = drafter.mask[...].astype(anchor.dtype)
  shape = (batch, number, c.drafter.drafts, c.embed)
  x = jnp.concatenate([anchor, jnp.broadcast_to(mask, shape)], axis=2)
  x = x.reshape(batch, -1, c.embed)
  window = masks.windows(doc, starts, c.drafter.length)
  rotation = _rotation(c, window)

  def layer(x, xs):
    weights, k, v = xs
    attention = lambda q, own_k, own_v: _attend(
      c.drafter.length, q, own_k, own_v, window, k, v, labels
    )
    return block(c, weights, x, rotation, attention)[0], None

  if c.remat != 'none':
    layer = jax.checkpoint(layer, prevent_cse=False)
  weights = stacked(drafter.blocks, c.dtype)
  x, _ = jax.lax.scan(layer, x, (weights, *context))
  x = rms_norm(x, drafter.norm[...], c.norm_eps)
  return x.reshape(batch, number, c.drafter.length, c.embed)[:, :, 1:]


def _attend(length, q, k, v, window, clean_k, clean_v, clean):
  """Returns attend_cached of windows, in pieces of at most QUERIES positions.

  A window sees no other window, so that the result is the same, and the scores
  of all windows of a training row are never in memory at once.
  """
  size, total = max(QUERIES // length, 1) * length, q.shape[2]
  if total <= size:
    return attend_cached(q, k, v, window, clean_k, clean_v, clean)

  def pieces(x, axis, value=0):
    added = [(0, -total % size if a == axis else 0) for a in range(x.ndim)]
    x = jnp.pad(x, added, constant_values=value)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

  @jax.checkpoint
  def piece(xs):
    q, k, v, window = xs
    return attend_cached(q, k, v, window, clean_k, clean_v, clean)

  of_window = jax.tree.map(lambda x: pieces(x, 1, -1), window)
  out = jax.lax.map(piece, (*(pieces(x, 2) for x in (q, k, v)), of_window))
  out = jnp.moveaxis(out, 0, 2)
  return out.reshape(*q.shape[:2], -1, q.shape[3])[:, :, :total]


def _of_drafter(model, tapped, labels, attention, cached=None):
  """Returns the `heads` of a Pass, and keys and values of the drafter."""
  kind = model.config.drafter.kind
  if kind == 'mtp':
    heads, own = _heads(model, tapped[0], labels, attention, cached, keep=True)
    return jnp.moveaxis(heads, 0, 2), own
  if kind == 'block':
    return None, _context(model, tapped, labels)
  return None, None


def _heads(
  model, x, labels, attention, cached=None, keep=False, select=lambda x: x
):
  """Returns the outputs of the heads of `mtp`, and their keys and values.

  Args:
    model: Transformer.
    x: [B, L, D], the input of the network's last layer.
    labels: masks.Labels.
    attention: see Transformer.run.
    cached: see Transformer.run; of the heads.
    keep: see Transformer.run.
    select: function of an output [B, L, D], such as a choice of positions.

  Returns:
    [n, B, L, D], or what `select` makes of it; and as Transformer.run.
  """
  c, drafter = model.config, model.drafter
  rotation = _rotation(c, labels)

  def head(_, xs):
    weights, gain, cached = xs
    own = functools.partial(attention, cached=cached)
    y, kv = block(c, weights, x, rotation, own)
    y = rms_norm(select(y), gain, c.norm_eps)
    return None, (y, kv if keep else None)

  if c.remat != 'none':
    head = jax.checkpoint(head, prevent_cse=False)
  weights = stacked(drafter.blocks, c.dtype)
  _, results = jax.lax.scan(head, None, (weights, drafter.norm[...], cached))
  return results


def _context(model, tapped, labels):
  """Returns keys and values of clean tokens for `block`.

  Args:
    model: Transformer.
    tapped: list of [B, L, D], outputs of layers of the network.
    labels: masks.Labels.

  Returns:
    Two arrays [layers, B, G, L, K].
  """
  c, drafter = model.config, model.drafter
  fuse = drafter.fuse[...].astype(c.dtype)
  x = sum(x @ w for x, w in zip(tapped, fuse, strict=True))
  x = rms_norm(x, drafter.fuse_norm[...], c.norm_eps)
  rotation = _rotation(c, labels)
  of_layer = lambda w: project_kv(c, w, x, rotation)
  return jax.lax.map(of_layer, stacked(drafter.blocks, c.dtype))


def _rotation(c, labels):
  return rope(labels.pos, c.head_dim, c.rope_theta, c.rope_scaling)


def _pair(kv, own):
  """Returns k and v of a Cache: of the network, or pairs with the drafter's."""
  return kv if own is None else tuple(zip(kv, own, strict=True))


def _unpair(k, v):
  """Returns (k, v) of the network and of the drafter, which may be None."""
  if not isinstance(k, tuple):
    return (k, v), None
  return tuple(zip(k, v, strict=True))
