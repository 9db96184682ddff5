"""A pre-norm Transformer: rotary positions, SwiGLU, grouped-query attention.

Three things are unusual. Attention takes `masks.Labels` instead of a mask, and
is bidirectional for masked diffusion. The network does not see the time t,
because the optimal denoiser does not depend on it (LLaDA, arXiv 2502.09992,
eq. 11). The forward pass ends at the hidden states, because the loss projects
only the masked positions onto the vocabulary.

A weight is declared once, in `Transformer`, in `Blocks` or in a drafter: shape,
logical axes and initial scale. Shardings, decay masks and parameter counts
derive from the declaration. Outside of this file parameters are a plain tree of
arrays: `init` draws one, `shapes` and `axes` describe it, and `bind` turns it
back into a module inside jit.

Letters: B batch, L length, D embed, H heads, G kv heads, K head dim, F mlp,
V vocab, N layers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from maskdiff.distributed.mesh import on_one_cpu, shard
from maskdiff.model import lora
from maskdiff.model.attention import RESIDUALS, attend
from maskdiff.model.blocks import Blocks, scale, stacked, weight
from maskdiff.model.cache import Cache, write
from maskdiff.model.cached_attention import attend_cached
from maskdiff.model.drafter import Drafter, DrafterConfig
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
  quantization: str = 'none'  # of the products of the layers; see int8.py
  qkv_bias: bool = False  # biases of queries, keys and values (Qwen2, Dream)
  qk_norm: bool = False  # RMS norm of queries and keys per head (Qwen3)
  zero_outputs: bool = False  # at initialization, `o` and `down` are 0
  # The output at a position predicts the next token. Dream starts from an
  # autoregressive network, so its diffusion model predicts in this way too.
  predict_next: bool = False
  # (); the last arguments of layers.scale_frequencies (Llama 3.1): factor,
  # low_freq_factor, high_freq_factor, original context length; or those of
  # ntk.scaled_theta: tokens of a training row, tokens of the longest row
  rope_scaling: tuple[float, ...] = ()
  lora: LoraConfig = LoraConfig()  # adapters
  drafter: DrafterConfig = DrafterConfig()


def from_config(config):
  """Returns the TransformerConfig of a run's config.

  It includes the adapters, and the drafter of the objective `drafting`.
  """
  adapters = LoraConfig(**config.lora) if config.lora.rank else LoraConfig()
  o, drafter = config.objective, DrafterConfig()
  if config.drafter.kind != 'none':
    frozen = o.autoregressive_weight == 0
    drafter = DrafterConfig(
      **config.drafter, length=o.window_length, frozen=frozen
    )
  return TransformerConfig(**config.model, lora=adapters, drafter=drafter)


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
    if c.drafter.kind != 'none':
      self.drafter = Drafter(c, rngs)

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
    return self.run(tokens, labels, self.attention(labels))[0]

  def prefill(self, tokens, labels):
    """Returns the final hidden states, [B, L, D], and a Cache of L places.

    Arguments and hidden states as for `__call__`.
    """
    hidden, (k, v), _ = self.run(
      tokens, labels, self.attention(labels), keep=True
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
    attention = self.cached_attention(labels, cache.labels)
    return self.run(tokens, labels, attention, (cache.k, cache.v))[0]

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
    attention = self.cached_attention(labels, cache.labels)
    hidden, (k, v), _ = self.run(
      tokens, labels, attention, (cache.k, cache.v), keep=True
    )
    return hidden, write(cache, places, k, v, labels)

  def attention(self, labels):
    """Returns the `attention` of `run` for whole rows with these labels."""
    implementation = self.config.attention
    return lambda q, k, v, cached: attend(
      q, k, v, labels, labels, implementation
    )

  def cached_attention(self, labels, places):
    """Returns the `attention` of `run` for windows that attend to a cache.

    Args:
      labels: masks.Labels of the window.
      places: masks.Labels of the cache.
    """
    return lambda q, k, v, cached: attend_cached(
      q, k, v, labels, *cached, places
    )

  def run(
    self, tokens, labels, attention, cached=None, keep=False, tapped=False
  ):
    """Runs the layers.

    Args:
      tokens: [B, L] int32.
      labels: masks.Labels of the same positions.
      attention: (q, k, v, keys and values of the cache) -> [B, H, L, K].
      cached: keys and values of a cache, [N, B, G, S, K] each; or None.
      keep: whether keys and values are returned.
      tapped: whether the outputs of the layers that the drafter reads are
        returned.

    Returns:
      - the final hidden states, [B, L, D].
      - with `keep`, keys and values, [N, B, G, L, K] each; else None.
      - with `tapped`, a list of outputs [B, L, D]; else [].
    """
    c = self.config
    with jax.named_scope('network(embedding)'):
      x = lookup(self.embed[...], tokens, c.dtype)
      x = shard(x, 'batch', 'length', 'embed')  # [B, L, D]
    rotation = rope(labels.pos, c.head_dim, c.rope_theta, c.rope_scaling)
    taps = c.drafter.taps(c.layers) if tapped else ()
    # Matrices are cast before the scan, so that a mesh gathers the weights of
    # each layer in the compute dtype.
    with jax.named_scope('part(weights: cast and copy)'):
      layers = stacked(self.blocks, c.dtype, c.quantization)

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

    # Outputs that are not read go to the last slot, one over the other.
    slots = [(*taps, i).index(i) for i in range(c.layers)]

    def layer_and_tap(state, xs):
      slot, *xs = xs
      x, kv = layer(state[0], xs)
      put = jax.lax.dynamic_update_index_in_dim
      return (x, put(state[1], x, slot, 0)), kv

    # On one CPU, a loop would take as long to stack the saved activations of
    # all layers, and to read them again, as `full` takes to recompute them. In
    # bfloat16, XLA would round differently if keys and values are returned.
    saved = c.remat == 'none' and c.dtype == 'float32'
    unroll = c.layers if saved and on_one_cpu() else 1
    with jax.named_scope('network(layer: stacked arrays)'):
      if taps:
        outputs = jnp.zeros((len(taps) + 1, *x.shape), x.dtype)
        (x, outputs), kv = jax.lax.scan(
          layer_and_tap, (x, outputs), (np.array(slots), layers, cached)
        )
      else:
        x, kv = jax.lax.scan(layer, x, (layers, cached), unroll=unroll)
    x = rms_norm(x, self.norm[...], c.norm_eps)
    hidden = shift_right(x, labels) if c.predict_next else x
    return hidden, kv, [outputs[taps.index(i)] for i in taps]

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
