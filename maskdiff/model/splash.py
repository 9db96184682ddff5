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

from maskdiff.model import splash_masks

# Name of the kernel's residuals in remat policies.
RESIDUALS = 'attended'
# Tile sizes are multiples of this.
LANES = 128
# The kernel takes heads of 64, 128, 192, ... channels. Others are padded.
HEAD_LANES = 64


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
TILES = {'v5p': LARGE, 'v5e': LARGE, 'v6e': LARGE, 'tpu7x': LARGE}
# For other chips and for loaded masks. It fits into 16 MiB even in float32 and
# with the mask of a tile, which takes two buffers of 4 bytes per score.
SMALL = Tile(512, 1024, 512)
# Keys per tile, if possible, in regimes that leave tiles empty. Smaller key
# tiles skip more: block diffusion of 4096 tokens computes 24 of 64 tiles of
# 1024 x 1024, but 12 of 16 tiles of 1024 x 4096, twice as many pairs. The sum
# of SKIPPED_PARTIAL_DQ partial dq costs less.
SKIPPED_KEYS = 1024
SKIPPED_PARTIAL_DQ = 8
# Above this number of partial dq, a separate kernel computes dq. It repeats two
# of five matrix products, but memory does not grow with the square of L. One
# head of a row of 131,072 tokens has 1 GiB of partial dq in bfloat16.
MAX_PARTIAL_DQ = 32


