"""The Pallas splash kernel of JAX, for the visibility rule of masks.py.

The kernel never holds [B, H, L, S] scores, and skips a tile of queries and
keys where no query sees any key. Which tiles those are is worked out while
compiling, so they follow from a masks.Regime; documents and padding may differ
from row to row and are compared inside the tiles.
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

# What the backward pass needs of the forward pass, by name for remat policies.
RESIDUALS = 'attended'
# Tiles are multiples of this, and the head dimension is filled up to it.
LANES = 128


@dataclasses.dataclass(frozen=True)
class Tile:
  """Queries and keys of a tile; scores of `compute` keys are in flight."""

  queries: int
  keys: int
  compute: int


# Of the forward and of the backward kernel, by the name of a chip in chips.py.
# The forward one fits the 16 MiB of VMEM that a kernel may use by default. The
# backward one needs the larger limit that compiler.py sets for these chips, for
# its sums of dk and dv over many keys: it leaves one partial dq per block of
# keys, which XLA must read again and add up, and up to 4096 there is but one.
LARGE = Tile(1024, 2048, 512), Tile(1024, 4096, 512)
TILES = {'v5p': LARGE, 'v5e': LARGE, 'v6e': LARGE}
# On other chips; fits 16 MiB, also in float32, and also where the mask of a
# tile is loaded, which takes 4 bytes a score, twice.
SMALL = Tile(512, 1024, 512)
# With more partial dq than this a second kernel makes dq: two of five matrix
# products are done twice, but memory does not grow with the square of L.
MAX_PARTIAL_DQ = 8


@dataclasses.dataclass(frozen=True)
class RuleMask(splash_mask.Mask):
  """The rule for a single document of a regime, evaluated slice by slice.

  The kernel loads the mask of tiles that are neither full nor empty.
  """

  regime: masks.Regime
  length: int

  @property
  def shape(self):
    return self.length, self.length

  def __getitem__(self, index):
    query, key = (self._labels(places) for places in index)
    return masks.visible(query, key)[0]

  def _labels(self, places):
    row = masks.row(self.regime, self.length)
    return jax.tree.map(lambda x: x[:, places], row)


class CleanMask(RuleMask):
  """A RuleMask whose keys are all clean and in order, as in causal regimes.

  The rule is then `place of the key < reach of the query`, so the kernel
  evaluates it instead of loading it. These attributes are what it looks for.
  """

  @staticmethod
  def mask_function(reach, place):
    return place < reach

  @property
  def q_sequence(self):
    return masks.row(self.regime, self.length).reach[0]

  def __getitem__(self, index):
    queries, keys = index
    reach, place = self.q_sequence[queries], np.arange(self.length)[keys]
    return self.mask_function(reach[:, None], place[None])


def make_mask(regime, length):
  """The splash mask of a regime for rows of L positions, [L, L]."""
  if regime == masks.BIDIRECTIONAL:
    return splash_mask.FullMask((length, length))
  row = masks.row(regime, length)
  in_order = (row.block < 0).all() and (row.pos == np.arange(length)).all()
  return (CleanMask if in_order else RuleMask)(regime, length)


def block_sizes(mask, queries, keys, chip):
  """Tiles that divide the lengths and fit the chip.

  Args:
    mask: from `make_mask`.
    queries: on one device, a multiple of LANES.
    keys: L, a multiple of LANES.
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
  """The largest multiple of LANES that divides the length, up to a limit."""
  return max(
    size
    for size in range(LANES, min(length, limit) + 1, LANES)
    if length % size == 0
  )


def make_kernel(regime, length, parts=1, chip=None, interpret=False):
  """The kernel of one row, to be called in or outside of shard_map.

  Args:
    regime: masks.Regime.
    length: L.
    parts: into how many the queries of a row are split over a mesh axis.
    chip: name in chips.py, or None.
    interpret: run the kernel's Python on any machine, to test it.

  Returns:
    A SplashAttentionKernel, which is a tree of arrays: what each tile sees.
    shard_map splits it by `split_spec`. One mask serves all heads.
  """
  mask = make_mask(regime, length)
  sizes = block_sizes(mask, length // parts, length, chip)
  # What splash_kernel.make_splash_mha does, but for one thing: when the queries
  # are split, the grid is not shrunk to the tiles in use. That fails where all
  # tiles are either full or empty, and the part that sees most sets the size
  # for all. Empty tiles are skipped all the same.
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
    is_mqa=False,  # grouped key heads included
    save_residuals=False,
    mask_value=splash_kernel.DEFAULT_MASK_VALUE,
    attn_logits_soft_cap=None,
    residual_checkpoint_name=RESIDUALS,
    mask_function=mask_function,
    interpret=interpret,
  )


def split_spec(kernel, axis):
  """Specs for shard_map of a kernel of several parts, along a mesh axis."""
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
  """Attention of the rows and heads of one device.

  Args:
    kernel: from `make_kernel`; its own part where queries are split.
    q: [B, H, L, K].
    k: [B, G, S, K], v: [B, G, S, K]; G divides H.
    doc_q: [B, L] int32, doc_k: [B, S] int32.

  Returns:
    [B, H, L, K] in the dtype of q.
  """
  head_dim = q.shape[-1]
  # The kernel does not scale. Zeros that fill a narrow head change no score.
  q = (q.astype(jnp.float32) / math.sqrt(head_dim)).astype(q.dtype)
  fill = [(0, 0), (0, 0), (0, 0), (0, -head_dim % LANES)]
  q, k, v = (jnp.pad(x, fill) for x in (q, k, v))
  segments = splash_kernel.SegmentIds(doc_q, doc_k)
  return jax.vmap(kernel)(q, k, v, segments)[..., :head_dim]
