"""A pre-norm Transformer: rotary positions, SwiGLU, grouped-query attention.

Three things are unusual. Attention takes `masks.Labels` instead of a mask, and
is bidirectional for masked diffusion. The network does not see the time t,
because the optimal denoiser does not depend on it (LLaDA, arXiv 2502.09992,
eq. 11). The forward pass ends at the hidden states, because the loss projects
only the masked positions onto the vocabulary.

A weight is declared once, in `Transformer` or `Blocks`: shape, logical axes
and initial scale. Shardings, decay masks and parameter counts derive from the
declaration. Outside of this file parameters are a plain tree of arrays: `init`
draws one, `shapes` and `axes` describe it, and `bind` turns it back into a
module inside jit.

Letters: B batch, L length, D embed, H heads, G kv heads, K head dim, F mlp,
V vocab, N layers.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from maskdiff.distributed.mesh import shard
from maskdiff.model import lora
from maskdiff.model.attention import RESIDUALS, attend
from maskdiff.model.cache import Cache, write
from maskdiff.model.cached_attention import attend_cached
from maskdiff.model.layers import block, lookup, rms_norm, rope, shift_right
from maskdiff.model.lora import LoraConfig

_save = jax.checkpoint_policies.save_only_these_names
# Each policy names the activations of a layer that are saved for the backward
# pass, in addition to the input of the layer. The others are recomputed. The
# splash kernel runs again only under `full`, the cuDNN kernel under every
# policy except `none`.
REMAT_POLICIES = {
  'none': None,
  'minimal': _save('q', 'k', 'v', RESIDUALS, 'middle', 'gate', 'up'),
  'attention': _save('q', 'k', 'v', RESIDUALS),
  'attended': _save(RESIDUALS),
  # Saves the arrays of `attention`, but in host memory.
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
  """Sizes and options of a Transformer; hashable, so jit can take it static."""

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
  attention: str  # auto, xla, splash or cudnn
  qkv_bias: bool = False  # biases of queries, keys and values (Qwen2, Dream)
  qk_norm: bool = False  # RMS norm of queries and keys per head (Qwen3)
  zero_outputs: bool = False  # at initialization, `o` and `down` are 0
  # The output at a position predicts the next token. Dream starts from an
  # autoregressive network, so its diffusion model predicts in this way too.
  predict_next: bool = False
  # () or the arguments of layers.scale_frequencies (Llama 3.1): factor,
  # low_freq_factor, high_freq_factor, original context length
  rope_scaling: tuple[float, ...] = ()
  lora: LoraConfig = LoraConfig()  # adapters


def from_config(config):
  """Returns the TransformerConfig of a run's config, with its adapters."""
  adapters = LoraConfig(**config.lora) if config.lora.rank else LoraConfig()
  return TransformerConfig(**config.model, lora=adapters)


def weight(rngs, shape, axes, std):
  """Declares a weight, initialized to std times a normal cut to [-3, 3]."""
  value = std * jax.random.truncated_normal(rngs.params(), -3, 3, shape)
  return nnx.Param(value, axes=axes)


def scale(shape, axes):
  """Declares the gain of an RMS norm, initialized to 1."""
  return nnx.Param(jnp.ones(shape), axes=axes)


def zeros(shape, axes):
  """Declares a bias, initialized to 0."""
  return nnx.Param(jnp.zeros(shape), axes=axes)


class Blocks(nnx.Module):
  """The weights of all N layers, stacked on a leading axis."""

  def __init__(self, c, rngs):
    N, D, H, G = c.layers, c.embed, c.heads, c.kv_heads
    K, F = c.head_dim, c.mlp
    into = D**-0.5
    out = 0.0 if c.zero_outputs else (2 * N) ** -0.5
    vector = ('layers', 'embed')
    kv = ('layers', 'embed', 'kv_heads', 'head_dim')
    self.norm1 = scale((N, D), vector)
    self.q = weight(
      rngs, (N, D, H, K), ('layers', 'embed', 'heads', 'head_dim'), into
    )
    self.k = weight(rngs, (N, D, G, K), kv, into)
    self.v = weight(rngs, (N, D, G, K), kv, into)
    if c.qkv_bias:  # flat, like vectors: neither sharded nor decayed
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
    for matrix in c.lora.matrices:
      self._add_adapters(matrix, c.lora.rank, rngs)

  def _add_adapters(self, matrix, rank, rngs):
    """Declares the adapters of a matrix; their product is 0."""
    of = getattr(self, matrix)
    layers, *sizes = of[...].shape
    inputs, outputs = lora.split_axes(matrix, sizes)
    of_inputs, of_outputs = lora.split_axes(matrix, of.axes[1:])
    a = weight(
      rngs,
      (layers, *inputs, rank),
      ('layers', *of_inputs, 'rank'),
      (3 * math.prod(inputs)) ** -0.5,  # as PEFT, which draws uniformly
    )
    b = zeros((layers, rank, *outputs), ('layers', 'rank', *of_outputs))
    setattr(self, f'{matrix}_a', a)
    setattr(self, f'{matrix}_b', b)


