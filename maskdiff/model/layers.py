"""The parts of a Transformer layer as functions of weights and activations.

transformer.py lists the letters of the shapes (B, L, D, ...).
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from maskdiff.distributed.mesh import (
  BATCH_AXES,
  STATE_AXES,
  attention_axes,
  pad_length,
  shard,
)
from maskdiff.model import lora, masks, ntk


@jax.named_scope('network(layer: elementwise)')
def block(c, w, x, rotation, attention):
  """Applies one Transformer layer: attention, then the MLP.

  Args:
    c: TransformerConfig.
    w: dict, the weights of transformer.Blocks without the leading axis.
    x: [B, L, D].
    rotation: from `rope`.
    attention: (q [B, H, L, K], k, v [B, G, L, K]) -> [B, H, L, K].

  Returns:
    [B, L, D] in the dtype of x; and (k, v), for the KV cache.
  """
  project = functools.partial(lora.project, c.lora, w)
  h = rms_norm(x, w['norm1'], c.norm_eps)
  q, k, v = project_qkv(c, w, h, rotation)
  # Once more for the attention, so that gradients are moved back before they
  # reach the products.
  of_queries, of_keys = attention_axes(c.heads, c.kv_heads)
  q = shard(q, 'batch', 'heads', 'length', 'head_dim')
  k, v = (shard(x, 'batch', 'kv_heads', 'length', 'head_dim') for x in (k, v))
  q = checkpoint_name(shard(q, *of_queries), 'q')
  k = checkpoint_name(shard(k, *of_keys), 'k')
  v = checkpoint_name(shard(v, *of_keys), 'v')
  # Any query may attend to any key. What the backward pass saves is split.
  whole = lambda x: shard(x, *of_keys[:2], None, 'head_dim')
  with jax.named_scope('network(attention)'):
    attended = attention(q, whole(k), whole(v))
  attended = shard(attended, 'batch', 'heads', 'length', 'head_dim')
  with jax.named_scope('network(attention output)'):
    x = x + project('o', 'bhlk,hkd->bld', attended)
  x = checkpoint_name(shard(x, 'batch', 'length', 'embed'), 'middle')

  h = rms_norm(x, w['norm2'], c.norm_eps)
  with jax.named_scope('network(mlp gate/up)'):
    gate = checkpoint_name(project('gate', 'bld,df->blf', h), 'gate')
    up = checkpoint_name(project('up', 'bld,df->blf', h), 'up')
  with jax.named_scope('network(mlp activation)'):
    inner = shard(jax.nn.silu(gate) * up, 'batch', 'length', 'mlp')
  with jax.named_scope('network(mlp down)'):
    x = x + project('down', 'blf,fd->bld', inner)
  return shard(x, 'batch', 'length', 'embed'), (k, v)


def project_qkv(c, w, h, rotation):
  """Returns the queries, keys and values of a layer.

  Args:
    c: TransformerConfig.
    w: the weights of the layer, as for `block`.
    h: [B, L, D], normalised.
    rotation: from `rope`.

  Returns:
    q [B, H, L, K], k [B, G, L, K] and v [B, G, L, K]; q and k are rotated.
  """
  with jax.named_scope('network(attention query)'):
    q = _project_heads(c, w, 'q', 'bld,dhk->bhlk', h)
    q = _normalise_and_rotate(c, w, 'q', q, rotation)
  return q, *project_kv(c, w, h, rotation)


@jax.named_scope('network(attention key/value)')
def project_kv(c, w, h, rotation):
  """Returns keys and values; arguments and results as for `project_qkv`."""
  k = _project_heads(c, w, 'k', 'bld,dgk->bglk', h)
  k = _normalise_and_rotate(c, w, 'k', k, rotation)
  return k, _project_heads(c, w, 'v', 'bld,dgk->bglk', h)


def _project_heads(c, w, name, equation, h):
  x = lora.project(c.lora, w, name, equation, h)
  if not c.qkv_bias:
    return x
  return x + w[f'{name}_bias'].astype(x.dtype).reshape(-1, 1, c.head_dim)


def _normalise_and_rotate(c, w, name, x, rotation):
  x = rms_norm(x, w[f'{name}_norm'], c.norm_eps) if c.qk_norm else x
  with jax.named_scope('network(rotary positions)'):
    return rotate(x, rotation)


def shift_right(x, labels):
  """Moves the hidden state of each position to the next position.

  A network with `predict_next` predicts a token from the position before it.
  After the shift a position holds the hidden state that predicts its own token.
  The previous position has the same document, the preceding `pos`, and the same
  noisy block, or it is clean. It is the left neighbour, except for the first
  position of a noisy block in [noisy ; clean] rows: its previous position is
  the last of the block before it in the clean copy. A sampler reads the first
  token of a block from the same hidden state, when the block before it is
  complete. Fast-dLLM v2 trains with the noisy copy's, which has not seen the
  last clean block.

  A position without a previous position keeps its own hidden state, such as the
  first of a document (as in Dream's generation_utils.py).

  Args:
    x: [B, L, D].
    labels: masks.Labels.

  Returns:
    [B, L, D].
  """
  left = lambda a: jnp.concatenate([a[:, :1], a[:, :-1]], axis=1)

  def follows(previous, labels):
    return (
      (labels.doc == previous.doc)
      & ((previous.block == -1) | (labels.block == previous.block))
      & (labels.pos == previous.pos + 1)
    )[..., None]

  previous = jax.tree.map(left, labels)
  shifted = jnp.where(follows(previous, labels), left(x), x)
  if not masks.has_clean_copy(labels):
    return shifted
  half = x.shape[1] // 2
  noisy = jax.tree.map(lambda a: a[:, :half], labels)
  clean = jax.tree.map(lambda a: a[:, half:], labels)
  starts = (noisy.block != left(noisy.block))[..., None]
  starts &= follows(jax.tree.map(left, clean), noisy)
  from_clean = jnp.where(starts, left(x[:, half:]), shifted[:, :half])
  return jnp.concatenate([from_clean, shifted[:, half:]], axis=1)


@jax.named_scope('network(normalisation)')
def rms_norm(x, gain, eps):
  """Returns x / rms(x) * gain over the last axis.

  The computation is in float32; the result has the dtype of x.
  """
  f = x.astype(jnp.float32)
  f *= jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + eps)
  return (f * gain).astype(x.dtype)


@jax.named_scope('network(rotary positions)')
def rope(pos, head_dim, theta, scaling=()):
  """Returns cosines and sines of rotary position embedding (arXiv 2104.09864).

  Args:
    pos: [B, L] int32.
    head_dim: K.
    theta: base of the wavelengths.
    scaling: TransformerConfig.rope_scaling.

  Returns:
    A pair of [B, 1, L, K] float32: the cosines, repeated in both halves, and
    the sines, negated in the first half.
  """
  if len(scaling) == 2:
    theta = ntk.scaled_theta(theta, head_dim, *scaling)
  frequency = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
  if len(scaling) == 4:
    frequency = scale_frequencies(frequency, *scaling)
  angle = pos[:, None, :, None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  join = functools.partial(jnp.concatenate, axis=-1)
  return join([cos, cos]), join([-sin, sin])


def scale_frequencies(frequency, factor, low, high, length):
  """Scales rotary frequencies for longer contexts, as Llama 3.1 does.

  A frequency that makes fewer than `low` revolutions over the original context
  is divided by `factor`. One that makes more than `high` is unchanged. Between
  the two limits the two results are interpolated. No paper describes the rule;
  it is taken from the published code.

  Args:
    frequency: [K/2], radians per position.
    factor: number.
    low: revolutions.
    high: revolutions.
    length: tokens of the original context.

  Returns:
    [K/2], radians per position.
  """
  revolutions = length * frequency / (2 * jnp.pi)
  unchanged = jnp.clip((revolutions - low) / (high - low), 0, 1)
  return frequency * (unchanged + (1 - unchanged) / factor)


@jax.custom_vjp
def rotate(x, rotation):
  """Rotates pairs (i, i + K/2) of the last axis in float32; x is [B, H, L, K].

  This is the rotate-half convention of Llama and LLaDA. A product with a
  permutation matrix swaps the halves, because slices of half of the 128 lanes
  of a TPU are slow. The product is exact, since every sum has one nonzero term.
  The gradient is the inverse rotation, written by hand: autodiff would compute
  the product in float32.
  """
  cos, sin = rotation
  half = x.shape[-1] // 2
  swap = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=1)
  swapped = jnp.einsum(
    'bhlk,kj->bhlj',
    x,
    swap,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def _rotate_forward(x, rotation):
  return rotate(x, rotation), rotation


def _rotate_backward(rotation, d_x):
  cos, sin = rotation
  return rotate(d_x, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table, tokens, dtype):
  """Returns rows of the embedding table in `dtype`, [B, L, D].

  The gradient is summed in float32 whatever the compute dtype: about half of
  the tokens of a batch are the mask token, so the gradient of its row is a sum
  over thousands of positions.

  Args:
    table: [V, D] float32; or of a lower precision, for a model that was loaded
      in it.
    tokens: [B, L] int32.
    dtype: dtype of the result.
  """
  return shard(table.astype(dtype), None, None)[tokens]


def _lookup_forward(table, tokens, dtype):
  # Residuals must be arrays. The empty slice stands for the size of the table.
  return lookup(table, tokens, dtype), (tokens, jnp.zeros_like(table[:, :0]))


def _lookup_backward(dtype, residuals, d_rows):
  del dtype
  tokens, table = residuals
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else mesh.shape['tensor']
  size = table.shape[0] // parts  # vocabulary rows on one device

  def add_up(tokens, d_rows, part):
    local = tokens - part * size
    local = jnp.where(local < 0, size, local)  # out of range: dropped
    zeros = jnp.zeros((size, d_rows.shape[-1]), jnp.float32)
    return zeros.at[local].add(d_rows.astype(jnp.float32), mode='drop')

  def on_device(tokens, d_rows):
    d_table = add_up(tokens, d_rows, jax.lax.axis_index('tensor'))
    d_table = jax.lax.psum_scatter(
      d_table, STATE_AXES, scatter_dimension=1, tiled=True
    )
    # Keeps the reduction in the loop over microbatches, as in cross_entropy.py.
    d_table = jax.lax.optimization_barrier(d_table)
    return jax.lax.psum(d_table, 'replica')

  if mesh.empty:
    return add_up(tokens, d_rows, 0).astype(table.dtype), None
  rows = P(BATCH_AXES, 'sequence')
  d_table = jax.shard_map(
    on_device,
    in_specs=(rows, P(BATCH_AXES, 'sequence', None)),
    out_specs=P('tensor', STATE_AXES),
    # Each device along `tensor` sums its own vocabulary rows, without a psum.
    check_vma=False,
  )(*pad_length(tokens, d_rows))
  return d_table.astype(table.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)
