"""Times functions against each other in one run."""

import statistics
import time

import jax


def alternate(functions, rounds):
  """Calls the functions in turn and returns the median seconds of each.

  Turns make them share whatever else the machine does. Each is called once
  before, to compile.

  Args:
    functions: dict from name to a function of no arguments that returns
      arrays.
    rounds: calls of each.
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
