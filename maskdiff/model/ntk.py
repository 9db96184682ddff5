"""NTK scaling of rotary positions, for rows longer than those of the training.

The dimensions of a head rotate with wavelengths from 2 pi to about 2 pi theta
positions. Attention learns nothing about the part of a wavelength that exceeds
the relative positions of the training. NTK scaling replaces theta by a larger
base, so that the longest wavelength that the training covered is stretched as
the rows are. Short wavelengths, which tell neighbours apart, hardly change.

The weights stay as they are, and a scaled network is an ordinary network with
another theta.
"""

import math


def scaled_theta(theta, head_dim, trained, length):
  """Returns the base of the rotary wavelengths for rows of `length` tokens.

  Bidirectional attention sees relative positions on both sides, so both lengths
  count twice: diffusion-aware NTK scaling (UltraLLaDA, arXiv 2510.10481). Half
  the lengths give the rule for causal attention, which LongLLaDA (arXiv
  2506.14429) applies to LLaDA. Rounding up the critical dimension could give a
  base below theta if the lengths are about equal; the result is theta then.

  Args:
    theta: base of the training, above 1.
    head_dim: K.
    trained: tokens of a training row, at least 4.
    length: tokens of the longest row, more than `trained`.

  Returns:
    float, at least theta.
  """
  periods = lambda tokens: 2 * tokens / (2 * math.pi)
  # Dimensions below this one made a whole revolution in training.
  critical = 2 * math.ceil(head_dim / 2 * math.log(periods(trained), theta))
  return max(float(theta), periods(length) ** (head_dim / critical))
