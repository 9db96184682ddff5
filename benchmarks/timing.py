"""Compares the run times of functions."""

import statistics
import time

import jax


def alternate(functions, rounds):
  """Returns the median seconds of each function, called in turn.

  Alternating calls spread other load on the machine over all functions. Each
  function is called once before, to compile.

  Args:
    functions: dict from a name to a function without arguments that returns
      arrays.
    rounds: number of timed calls of each function.

  Returns:
    Dict from a name to seconds.
  """
  for function in functions.values():
    jax.block_until_ready(function())
  seconds = {name: [] for name in functions}
  for _ in range(rounds):
    for name, function in functions.items():
      began = time.perf_counter()
      jax.block_until_ready(function())
      seconds[name].append(time.perf_counter() - began)
  return {name: statistics.median(times) for name, times in seconds.items()}
