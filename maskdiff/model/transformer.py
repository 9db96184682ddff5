"""The network: a pre-norm Transformer with rotary positions and SwiGLU.

What is unusual: attention takes `masks.Labels` instead of a mask and is
bidirectional for masked diffusion; the network never sees the time t, since
the best denoiser does not need it (LLaDA, arXiv 2502.09992, eq. 11); and the
forward pass stops at the hidden states, because the loss only projects the
masked positions onto the vocabulary.

A weight is declared once, in `Transformer` or `Blocks`: shape, logical axes
and initial scale. Everything else derives from that. Outside this file
parameters are a plain tree of arrays: `init` makes one, `shapes` and `axes`
describe it, `bind` turns it back into a module inside jit.

Letters: B batch, L length, D embed, H heads, G kv heads, K head dim, F mlp,
V vocab, N layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maskdiff.distributed.mesh import shard
from maskdiff.errors import UserError
from maskdiff.model.attention import RESIDUALS, attend
from maskdiff.model.cached_attention import attend_window
from maskdiff.model.layers import lookup, rms_norm, rope, rotate

_save = jax.checkpoint_policies.save_only_these_names
# What the backward pass finds of a layer besides its input, from everything to
# nothing; the rest is computed again. Only under `full` does that include the
# splash kernel; cuDNN's always runs again.
REMAT_POLICIES = {
  'none': None,
  'minimal': _save('q', 'k', 'v', RESIDUALS, 'middle', 'gate', 'up'),
  'attention': _save('q', 'k', 'v', RESIDUALS),
  'attended': _save(RESIDUALS),
  # As `attention`, in the memory of the host.
  'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=['q', 'k', 'v', RESIDUALS],
    offload_src='device',
    offload_dst='pinned_host',
  ),
  'full': jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
  vocab_size: int
  embed: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  mlp: int
  tie_embeddings: bool
  rope_theta: float
  norm_eps: float
  dtype: str  # of activations and matrix products; parameters are float32
  remat: str  # a key of REMAT_POLICIES
  attention: str  # one of attention.IMPLEMENTATIONS
  qkv_bias: bool = False  # a bias on queries, keys and values (Qwen2, Dream)
  qk_norm: bool = False  # queries and keys normalised by head (Qwen3)
  # The output at a position predicts the next token: a network trained that
  # way, which masked diffusion goes on with (Dream).
  predict_next: bool = False
  # () or Llama 3's (factor, low_freq_factor, high_freq_factor, length before)
  rope_scaling: tuple[float, ...] = ()


def weight(rngs, shape, axes, std):
  """Declares a parameter drawn from a normal cut at 3 standard deviations."""
  value = std * jax.random.truncated_normal(rngs.params(), -3, 3, shape)
  return nnx.Param(value, axes=axes)


def scale(shape, axes):
  """Declares the gain of a normalisation, which starts at 1."""
  return nnx.Param(jnp.ones(shape), axes=axes)


def zeros(shape, axes):
  """Declares a bias, which starts at 0."""
  return nnx.Param(jnp.zeros(shape), axes=axes)


class Blocks(nnx.Module):
  """The weights of all N layers, stacked on a leading axis."""

  def __init__(self, c, rngs):
    N, D, H, G = c.layers, c.embed, c.heads, c.kv_heads
    K, F = c.head_dim, c.mlp
    into, out = D**-0.5, (2 * N) ** -0.5
    vector = ('layers', 'embed')
    kv = ('layers', 'embed', 'kv_heads', 'head_dim')
    self.norm1 = scale((N, D), vector)
    self.q = weight(
      rngs, (N, D, H, K), ('layers', 'embed', 'heads', 'head_dim'), into
    )
    self.k = weight(rngs, (N, D, G, K), kv, into)
    self.v = weight(rngs, (N, D, G, K), kv, into)
    if c.qkv_bias:  # flat: vectors are neither split nor decayed
      self.q_bias = zeros((N, H * K), ('layers', 'heads'))
      self.k_bias = zeros((N, G * K), ('layers', 'kv_heads'))
      self.v_bias = zeros((N, G * K), ('layers', 'kv_heads'))
    if c.qk_norm:
      self.q_norm = scale((N, K), ('layers', 'head_dim'))
      self.k_norm = scale((N, K), ('layers', 'head_dim'))
    self.o = weight(
      rngs,
      (N, H, K, D),
      ('layers', 'heads', 'head_dim', 'embed'),
      out * (H * K) ** -0.5,
    )
    self.norm2 = scale((N, D), vector)
    self.gate = weight(rngs, (N, D, F), ('layers', 'embed', 'mlp'), into)
    self.up = weight(rngs, (N, D, F), ('layers', 'embed', 'mlp'), into)
    self.down = weight(
      rngs, (N, F, D), ('layers', 'mlp', 'embed'), out * F**-0.5
    )


class Transformer(nnx.Module):
  def __init__(self, config, rngs):
    c = self.config = config
    self.embed = weight(
      rngs, (c.vocab_size, c.embed), ('vocab', 'embed'), c.embed**-0.5
    )
    self.blocks = Blocks(c, rngs)
    self.norm = scale((c.embed,), ('embed',))
    if not c.tie_embeddings:
      self.head = weight(
        rngs, (c.embed, c.vocab_size), ('embed', 'vocab'), c.embed**-0.5
      )

  def __call__(self, tokens, labels):
    """Returns the final hidden states.

    Args:
      tokens: [B, L] int32.
      labels: masks.Labels of the same positions.

    Returns:
      [B, L, D] in the compute dtype, after the last normalisation: what a
      position predicts itself from, also where the network has learnt to
      predict the next one.
    """
    hidden, _ = self._layers(tokens, labels.pos, self._attend(labels))
    shifted = self.config.predict_next
    return from_the_left(hidden, labels) if shifted else hidden

  def prefill(self, tokens, labels):
    """As a call, and also returns keys and values, for `extend`.

    Returns:
      hidden [B, L, D]; and the pair of [N, B, G, L, K] in the compute dtype,
      keys rotated.

    Raises:
      UserError: the network predicts the next token: the first prediction of a
        window would stand to the left of it.
    """
    if self.config.predict_next:
      raise UserError(
        'sampling with a cache is not for networks with '
        'config.model.predict_next=True: leave config.sample.cache=none'
      )
    return self._layers(tokens, labels.pos, self._attend(labels), keep=True)

  def extend(self, tokens, pos, there, kept, cache):
    """Hidden states of windows that see themselves and a part of a cache.

    Attention is bidirectional.

    Args:
      tokens: [B, S] int32, of the windows.
      pos: [B, S] int32, their places in the rows that made the cache.
      there: [B, S] bool, False on what is no part of a window.
      kept: [B, L] bool, of the cache; False where a window stands.
      cache: from `prefill`.

    Returns:
      [B, S, D] in the compute dtype.
    """

    def attention(q, k, v, cached):
      return attend_window(q, k, v, there, *cached, kept)

    hidden, _ = self._layers(tokens, pos, attention, cache)
    return hidden

  def _attend(self, labels):
    implementation = self.config.attention
    return lambda q, k, v, cached: attend(q, k, v, labels, implementation)

  def _layers(self, tokens, pos, attention, cache=None, keep=False):
    """Hidden states, and with `keep` the keys and values of all layers."""
    c = self.config
    with jax.named_scope('network(embedding)'):
      x = lookup(self.embed[...], tokens, c.dtype)
      x = shard(x, 'batch', 'length', 'embed')  # [B, L, D]
    rotation = rope(pos, c.head_dim, c.rope_theta, c.rope_scaling)
    # Matrices are cast before the scan, so that what a mesh gathers for each
    # layer is already in the compute dtype.
    with jax.named_scope('part(weights: cast and copy)'):
      layers = jax.tree.map(
        lambda w: w.astype(c.dtype) if w.ndim > 2 else w,
        nnx.to_pure_dict(nnx.state(self.blocks)),
      )

    def layer(x, given):
      weights, cached = given
      x, kv = block(
        c, weights, x, rotation, functools.partial(attention, cached=cached)
      )
      return x, kv if keep else None

    if c.remat != 'none':
      layer = jax.checkpoint(
        layer, policy=REMAT_POLICIES[c.remat], prevent_cse=False
      )
    with jax.named_scope('network(layer: stacked arrays)'):
      x, kv = jax.lax.scan(layer, x, (layers, cache))
    return rms_norm(x, self.norm[...], c.norm_eps), kv

  def vocabulary(self):
    """Returns the output projection, [D, V] float32."""
    tied = self.config.tie_embeddings
    return self.embed[...].T if tied else self.head[...]

  @jax.named_scope('part(logits)')
  def logits(self, hidden):
    """Projects hidden states [..., D] onto the vocabulary, [..., V] float32."""
    head = self.vocabulary().astype(hidden.dtype)
    return jnp.einsum(
      '...d,dv->...v', hidden, head, preferred_element_type=jnp.float32
    )


@jax.named_scope('network(layer: elementwise)')
def block(c, w, x, rotation, attention):
  """One layer.

  Args:
    c: TransformerConfig.
    w: the layer's weights, as in Blocks without the leading axis.
    x: [B, L, D].
    rotation: from `rope`.
    attention: (q [B, H, L, K], k, v [B, G, L, K]) -> [B, H, L, K].

  Returns:
    [B, L, D], like x; and the pair of k and v.
  """
  h = rms_norm(x, w['norm1'], c.norm_eps)
  q, k, v = project_qkv(c, w, h, rotation)
  q = checkpoint_name(shard(q, 'batch', 'heads', 'length', 'head_dim'), 'q')
  # Keys and values are whole along the length: every query may see them.
  k = checkpoint_name(shard(k, 'batch', 'kv_heads', None, 'head_dim'), 'k')
  v = checkpoint_name(shard(v, 'batch', 'kv_heads', None, 'head_dim'), 'v')
  with jax.named_scope('network(attention)'):
    attended = attention(q, k, v)
  attended = shard(attended, 'batch', 'heads', 'length', 'head_dim')
  with jax.named_scope('network(attention output)'):
    x = x + jnp.einsum('bhlk,hkd->bld', attended, w['o'])
  x = checkpoint_name(shard(x, 'batch', 'length', 'embed'), 'middle')

  h = rms_norm(x, w['norm2'], c.norm_eps)
  with jax.named_scope('network(mlp gate/up)'):
    gate = checkpoint_name(jnp.einsum('bld,df->blf', h, w['gate']), 'gate')
    up = checkpoint_name(jnp.einsum('bld,df->blf', h, w['up']), 'up')
  with jax.named_scope('network(mlp activation)'):
    inner = shard(jax.nn.silu(gate) * up, 'batch', 'length', 'mlp')
  with jax.named_scope('network(mlp down)'):
    x = x + jnp.einsum('blf,fd->bld', inner, w['down'])
  return shard(x, 'batch', 'length', 'embed'), (k, v)


def project_qkv(c, w, h, rotation):
  """Queries, keys and values of a layer.

  Args:
    c: TransformerConfig.
    w: the layer's weights, as for `block`.
    h: [B, L, D], normalised.
    rotation: from `rope`.

  Returns:
    q [B, H, L, K], k [B, G, L, K] and v [B, G, L, K], q and k rotated.
  """

  def project(equation, name):
    x = jnp.einsum(equation, h, w[name])
    if not c.qkv_bias:
      return x
    return x + w[f'{name}_bias'].astype(x.dtype).reshape(-1, 1, c.head_dim)

  def turn(x, name):
    x = rms_norm(x, w[f'{name}_norm'], c.norm_eps) if c.qk_norm else x
    with jax.named_scope('network(rotary positions)'):
      return rotate(x, rotation)

  with jax.named_scope('network(attention query)'):
    q = turn(project('bld,dhk->bhlk', 'q'), 'q')
  with jax.named_scope('network(attention key/value)'):
    k = turn(project('bld,dgk->bglk', 'k'), 'k')
    v = project('bld,dgk->bglk', 'v')
  return q, k, v


def from_the_left(x, labels):
  """Puts what a position says of the next one there.

  The first position of a document keeps its own: it is the only one that may
  say something of it. Dream's generation_utils.py does so at position 0.

  Args:
    x: [B, L, D].
    labels: masks.Labels.
  """
  left = lambda a: jnp.concatenate([a[:, :1], a[:, :-1]], axis=1)
  continues = labels.doc == left(labels.doc)
  return jnp.where(continues[..., None], left(x), x)


def init(config, key):
  """Returns freshly drawn parameters: a dict tree of float32 arrays."""
  return nnx.to_pure_dict(nnx.state(Transformer(config, nnx.Rngs(params=key))))


@functools.lru_cache(maxsize=8)
def _declaration(config):
  module = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0)))
  return nnx.split(module)


def shapes(config):
  """The parameter tree with ShapeDtypeStructs for arrays."""
  return nnx.to_pure_dict(_declaration(config)[1])


def axes(config):
  """The parameter tree with tuples of logical axis names for arrays."""
  named = jax.tree.map(
    lambda p: p.axes,
    _declaration(config)[1],
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  )
  return nnx.to_pure_dict(named)


def bind(config, params):
  """Returns the Transformer that computes with these parameters."""
  definition, state = _declaration(config)
  state = jax.tree.map(lambda x: x, state)  # a copy: the cached one stays bare
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(definition, state)


def num_params(config):
  """Number of parameters: (all, without embedding and head)."""
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  tree = shapes(config)
  everything = count(tree)
  vocabulary = count([tree['embed'], tree.get('head', [])])
  return everything, everything - vocabulary