class Transformer(nnx.Module):
  """The network; `bind` makes one from a parameter tree."""

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
      [B, L, D] in the compute dtype, after the final RMS norm. The hidden
      state at a position predicts the token of that position. A network with
      `predict_next` predicts the next token, so its states are shifted by one.
    """
    hidden, _ = self._layers(tokens, labels, self._attend(labels))
    return hidden

  def prefill(self, tokens, labels):
    """Returns the final hidden states, [B, L, D], and a Cache of L places.

    Arguments and hidden states as for `__call__`.
    """
    hidden, (k, v) = self._layers(
      tokens, labels, self._attend(labels), keep=True
    )
    return hidden, Cache(k, v, labels)

  def extend(self, tokens, labels, cache):
    """Returns the hidden states of windows that attend to a cache.

    With `predict_next`, the window must contain the position before each
    position whose hidden state is used.

    Args:
      tokens: [B, W] int32, the tokens of the windows.
      labels: masks.Labels of the window; doc is -1 on its padding.
      cache: Cache, which does not change. The positions of the window must be
        hidden in `cache.labels`, because their cached keys are out of date.

    Returns:
      [B, W, D], as for `__call__`.
    """
    hidden, _ = self._window(tokens, labels, cache, keep=False)
    return hidden

  def append(self, tokens, labels, cache, places):
    """Computes windows as `extend` does, and stores their keys and values.

    Args:
      tokens: as for `extend`.
      labels: as for `extend`.
      cache: as for `extend`.
      places: [B, W] int32, the place of the cache for each position; see
        `cache.write`.

    Returns:
      [B, W, D], as for `extend`; and the Cache that includes the window.
    """
    hidden, (k, v) = self._window(tokens, labels, cache, keep=True)
    return hidden, write(cache, places, k, v, labels)

  def _attend(self, labels):
    implementation = self.config.attention
    return lambda q, k, v, cached: attend(
      q, k, v, labels, labels, implementation
    )

  def _window(self, tokens, labels, cache, keep):
    def attention(q, k, v, cached):
      return attend_cached(q, k, v, labels, *cached, cache.labels)

    return self._layers(tokens, labels, attention, (cache.k, cache.v), keep)

  def _layers(self, tokens, labels, attention, cached=None, keep=False):
    """Returns hidden states and, with `keep`, the keys and values per layer."""
    c = self.config
    with jax.named_scope('network(embedding)'):
      x = lookup(self.embed[...], tokens, c.dtype)
      x = shard(x, 'batch', 'length', 'embed')  # [B, L, D]
    rotation = rope(labels.pos, c.head_dim, c.rope_theta, c.rope_scaling)
    # Matrices are cast before the scan, so that a mesh gathers the weights of
    # each layer in the compute dtype.
    with jax.named_scope('part(weights: cast and copy)'):
      layers = jax.tree.map(
        lambda w: w.astype(c.dtype) if w.ndim > 2 else w,
        nnx.to_pure_dict(nnx.state(self.blocks)),
      )

    def layer(x, xs):
      weights, cached = xs
      x, kv = block(
        c, weights, x, rotation, functools.partial(attention, cached=cached)
      )
      return x, kv if keep else None

    if c.remat != 'none':
      layer = jax.checkpoint(
        layer, policy=REMAT_POLICIES[c.remat], prevent_cse=False
      )
    with jax.named_scope('network(layer: stacked arrays)'):
      x, kv = jax.lax.scan(layer, x, (layers, cached))
    x = rms_norm(x, self.norm[...], c.norm_eps)
    return shift_right(x, labels) if c.predict_next else x, kv

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


def init(config, key):
  """Returns freshly drawn parameters: a dict tree of float32 arrays.

  Adapters are float32, and the base has the dtype `config.lora.base_dtype`.
  """
  network = Transformer(config, nnx.Rngs(params=key))
  return lora.cast_base(config.lora, nnx.to_pure_dict(nnx.state(network)))


@functools.lru_cache(maxsize=8)
def _declaration(config):
  module = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0)))
  return nnx.split(module)


def shapes(config):
  """Returns the parameter tree with a ShapeDtypeStruct for each array."""
  tree = nnx.to_pure_dict(_declaration(config)[1])
  return jax.eval_shape(functools.partial(lora.cast_base, config.lora), tree)


def axes(config):
  """Returns the parameter tree with a tuple of logical axes for each array."""
  named = jax.tree.map(
    lambda p: p.axes,
    _declaration(config)[1],
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  )
  return nnx.to_pure_dict(named)


def bind(config, params):
  """Returns the Transformer that computes with these parameters."""
  definition, state = _declaration(config)
  # A copy, so that the cached declaration keeps its shapes.
  state = jax.tree.map(lambda x: x, state)
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(definition, state)


def num_params(config):
  """Returns the number of parameters: (all, without embedding and head)."""
  count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  tree = shapes(config)
  total = count(tree)
  vocabulary = count([tree['embed'], tree.get('head', [])])
  return total, total - vocabulary


def num_adapter_params(config):
  """Returns the number of parameters of the adapters, 0 without adapters."""
  blocks = shapes(config)['blocks']
  return sum(x.size for name, x in blocks.items() if name in lora.ADAPTERS)
