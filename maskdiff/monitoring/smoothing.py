"""Smooths and thins series of values."""

import math

import numpy as np

FIRST_STEPS = 0.05  # share of a run at its start that axis ranges ignore
SMOOTHING = 0.02  # share of the rows to average over, on either side


def smooth(values, half):
  """Returns the moving average over `half` values on either side of each value.

  Near the start, where a loss falls steeply, the window shrinks equally on both
  sides. Near the end it shrinks on the right side only. The time grows with
  `half`; use `thin` on a long series first.
  """
  values = np.asarray(values, float)
  at = np.arange(len(values))
  first = np.maximum(at - half, 0)
  end = np.minimum(at + np.minimum(at, half) + 1, len(values))
  # Not differences of cumulative sums: after a value of 1e30, as of a run that
  # diverges, they have no digits of the others.
  total = np.zeros(len(values))
  for offset in range(-half, half + 1):
    inside = (at + offset >= first) & (at + offset < end)
    total[inside] += values[at[inside] + offset]
  return total / (end - first)


def half_window(steps):
  """Returns the `half` of `smooth` for a series; 0 for short series."""
  return math.ceil(SMOOTHING * len(steps)) if len(steps) >= 10 else 0


def thin(steps, values, reduce, max_points=1000):
  """Reduces a series to `max_points` points or fewer, one per group.

  Args:
    steps, values: arrays of the same length.
    reduce: function from the values of a group to one value, such as np.mean.
    max_points: int.

  Returns:
    steps, the last of each group, and values.
  """
  each = -(-len(steps) // max_points)
  if each <= 1:
    return steps, values
  groups = np.split(np.arange(len(steps)), range(each, len(steps), each))
  return (
    np.array([steps[g[-1]] for g in groups]),
    np.array([reduce(values[g]) for g in groups]),
  )


def without_outliers(steps, values):
  """Drops the highest 5% and lowest 5% of the values of a long series.

  Returns:
    steps and values; unchanged if the series has fewer than 10 values.
  """
  if len(values) < 10:
    return steps, values
  low, high = np.quantile(values, [0.05, 0.95])
  inside = (values >= low) & (values <= high)
  return steps[inside], values[inside]


def after_first_steps(steps, last_step):
  """Returns a boolean array, True for steps after 5% of `last_step`."""
  return steps >= FIRST_STEPS * last_step
