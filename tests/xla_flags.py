"""Flags of XLA with which tests compile programs in a fraction of the time.

Most of the time of the tests is spent compiling tiny programs that run a few
times. To test with XLA's own defaults, set XLA_FLAGS to the opposite values:
conftest.py puts FAST before XLA_FLAGS, and the last value of a flag counts.
"""

import importlib.metadata

# A program is not optimized, nor split into parts for several threads.
FAST = (
  '--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1'
)
# The older of two code generators compiles three times as fast. Later releases
# do not have it, and XLA aborts a process with a flag that it does not know.
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  FAST += ' --xla_cpu_use_fusion_emitters=false'