def block_sizes(mask, queries, keys, chip):
  """Returns tile sizes that divide the lengths and fit the chip.

  Args:
    mask: from splash_masks.make_mask.
    queries: number of queries on one device, a multiple of LANES.
    keys: number of keys, L, a multiple of LANES.
    chip: name in chips.py, or None.
  """
  forward, backward = TILES.get(chip, (SMALL, SMALL))
  if type(mask) is splash_masks.RuleMask:
    forward = backward = SMALL
  skips = isinstance(mask, splash_masks.FunctionMask) and not mask.sees_more
  least = SKIPPED_KEYS if skips else keys
  forward = _fit(forward, queries, keys, least)
  least = max(least, keys // SKIPPED_PARTIAL_DQ)
  backward = _fit(backward, queries, keys, least)
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


def _fit(tile, queries, keys, least):
  """Returns the Tile that divides the lengths and is not larger than `tile`.

  It has as many queries as possible, and as few keys as possible, but at least
  `least`. If no such number of keys divides the length, it has the most keys.
  """
  sizes = _divisors(keys, tile.keys)
  size = min((size for size in sizes if size >= least), default=sizes[-1])
  return Tile(
    _divisors(queries, tile.queries)[-1],
    size,
    _divisors(size, tile.compute)[-1],
  )


def _divisors(length, limit):
  """Returns the multiples of LANES <= limit that divide the length, sorted."""
  return [
    size
    for size in range(LANES, min(length, limit) + 1, LANES)
    if length % size == 0
  ]


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
  sizes, infos, mask_function = _tiles(regime, length, parts, chip)
  forward, dq, dkv = jax.tree.map(jnp.asarray, infos)
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


def _tiles(regime, length, parts, chip):
  """Returns BlockSizes, MaskInfos of the three kernels, and a mask function.

  The arguments are as for `make_kernel`. The arrays are NumPy. The second
  MaskInfo is None if the backward kernel is fused.
  """
  mask = splash_masks.make_mask(regime, length)
  sizes = block_sizes(mask, length // parts, length, chip)
  # Same as splash_kernel.make_splash_mha, except that the grid does not shrink
  # to the tiles in use if the queries are split. In that case shrinking fails
  # if all tiles are full or empty, and it does not speed up the device with the
  # most tiles. The kernel skips empty tiles anyway.
  whole, fused = parts == 1, sizes.use_fused_bwd_kernel

  def tiles(process, queries, keys, shrink_grid):
    by_function = isinstance(mask, splash_masks.FunctionMask)
    small = splash_masks.tile_mask(mask, queries, keys) if by_function else mask
    info, _ = process(
      splash_mask.MultiHeadMask([small]),
      (1, 2) if by_function else (queries, keys),
      q_seq_shards=parts,
      shrink_grid=shrink_grid,
    )
    if not by_function:
      return info
    return info._replace(
      mask_next=None, partial_mask_blocks=None, q_sequence=mask.q_sequence
    )

  of_queries = splash_mask_info.process_mask
  of_keys = splash_mask_info.process_mask_dkv
  forward = tiles(of_queries, sizes.block_q, sizes.block_kv, whole)
  dq = None
  if not fused:
    dq = tiles(of_queries, sizes.block_q_dq, sizes.block_kv_dq, whole)
  dkv = tiles(
    of_keys, sizes.block_q_dkv, sizes.block_kv_dkv, whole and not fused
  )
  return sizes, (forward, dq, dkv), getattr(mask, 'mask_function', None)


def computed_share(regime, length, parts=1, chip=None):
  """Returns the shares of all pairs of queries and keys that kernels compute.

  A kernel computes all pairs of a tile that is not empty. If the queries are
  split, the share is that of the device with the most tiles.

  Args:
    regime: masks.Regime.
    length: L.
    parts: see `make_kernel`.
    chip: see `make_kernel`.

  Returns:
    Dict from a kernel to its share: `fwd`, `dkv`, and `dq` if it is separate.
  """
  sizes, infos, _ = _tiles(regime, length, parts, chip)
  tiles = {
    'fwd': (sizes.block_q, sizes.block_kv),
    'dq': (sizes.block_q_dq, sizes.block_kv_dq),
    'dkv': (sizes.block_q_dkv, sizes.block_kv_dkv),
  }
  shares = {}
  for (name, (queries, keys)), info in zip(tiles.items(), infos, strict=True):
    if info is not None:
      computed = (info.block_mask > 0).reshape(parts, -1).sum(axis=1).max()
      pairs = length // parts * length
      shares[name] = float(computed * queries * keys / pairs)
  return shares


def split_spec(kernel, axis):
  """Returns shard_map specs of a kernel whose queries are split over `axis`.

  Args:
    kernel: from `make_kernel`.
    axis: mesh axis, or None for a kernel with whole rows on every device.
  """
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


def with_numbers(kernel, number):
  """Returns the kernel of annealed attention for the numbers of a step.

  Args:
    kernel: from `make_kernel` for masks.ANNEALED; inside shard_map, the
      device's part of it.
    number: [L] int32, Labels.number of its queries.
  """
  infos = kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info
  infos = (info and info._replace(q_sequence=number) for info in infos)
  return splash_kernel.SplashAttentionKernel(*infos, **kernel.kwargs)


def qkv_layout(head_dim):
  """Returns the layout of queries, keys and values in memory.

  Heads whose channels do not fill the lanes of a vector are [..., K, L], so
  that positions fill them, in HBM as in the rotation before the kernel. Others
  are [..., L, K], as outputs and their gradients always are.
  """
  layouts = splash_kernel.QKVLayout
  return layouts.SEQ_MINOR if head_dim % LANES else layouts.HEAD_DIM_MINOR


def _with_layout(kernel, layout):
  names = ('q_layout', 'k_layout', 'v_layout')
  sizes = dataclasses.replace(
    kernel.kwargs['block_sizes'], **dict.fromkeys(names, layout)
  )
  return splash_kernel.SplashAttentionKernel(
    kernel.fwd_mask_info,
    kernel.dq_mask_info,
    kernel.dkv_mask_info,
    **{**kernel.kwargs, 'block_sizes': sizes},
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
  padding = [(0, 0), (0, 0), (0, 0), (0, -head_dim % HEAD_LANES)]
  q, k, v = (jnp.pad(x, padding) for x in (q, k, v))
  kernel = _with_layout(kernel, qkv_layout(q.shape[-1]))
  segments = splash_kernel.SegmentIds(doc_q, doc_k)
  return jax.vmap(kernel)(q, k, v, segments)[..., :head_dim]
