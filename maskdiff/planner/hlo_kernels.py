"""Prices attention kernels, for which the compiler has no estimate.

A kernel is priced by the matrix products of the blocks that it computes, at
EFFICIENCY of the chip's peak. Bidirectional attention computes all blocks,
causal attention those that intersect the lower triangle.
"""

import math

from maskdiff.planner import hlo

# The share of the peak that attention kernels are assumed to reach.
EFFICIENCY = 0.5


def seconds(chip, flops):
  """Returns the seconds that a kernel with these FLOPs takes on a chip."""
  return flops / (chip.peak_flops * EFFICIENCY)


def attention_flops(module, i, causal):
  """Returns the FLOPs of a splash attention kernel, or None for other kernels.

  The forward kernel has 2 matrix products. The backward kernel (dkv) has 5 if
  it also computes the gradient of the queries. Otherwise it has 4, and a
  separate kernel (dq) computes that gradient with 3.
  """
  start = i.attributes.find('operand_layout_constraints={')
  if 'splash' not in i.name or start < 0:
    return None
  start = i.attributes.index('{', start)
  operands = hlo.arrays(i.attributes[start : hlo.closing(i.attributes, start)])
  floats = [a for a in operands if a.dtype in ('bf16', 'f32')]
  blocks = [a for a in operands if a.dtype in ('s8', 's32')]
  products = _products(module, i.name)
  if len(floats) < 2 or len(floats[0].shape) < 3 or not products:
    return None
  *lead, queries, width = floats[0].shape
  keys = floats[1].shape[-2]
  share = _causal_share(blocks[0].shape, queries, keys) if causal else 1.0
  return 2.0 * products * math.prod(lead) * queries * keys * width * share


def _products(module, name):
  if 'fwd' in name:
    return 2
  if 'dkv' in name:
    separate = any(
      'splash' in other and '_dq_' in other
      for body in module.computations.values()
      for other in body
    )
    return 4 if separate else 5
  return 3 if 'dq' in name else 0


def _causal_share(grid, queries, keys):
  """Returns the share of blocks that intersect the lower triangle."""
  rows, columns = grid[-2:]
  if rows * columns == 1:
    return 1.0
  touched = sum(
    c * keys // columns < (r + 1) * queries // rows
    for r in range(rows)
    for c in range(columns)
  )
  return touched / (rows * columns)
