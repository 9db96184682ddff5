"""Prices attention kernels, for which the compiler has no estimate.

A kernel is priced by the matrix products of the tiles that it computes, at
EFFICIENCY of the chip's peak. It skips the tiles in which the regime of the
rows (model/masks.py) leaves no visible pair, but it computes all pairs of the
other tiles. A head costs a multiple of 128 channels, the lanes of a vector and
the width of the smallest matrix unit (MXU): one with 64 costs as much as one
with 128.

A second price, `mxu_seconds`, depends on the chip. The scores of a head with
K < 256 channels use only K rows of a 256 x 256 MXU.
"""

import dataclasses
import functools
import math
import re

from maskdiff.model import splash
from maskdiff.planner import hlo

# The share of the peak that attention kernels are assumed to reach.
EFFICIENCY = 0.5
# The share of the used part of the MXU that kernels reach on long rows, where
# nearly all computed pairs are visible. Of one core of Ironwood, at 131,072
# causal tokens, tokamax's splash kernels reach 34.3% (forward) and 37.2%
# (backward) with K = 128, and 63.4% and 71.7% with K = 256 (openxla/tokamax,
# microbenchmarks, 2025-11-13). The shares are means over the two widths.
MXU_SHARES = {'fwd': 0.66, 'dkv': 0.73, 'dq': 0.73}
# The metadata of a kernel whose queries and keys are [..., K, L] in memory.
_SEQUENCE_MINOR = re.compile(r'q_layout\W+2\b')


def seconds(chip, flops):
  """Returns the seconds that a kernel with these FLOPs takes on a chip."""
  return flops / (chip.peak_flops * EFFICIENCY)


def mxu_seconds(chip, i, flops):
  """Returns the seconds of a kernel by the width of the chip's matrix unit.

  Args:
    chip: chips.Chip.
    i: hlo.Instruction, an attention kernel.
    flops: from `attention_flops`.
  """
  kernel, (q, _) = _operands(i)
  used = min(1.0, _lanes(q.shape[-1]) / chip.mxu_width)
  return flops / (chip.peak_flops * MXU_SHARES[kernel] * used)


def attention_flops(module, i, regime, chip):
  """Returns the FLOPs of a splash attention kernel, or None for other kernels.

  The forward kernel has 2 matrix products. The backward kernel (dkv) has 5 if
  it also computes the gradient of the queries. Otherwise it has 4, and a
  separate kernel (dq) computes that gradient with 3. Lanes that a head leaves
  unused count as FLOPs. If the mesh splits the queries of a row, the FLOPs are
  those of the device with the most tiles.

  Args:
    module: hlo.Module.
    i: hlo.Instruction, a custom call.
    regime: masks.Regime of the rows.
    chip: name in chips.py.
  """
  kernel, floats = _operands(i)
  if kernel is None:
    return None
  *lead, queries, width = floats[0].shape
  keys = floats[1].shape[-2]
  shares = _shares(regime, keys, keys // queries, chip)
  if kernel not in shares:
    return None
  computed = queries * keys * shares[kernel]
  products = _products(module, kernel) * math.prod(lead)
  return 2.0 * products * computed * _lanes(width)


def _lanes(width):
  """Returns the lanes that a head with `width` channels takes."""
  return -(-width // splash.LANES) * splash.LANES


def _operands(i):
  """Returns the name of a splash kernel and its queries and keys, or None."""
  start = i.attributes.find('operand_layout_constraints={')
  if 'splash' not in i.name or start < 0:
    return None, None
  start = i.attributes.index('{', start)
  operands = hlo.arrays(i.attributes[start : hlo.closing(i.attributes, start)])
  floats = [a for a in operands if a.dtype in ('bf16', 'f32')][:2]
  kernel = next((k for k in ('fwd', 'dkv', 'dq') if k in i.name), None)
  if len(floats) < 2 or len(floats[0].shape) < 3 or not kernel:
    return None, None
  if _SEQUENCE_MINOR.search(i.attributes):
    floats = [_transposed(a) for a in floats]
  return kernel, floats


def _transposed(array):
  *lead, a, b = array.shape
  return dataclasses.replace(array, shape=(*lead, b, a))


# A program has several kernels of the same shape.
_shares = functools.lru_cache(maxsize=32)(splash.computed_share)


def _products(module, kernel):
  if kernel == 'dkv':
    separate = any(
      'splash' in other and '_dq_' in other
      for body in module.computations.values()
      for other in body
    )
    return 4 if separate else 5
  return {'fwd': 2, 'dq': 3}[kernel]
