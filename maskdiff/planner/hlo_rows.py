"""Prices gathers and scatters, for which the compiler has no estimate.

The embedding and the loss gather rows of an array by index and add rows to one.
A row costs ROW_S, plus the transfer of its bytes between HBM and the core. Both
are pessimistic: the compiler may keep an array in VMEM, and the rate of rows is
that of an old chip.
"""

import dataclasses
import math
import re

from maskdiff.planner import hlo

# Seconds per row. JAX's scatter of 13 million rows of one number takes 0.29 s
# on TPU v2, and 1.3 million take 0.026 s (pytorch/xla, issue 8720). No figure
# is published for later chips.
ROW_S = 22e-9


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows that an instruction gathers or scatters."""

  count: float = 0.0
  nbytes: float = 0.0  # read and written

  def __add__(self, other):
    return Rows(self.count + other.count, self.nbytes + other.nbytes)


def seconds(chip, rows):
  """Returns the seconds that Rows take on a chip."""
  return rows.count * ROW_S + rows.nbytes / chip.hbm_bandwidth


def of(module, computation, i, fused=False):
  """Returns the Rows of an instruction and of the computations that it fuses.

  Args:
    module: hlo.Module.
    computation: name of the computation of i.
    i: hlo.Instruction.
    fused: whether that computation is a part of a fusion.
  """
  if i.op == 'gather':
    return _gathered(i)
  if i.op == 'scatter':
    rows = _scattered(module.computations[computation], i)
  elif i.op == 'fusion':
    called = i.attribute('calls')
    inside = module.computations.get(called, {}).values()
    rows = sum((of(module, called, j, True) for j in inside), Rows())
  else:
    return Rows()
  if fused and rows.count:
    rows += _filled(module.computations[computation], i)
  return rows


def _gathered(i):
  """The rows are read and written."""
  sizes = re.search(r'slice_sizes=\{([\d,]*)\}', i.attributes)
  row = math.prod(map(int, filter(None, sizes[1].split(','))))
  (result,) = hlo.arrays(i.type)
  return Rows(math.prod(result.shape) / max(row, 1), 2 * result.nbytes)


def _scattered(body, i):
  """A row is read from the updates, and read and written in the result."""
  (array,) = hlo.arrays(body[i.operands[2]].type)
  window = re.search(r'update_window_dims=\{([\d,]*)\}', i.attributes)
  inside = {int(d) for d in window[1].split(',') if d}
  count = math.prod(n for d, n in enumerate(array.shape) if d not in inside)
  return Rows(count, 3 * array.nbytes)


def _filled(body, i):
  """A fusion writes the array to scatter into, such as zeros, if it makes it.

  Otherwise the array is an argument, and the rows change in place.
  """
  made = (body[name] for name in i.operands if body[name].op != 'parameter')
  result = hlo.arrays(i.type)
  like = (o for o in made if hlo.arrays(o.type) == result)
  return Rows(0, sum(hlo.nbytes(o.type) for o in like))
