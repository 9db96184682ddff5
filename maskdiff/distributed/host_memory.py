"""Keeps the freed memory of a CPU for the next train step.

On a CPU, XLA allocates the temporaries of a program anew in every run. The C
library returns a large block to the kernel as soon as it is freed, and the next
run touches pages that the kernel must clear first: 28,600 page faults per step
of configs/tiny.py, a fifth of the time of the step (docs/speed.md).
"""

import ctypes

from maskdiff.distributed.runtime import finds_no_tpu, has_gpu

# Parameters of mallopt, from malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory(environ, platforms):
  """Lets the process keep the memory that it frees, if JAX will use the CPU.

  Must be called before JAX starts its threads, as a thread keeps the heap that
  it began with. Does nothing without glibc, or if the machine has a TPU or GPU.

  Args:
    environ: environment variables, after JAX was imported.
    platforms: value of jax_platforms.
  """
  no_accelerator = finds_no_tpu(environ, platforms) and not has_gpu()
  if platforms != 'cpu' and not no_accelerator:
    return
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt:
    mallopt(_ARENA_MAX, 1)  # memory of all threads can be reused by all
    mallopt(_MMAP_MAX, 0)  # no blocks of their own, which are always returned
    mallopt(_TRIM_THRESHOLD, -1)  # never return the end of the heap
