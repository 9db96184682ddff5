"""How far estimated step times are from published measurements.

The method of hlo_cost.py was applied to programs of MaxText whose step times
were measured, on the same chips. MEASURED lists the results. `band` turns them
into bounds of a utilization.

These comparisons are few. None is of a program of this repository, of v5e or of
Ironwood, and MaxText's measurements are from an earlier compiler.
"""

import math
from typing import NamedTuple


class Measured(NamedTuple):
  """A step time that was measured, and the estimate for the same program."""

  program: str
  chip: str
  chips: int
  tokens: int  # per chip and step
  predicted_s: float
  measured_s: float
  mfu: float  # as published; counts all pairs of causal attention
  source: str


TPU_RECIPES = 'AI-Hypercomputer/tpu-recipes, training/trillium/Llama3.1-8B'
MEASURED = (
  Measured(
    *('MaxText Llama-2-7B', 'v5p', 256, 4 * 4096, 2.859, 2.7, 0.616),
    source='AXLearn, arXiv 2507.05411, table 3',
  ),
  Measured(
    *('MaxText Llama-3.1-8B', 'v6e', 256, 4 * 8192, 4.721, 4.546, 0.4546),
    source=TPU_RECIPES,
  ),
  Measured(
    *('MaxText Llama-3.1-8B', 'v6e', 64, 5 * 8192, 5.887, 5.652, 0.457),
    source=TPU_RECIPES,
  ),
  Measured(
    *('MaxText Llama-3.1-8B', 'v6e', 16, 3 * 8192, 3.575, 3.393, 0.457),
    source=TPU_RECIPES,
  ),
)

# The fastest measured step of the model and the rows of the first program is
# AXLearn's (same table). The plan of this repository's train step for them is
# faster. Its compiler options have not run on a chip, so the plan is a bound.
BEST_MEASURED_S = 2.5
PLANNED_S = 2.06

# Utilization of AXLearn's 70B model on 256 and on 4096 chips of v5p, with the
# same rows per chip (same paper). An estimate prices the collectives of more
# chips, but not the chips that wait for the slowest one.
CHIPS, MORE_CHIPS = 256, 4096
MFU_OF_CHIPS, MFU_OF_MORE_CHIPS = 0.630, 0.524
WARNING = (
  f'on more than {CHIPS} chips the time is a lower bound: it leaves out that '
  f'chips wait for the slowest one. AXLearn reports {MFU_OF_CHIPS:.1%} of the '
  f'peak on {CHIPS} chips and {MFU_OF_MORE_CHIPS:.1%} on {MORE_CHIPS}'
)

INT8_WARNING = (
  'config.model.quantization=int8: utilizations are of the peak in bfloat16, '
  'and their range is from measurements without integers'
)


def band(mfu, chips):
  """Returns the lowest and the highest utilization that measurements suggest.

  The highest assumes that the estimate is as pessimistic as the worst one of
  MEASURED. The lowest assumes that the step is not faster than the best
  measured one, and beyond 256 chips that it loses what AXLearn's loses.

  Args:
    mfu: estimated utilization.
    chips: number of chips.
  """
  low = mfu * PLANNED_S / BEST_MEASURED_S * share_left(chips)
  high = mfu * max(m.predicted_s / m.measured_s for m in MEASURED)
  return low, min(high, 1.0)


def share_left(chips):
  """Returns the share of the utilization that is left on many chips.

  AXLearn's loss, by equal factors per doubling of the number of chips.
  """
  doublings = max(0.0, math.log2(chips / CHIPS))
  lost = MFU_OF_MORE_CHIPS / MFU_OF_CHIPS
  return lost ** (doublings / math.log2(MORE_CHIPS / CHIPS))


def cell(plan):
  """Returns the utilization of a plan with its band, as text."""
  low, high = plan['mfu_low'], plan['mfu_high']
  return f'{plan["mfu"]:.1%} ({low:.0%} to {high:.0%})'
