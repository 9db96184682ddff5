"""Masks of the splash kernel, and the tiles that they leave empty.

A mask describes a row of one document. Of most regimes the kernel evaluates the
rule inside a tile, from one number per query and the index of the key, so that
no [L, L] array exists on the host or the device.
"""

import dataclasses

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)

from maskdiff.model import annealing, masks


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


class FunctionMask(RuleMask):
  """A mask that the kernel evaluates inside a tile, so that it loads none.

  Subclasses have these attributes:
    q_sequence: [L] int32, one number per query.
    mask_function: (numbers of queries, indices of keys) -> bool, elementwise,
      for arrays of JAX and NumPy. Equal masks have equal functions.
    spans: the keys that each query sees, as pairs of [L] int: first key, and
      the key after the last. The spans of a query do not overlap.
    sees_more: whether a query may see other keys too, so that no tile is empty.
  """

  sees_more = False

  def __getitem__(self, index):
    queries, keys = index
    numbers, keys = self.q_sequence[queries], np.arange(self.length)[keys]
    return self.mask_function(numbers[:, None], keys[None])


class CleanMask(FunctionMask):
  """The mask if all keys are clean and in order, as in causal regimes.

  The rule is then `key.pos < query.reach`.
  """

  @staticmethod
  def mask_function(reach, pos):
    return pos < reach

  @property
  def q_sequence(self):
    return masks.row(self.regime, self.length).reach[0]

  @property
  def spans(self):
    return ((0, self.q_sequence),)


class AnnealedMask(FunctionMask):
  """The mask of annealed attention.

  `q_sequence` has threshold 0, which is causal attention. The kernel gets the
  numbers of a training step instead (splash.with_numbers).
  """

  sees_more = True

  @staticmethod
  def mask_function(number, key):
    causal = key <= annealing.position(number)
    return causal | annealing.is_open(number, key)

  @property
  def q_sequence(self):
    return np.arange(self.length, dtype=np.int32)

  @property
  def spans(self):
    return ((0, self.q_sequence + 1),)


@dataclasses.dataclass(frozen=True)
class BlocksMask(FunctionMask):
  """The mask of block diffusion, for rows [noisy ; clean].

  A noisy query sees its own block, which begins at its reach, and the clean
  keys before its reach. A clean query sees the clean keys before its reach.
  The number of a query is 2 x reach, plus 1 if it is noisy.
  """

  half: int  # noisy positions, L / 2
  block_length: int

  @property
  def mask_function(self):
    return BlocksRule(self.half, self.block_length)

  @property
  def q_sequence(self):
    row = masks.row(self.regime, self.length)
    return 2 * row.reach[0] + (row.block[0] >= 0).astype(np.int32)

  @property
  def spans(self):
    reach, noisy = self.q_sequence >> 1, self.q_sequence & 1
    end = np.minimum(reach + noisy * self.block_length, self.half)
    return (reach, end), (self.half, self.half + reach)


@dataclasses.dataclass(frozen=True)
class BlocksRule:
  """The rule of a BlocksMask; equal rules compile once."""

  half: int
  block_length: int

  def __call__(self, number, key):
    reach, noisy = number >> 1, number & 1
    own = (key >= reach) & (key < reach + noisy * self.block_length)
    if self.half % self.block_length:  # the last block is shorter
      own &= key < self.half
    return own | ((key >= self.half) & (key < self.half + reach))


def make_mask(regime, length):
  """Returns the splash mask of a regime for rows of L positions, [L, L]."""
  if regime == masks.BIDIRECTIONAL:
    return splash_mask.FullMask((length, length))
  if regime == masks.ANNEALED:
    return AnnealedMask(regime, length)
  row = masks.row(regime, length)
  pos, block, reach = row.pos[0], row.block[0], row.reach[0]
  index = np.arange(length)
  if (block == -1).all() and (pos == index).all():
    return CleanMask(regime, length)
  half = int((block >= 0).sum())
  size = int((block == block[0]).sum())
  own = index[:half] // size
  if (
    half == length - half
    and (block[:half] == own).all()
    and (reach[:half] == own * size).all()
    and (pos[half:] == index[:half]).all()
  ):
    return BlocksMask(regime, length, half, size)
  return RuleMask(regime, length)


def tile_mask(mask, queries, keys):
  """Returns a mask with 1 x 2 entries for each tile of a FunctionMask.

  Both are True if the tile is full, and both are False if it is empty. JAX's
  analysis of this mask finds the same tiles as that of the mask itself, which
  would evaluate all L x L pairs.

  Args:
    mask: FunctionMask.
    queries: queries of a tile.
    keys: keys of a tile.
  """
  start = np.arange(0, mask.length, keys)
  column = lambda x: np.broadcast_to(x, mask.length)[:, None]
  seen = sum(  # [queries, key tiles], visible keys
    np.maximum(
      np.minimum(column(stop), start + keys) - np.maximum(column(first), start),
      0,
    )
    for first, stop in mask.spans
  ).reshape(-1, queries, len(start))
  used = seen.any(axis=1) | mask.sees_more
  kinds = np.stack([used, (seen == keys).all(axis=1)], axis=2)
  return splash_mask.NumpyMask(kinds.reshape(len(kinds), -1))
