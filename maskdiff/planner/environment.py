"""Environment variables for compiling for a TPU without a TPU.

Set them before JAX is imported: libtpu reads them when it is loaded.
"""

COMPILER_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  # JAX cannot read a cached TPU program without a TPU.
  'JAX_ENABLE_COMPILATION_CACHE': 'false',
  # Without these variables libtpu looks for a TPU on this machine.
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
