"""Attention under the visibility rule of masks.py.

`attend` chooses the fastest implementation for the machine; all give the same
answer. `xla` evaluates the rule into a mask and runs anywhere. `splash` is the
Pallas kernel for TPU: it never holds [B, H, L, S] scores, and takes the rule
as a full or causal block mask plus document ids.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)
from jax.sharding import PartitionSpec as P

from maskdiff import masks
from maskdiff.mesh import BATCH_AXES, batch_shards

IMPLEMENTATIONS = ('auto', 'xla', 'splash')
SPLASH_BLOCK = 512
# The kernel's tiles are this wide in the length and in the head dimension.
SPLASH_TILE = 128


def attend(q, k, v, labels, implementation):
  """Softmax attention of every position over the positions it sees.

  Scores are scaled by 1/sqrt(K) and normalised in float32. Consecutive groups
  of H/G query heads share a key head. A position that sees nothing (there is
  none under the constructors of masks.py) would return the mean of all values.

  Args:
    q: [B, L, H, K].
    k: [B, L, G, K], v: [B, L, G, K]; G divides H.
    labels: masks.Labels of the L positions.
    implementation: one of IMPLEMENTATIONS. `auto` is splash on TPU where the
      regime, the length and the mesh suit it, else xla.

  Returns:
    [B, L, H, K] in the dtype of q.
  """
  if implementation == 'auto':
    implementation = 'splash' if _suits_splash(q, k.shape[2], labels) else 'xla'
  return {'xla': xla, 'splash': splash}[implementation](q, k, v, labels)


def _suits_splash(q, groups, labels):
  batch, length, heads, _ = q.shape
  mesh = jax.sharding.get_abstract_mesh()
  suits = (
    _platform(mesh) == 'tpu'
    and labels.regime != masks.GENERAL
    and length % SPLASH_TILE == 0
  )
  if mesh.empty:
    return suits
  tensor = mesh.shape['tensor']
  return (
    suits
    and mesh.shape['sequence'] == 1
    and batch % batch_shards(mesh) == 0
    and heads % tensor == groups % tensor == 0
  )


def _platform(mesh):
  # A mesh of a topology that is not here (ahead-of-time compilation) says what
  # it is made of; otherwise ask the backend.
  kind = '' if mesh.empty else getattr(mesh, 'abstract_device', None)
  kind = getattr(kind, 'device_kind', '') or ''
  return 'tpu' if 'TPU' in kind else jax.default_backend()


def xla(q, k, v, labels):
  """Dense attention; see `attend`. Scores take [B, H, L, L] float32."""
  batch, length, heads, head_dim = q.shape
  groups = k.shape[2]
  q = q.reshape(batch, length, groups, heads // groups, head_dim)
  scores = jnp.einsum(
    'blghk,bsgk->bghls', q, k, preferred_element_type=jnp.float32
  )
  scores *= 1 / math.sqrt(head_dim)
  if labels.regime == masks.BIDIRECTIONAL:
    seen = labels.doc[:, :, None] == labels.doc[:, None, :]
  else:
    seen = masks.visible(labels, labels)
  scores = jnp.where(seen[:, None, None], scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  out = jnp.einsum('bghls,bsgk->blghk', weights, v)
  return out.reshape(batch, length, heads, head_dim)


def splash(q, k, v, labels, interpret=False):
  """Pallas splash attention; see `attend`.

  Args:
    interpret: run the kernel's Python on any machine, to test it.

  Raises:
    ValueError: for a regime that has no splash mask.
  """
  if labels.regime == masks.GENERAL:
    raise ValueError('splash attention needs a bidirectional or causal regime')
  on_device = functools.partial(
    _splash_on_device, regime=labels.regime, interpret=interpret
  )
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return on_device(q, k, v, labels.doc)
  heads = P(BATCH_AXES, None, 'tensor', None)
  return jax.shard_map(
    on_device,
    in_specs=(heads, heads, heads, P(BATCH_AXES, None)),
    out_specs=heads,
    check_vma=False,  # Pallas calls do not say how their outputs vary
  )(q, k, v, labels.doc)


def _splash_on_device(q, k, v, doc, regime, interpret):
  _, length, heads, head_dim = q.shape
  make_mask = {
    masks.BIDIRECTIONAL: splash_mask.FullMask,
    masks.CAUSAL: splash_mask.CausalMask,
  }[regime]
  block = math.gcd(length, SPLASH_BLOCK)
  # Despite its name it serves grouped key heads too.
  kernel = splash_kernel.make_splash_mha(
    splash_mask.MultiHeadMask([make_mask((length, length))] * heads),
    block_sizes=splash_kernel.BlockSizes(
      block_q=block,
      block_kv=block,
      block_kv_compute=block,
      block_q_dkv=block,
      block_kv_dkv=block,
      block_kv_dkv_compute=block,
      use_fused_bwd_kernel=True,
    ),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  # The kernel does not scale, and takes [H, L, K] of one row. Zeros that fill
  # a narrow head change no score.
  q = (q.astype(jnp.float32) / math.sqrt(head_dim)).astype(q.dtype)
  fill = [(0, 0), (0, 0), (0, 0), (0, -head_dim % SPLASH_TILE)]
  q, k, v = (jnp.pad(x.swapaxes(1, 2), fill) for x in (q, k, v))
  segments = splash_kernel.SegmentIds(doc, doc)
  out = jax.vmap(kernel)(q, k, v, segments)
  return out[..., :head_dim].swapaxes(1, 2)
