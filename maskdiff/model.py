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
from jax.sharding import PartitionSpec as P

from maskdiff.attention import RESIDUALS, attend
from maskdiff.errors import UserError
from maskdiff.mesh import BATCH_AXES, shard
from maskdiff.window_attention import attend_window

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
    x = lookup(self.embed[...], tokens, c.dtype)
    x = shard(x, 'batch', 'length', 'embed')  # [B, L, D]
    rotation = rope(pos, c.head_dim, c.rope_theta, c.rope_scaling)
    # Matrices are cast before the scan, so that what a mesh gathers for each
    # layer is already in the compute dtype.
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
    x, kv = jax.lax.scan(layer, x, (layers, cache))
    return rms_norm(x, self.norm[...], c.norm_eps), kv

  def vocabulary(self):
    """Returns the output projection, [D, V] float32."""
    tied = self.config.tie_embeddings
    return self.embed[...].T if tied else self.head[...]

  def logits(self, hidden):
    """Projects hidden states [..., D] onto the vocabulary, [..., V] float32."""
    head = self.vocabulary().astype(hidden.dtype)
    return jnp.einsum(
      '...d,dv->...v', hidden, head, preferred_element_type=jnp.float32
    )


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
  attended = attention(q, k, v)
  attended = shard(attended, 'batch', 'heads', 'length', 'head_dim')
  x = x + jnp.einsum('bhlk,hkd->bld', attended, w['o'])
  x = checkpoint_name(shard(x, 'batch', 'length', 'embed'), 'middle')

  h = rms_norm(x, w['norm2'], c.norm_eps)
  gate = checkpoint_name(jnp.einsum('bld,df->blf', h, w['gate']), 'gate')
  up = checkpoint_name(jnp.einsum('bld,df->blf', h, w['up']), 'up')
  inner = shard(jax.nn.silu(gate) * up, 'batch', 'length', 'mlp')
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
    return rotate(x, rotation)

  q = turn(project('bld,dhk->bhlk', 'q'), 'q')
  k = turn(project('bld,dgk->bglk', 'k'), 'k')
  return q, k, project('bld,dgk->bglk', 'v')


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


def rms_norm(x, gain, eps):
  """x / rms(x) * gain along the last axis, computed in float32, like x."""
  f = x.astype(jnp.float32)
  f *= jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
  return (f * gain).astype(x.dtype)


def rope(pos, head_dim, theta, scaling=()):
  """Cosines and sines of rotary position embedding (arXiv 2104.09864).

  Args:
    pos: [B, L] int32.
    head_dim: K.
    theta: base of the wavelengths.
    scaling: TransformerConfig.rope_scaling.

  Returns:
    A pair of [B, 1, L, K] float32: the cosines, twice, and the sines, negative
    in the first half.
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
  if scaling:
    frequency = slow_down(frequency, *scaling)
  angle = pos[:, None, :, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  join = functools.partial(jnp.concatenate, axis=-1)
  return join([cos, cos]), join([-sin, sin])


def slow_down(frequency, factor, low, high, length):
  """Llama 3.1's frequencies for contexts longer than the first training.

  Those that turn less than `low` times over the length trained on before are
  divided by the factor, those that turn more than `high` times stay, and in
  between the two are mixed. No paper has the rule, only the published code.

  Args:
    frequency: [K/2], radians per position.
    factor: like the rest, of TransformerConfig.rope_scaling.
    low: turns.
    high: turns.
    length: tokens.
  """
  turns = length * frequency / (2 * jnp.pi)
  keep = jnp.clip((turns - low) / (high - low), 0, 1)
  return frequency * (keep + (1 - keep) / factor)


@jax.custom_vjp
def rotate(x, rotation):
  """Rotates pairs (i, i + K/2) of the last axis in float32; x is [B, H, L, K].

  This is the rotate-half convention of Llama and LLaDA. The halves are swapped
  by a product with a permutation, exact since every sum has one term, because
  K/2 is half of a TPU's lanes and slices of it are slow. The gradient is the
  inverse rotation; left to autodiff that product would be one of float32.
  """
  cos, sin = rotation
  half = x.shape[-1] // 2
  swap = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=1)
  other = jnp.einsum(
    'bhlk,kj->bhlj',
    x,
    swap,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


def _rotate_forward(x, rotation):
  return rotate(x, rotation), rotation


def _rotate_backward(rotation, d_x):
  cos, sin = rotation
  return rotate(d_x, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table, tokens, dtype):
  """Rows of the embedding table in `dtype`, [B, L, D].

  About half of the tokens of a batch are the mask, so the gradient of its row
  is a sum over thousands of positions: it is added up in float32 whatever the
  compute dtype.

  Args:
    table: [V, D] float32.
    tokens: [B, L] int32.
    dtype: of the result.
  """
  return shard(table.astype(dtype), None, None)[tokens]


def _lookup_forward(table, tokens, dtype):
  # The residual only tells the backward pass the size of the table.
  return lookup(table, tokens, dtype), (tokens, jnp.zeros_like(table[:, :0]))


def _lookup_backward(dtype, residuals, d_rows):
  del dtype
  tokens, table = residuals
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape['tensor']
  size = table.shape[0] // parts  # vocabulary rows of this part

  def add_up(tokens, d_rows, part):
    local = tokens - part * size
    local = jnp.where(local < 0, size, local)  # out of range: dropped
    zeros = jnp.zeros((size, d_rows.shape[-1]), jnp.float32)
    return zeros.at[local].add(d_rows.astype(jnp.float32), mode='drop')

  def on_device(tokens, d_rows):
    d_table = add_up(tokens, d_rows, jax.lax.axis_index('tensor'))
    d_table = jax.lax.psum_scatter(
      d_table, 'fsdp', scatter_dimension=1, tiled=True
    )
    # Reduced in every microbatch, as in cross_entropy.py.
    d_table = jax.lax.optimization_barrier(d_table)
    return jax.lax.psum(d_table, ('replica', 'sequence'))

  if mesh.empty:
    return add_up(tokens, d_rows, 0), None
  rows = P(BATCH_AXES, 'sequence')
  d_table = jax.shard_map(
    on_device,
    in_specs=(rows, P(BATCH_AXES, 'sequence', None)),
    out_specs=P('tensor', 'fsdp'),
    check_vma=False,  # the sum over `tensor` is by construction, not by psum
  )(tokens, d_rows)
  return d_table, None


lookup.defvjp(_lookup_forward, _lookup_backward)


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


def flops_per_token(config, length, causal):
  """Matrix-product FLOPs of one training step per token.

  6 per weight that multiplies an activation, the head included, and
  12 N L H K for attention, half of it when causal. Rematerialisation is not
  counted, and the head is counted for every token although the loss skips
  half of them: this is the work of a straightforward step.
  """
  _, inner = num_params(config)
  weights = inner + config.vocab_size * config.embed
  attention = config.layers * length * config.heads * config.head_dim
  return 6 * weights + (6 if causal else 12) * attention
