"""Smooths and thins series of values."""

import math

import numpy as np

FIRST_STEPS = 0.05  # share of a run at its start that axis ranges ignore
SMOOTHING = 0.02  # share of the rows to average over, on either side


def smooth(values, half):
  """Moving average over `half` values before and after each value.

  Near the start, where a loss falls steeply, the window shrinks on both sides
  alike. Near the end it shrinks on the right side only.
  """
  values = np.asarray(values, float)
  total = np.concatenate([[0.0], np.cumsum(values)])
  at = np.arange(len(values))
  first = np.maximum(at - half, 0)
  end = np.minimum(at + np.minimum(at, half) + 1, len(values))
  return (total[end] - total[first]) / (end - first)


def half_window(steps):
  """Number of values on either side to average over; 0 for short series."""
  return math.ceil(SMOOTHING * len(steps)) if len(steps) >= 10 else 0


def thin(steps, values, how, most=1000):
  """Reduces a series to at most `most` points, one per group of neighbours.

  Args:
    steps, values: arrays of the same length.
    how: function from the values of a group to one value, such as np.mean.
    most: maximum number of points.

  Returns:
    steps, the last of each group, and values.
  """
  each = -(-len(steps) // most)
  if each <= 1:
    return steps, values
  groups = np.split(np.arange(len(steps)), range(each, len(steps), each))
  return (
    np.array([steps[g[-1]] for g in groups]),
    np.array([how(values[g]) for g in groups]),
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
  """Boolean array: which steps come after the first 5% of `last_step`."""
  return steps >= FIRST_STEPS * last_step
