"""JAX's Pallas splash attention kernel, with the visibility rule of masks.py.

The kernel never holds [B, H, L, S] scores. It skips a tile of queries and keys
if no query of the tile sees any of its keys. The skipped tiles are computed
before compilation, so they depend only on a masks.Regime. Documents and padding
may differ between rows; the kernel compares them inside the tiles.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask_info as splash_mask_info,
)
from jax.sharding import PartitionSpec as P

from maskdiff.model import masks

# Name of the kernel's residuals in remat policies.
RESIDUALS = 'attended'
# Tile sizes are multiples of this, and the head dimension is padded to one.
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tile:
  """Queries and keys per tile; `compute` keys are scored at once."""

  queries: int
  keys: int
  compute: int


# Tiles of the forward and of the backward kernel, by chip name (chips.py). The
# forward kernel fits into 16 MiB of VMEM, the default limit of a kernel. The
# backward kernel holds the sums of dk and dv of all keys of a tile, so it needs
# the larger limit that distributed/compiler.py sets for these chips. Large key
# tiles pay because the kernel writes one partial dq per key tile, and XLA adds
# them up. With 4096 keys per tile, a row of up to 4096 has a single dq.
LARGE = Tile(1024, 2048, 512), Tile(1024, 4096, 512)
TILES = {'v5p': LARGE, 'v5e': LARGE, 'v6e': LARGE}
# For other chips and for loaded masks. It fits into 16 MiB even in float32 and
# with the mask of a tile, which takes two buffers of 4 bytes per score.
SMALL = Tile(512, 1024, 512)
# Above this number of partial dq, a separate kernel computes dq. It repeats two
# of five matrix products, but memory does not grow with the square of L.
MAX_PARTIAL_DQ = 8


@dataclasses.dataclass(frozen=True)
class RuleMask(splash_mask.Mask):
  """The visibility rule for a row of one document, evaluated by slices.

  The kernel loads this mask for the tiles that are neither full nor empty.
  """

  regime: masks.Regime
  length: int

  @property
  def shape(self):
    return self.length, self.length

  def __getitem__(self, index):
    query, key = (self._labels(positions) for positions in index)
    return masks.visible(query, key)[0]

  def _labels(self, positions):
    row = masks.row(self.regime, self.length)
    return jax.tree.map(lambda x: x[:, positions], row)


class CleanMask(RuleMask):
  """A RuleMask whose keys are all clean and in order, as in causal regimes.

  The rule is then `key.pos < query.reach`. The kernel evaluates it inside a
  tile instead of loading a mask; it reads `mask_function` and `q_sequence`.
  """

  @staticmethod
  def mask_function(reach, pos):
    return pos < reach

  @property
  def q_sequence(self):
    return masks.row(self.regime, self.length).reach[0]

  def __getitem__(self, index):
    queries, keys = index
    reach, pos = self.q_sequence[queries], np.arange(self.length)[keys]
    return self.mask_function(reach[:, None], pos[None])


def make_mask(regime, length):
  """Returns the splash mask of a regime for rows of L positions, [L, L]."""
  if regime == masks.BIDIRECTIONAL:
    return splash_mask.FullMask((length, length))
  row = masks.row(regime, length)
  in_order = (row.block < 0).all() and (row.pos == np.arange(length)).all()
  return (CleanMask if in_order else RuleMask)(regime, length)


def block_sizes(mask, queries, keys, chip):
  """Returns tile sizes that divide the lengths and fit the chip.

  Args:
    mask: from `make_mask`.
    queries: number of queries on one device, a multiple of LANES.
    keys: number of keys, L, a multiple of LANES.
    chip: name in chips.py, or None.
  """
  forward, backward = TILES.get(chip, (SMALL, SMALL))
  if type(mask) is RuleMask:
    forward = backward = SMALL
  forward = _fit(forward, queries, keys)
  backward = _fit(backward, queries, keys)
  fused = keys // backward.keys <= MAX_PARTIAL_DQ
  return splash_kernel.BlockSizes(
    block_q=forward.queries,
    block_kv=forward.keys,
    block_kv_compute=forward.compute,
    block_q_dkv=backward.queries,
    block_kv_dkv=backward.keys,
    block_kv_dkv_compute=backward.compute,
    block_q_dq=None if fused else backward.queries,
    block_kv_dq=None if fused else backward.compute,
    use_fused_bwd_kernel=fused,
  )


def _fit(tile, queries, keys):
  size = _divisor(keys, tile.keys)
  return Tile(
    _divisor(queries, tile.queries), size, _divisor(size, tile.compute)
  )


def _divisor(length, limit):
  """Returns the largest multiple of LANES <= limit that divides the length."""
  return max(
    size
    for size in range(LANES, min(length, limit) + 1, LANES)
    if length % size == 0
  )


def make_kernel(regime, length, parts=1, chip=None, interpret=False):
  """Returns the kernel for one row; it runs inside or outside of shard_map.

  Args:
    regime: masks.Regime.
    length: L.
    parts: number of parts into which a mesh axis splits the queries of a row.
    chip: name in chips.py, or None.
    interpret: emulate the kernel in Python on any device, for tests.

  Returns:
    A SplashAttentionKernel. It is a tree of arrays that describe the tiles, and
    shard_map splits it by `split_spec`. All heads share one mask.
  """
  mask = make_mask(regime, length)
  sizes = block_sizes(mask, length // parts, length, chip)
  # Same as splash_kernel.make_splash_mha, except that the grid does not shrink
  # to the tiles in use if the queries are split. In that case shrinking fails
  # if all tiles are full or empty, and it does not speed up the device with the
  # most tiles. The kernel skips empty tiles anyway.
  whole, fused = parts == 1, sizes.use_fused_bwd_kernel

  def tiles(process, queries, keys, shrink_grid):
    info, mask_function = process(
      splash_mask.MultiHeadMask([mask]),
      (queries, keys),
      q_seq_shards=parts,
      shrink_grid=shrink_grid,
    )
    return jax.tree.map(jnp.asarray, info), mask_function

  of_queries = splash_mask_info.process_mask
  of_keys = splash_mask_info.process_mask_dkv
  forward, mask_function = tiles(
    of_queries, sizes.block_q, sizes.block_kv, whole
  )
  dq = None
  if not fused:
    dq, _ = tiles(of_queries, sizes.block_q_dq, sizes.block_kv_dq, whole)
  dkv, _ = tiles(
    of_keys, sizes.block_q_dkv, sizes.block_kv_dkv, whole and not fused
  )
  return splash_kernel.SplashAttentionKernel(
    forward,
    dq,
    dkv,
    block_sizes=sizes,
    is_mqa=False,  # this form includes grouped-query attention
    save_residuals=False,
    mask_value=splash_kernel.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=RESIDUALS,
    mask_function=mask_function,
    interpret=interpret,
  )


def split_spec(kernel, axis):
  """Returns shard_map specs of a kernel whose queries are split over `axis`."""
  tiles = P(None, axis)
  specs = splash_mask_info.MaskInfo(tiles, tiles, tiles, P(), P(axis))

  def spec(info):
    return info and splash_mask_info.MaskInfo(
      *(x if x is None else s for x, s in zip(info, specs, strict=True))
    )

  return splash_kernel.SplashAttentionKernel(
    spec(kernel.fwd_mask_info),
    spec(kernel.dq_mask_info),
    spec(kernel.dkv_mask_info),
    **kernel.kwargs,
  )


@jax.named_scope('network(attention besides kernel)')
def run(kernel, q, k, v, doc_q, doc_k):
  """Runs the kernel on the rows and heads of one device.

  Args:
    kernel: from `make_kernel`; inside shard_map, the device's part of it.
    q: [B, H, L, K].
    k: [B, G, S, K]; G divides H.
    v: [B, G, S, K].
    doc_q: [B, L] int32, Labels.doc of the queries.
    doc_k: [B, S] int32, Labels.doc of the keys.

  Returns:
    [B, H, L, K] in the dtype of q.
  """
  head_dim = q.shape[-1]
  # The kernel does not scale the scores. Zero padding of the head dimension
  # does not change them.
  q = (q.astype(jnp.float32) / math.sqrt(head_dim)).astype(q.dtype)
  padding = [(0, 0), (0, 0), (0, 0), (0, -head_dim % LANES)]
  q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
  segments = splash_kernel.SegmentIds(doc_q, doc_k)
  return jax.vmap(kernel)(q, k, v, segments)[..., :head_dim]
