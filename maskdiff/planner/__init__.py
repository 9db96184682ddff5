"""What a config takes on TPUs that are not here: compile, read, price."""

# libtpu reads these when it is loaded; without them it looks for a TPU here.
# To be set before JAX starts.
COMPILER_ENVIRONMENT = {
  'JAX_PLATFORMS': 'cpu',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}
