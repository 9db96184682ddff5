"""What the TPU compiler is told beside the program, and why.

Chosen by compiling the 8B train step, or its products alone, for each chip and
reading the compiler's own estimate of the result; docs/speed.md has what they
gave on v5p. They are options of one compilation, not settings of the process,
so that the planner and the run compile the same program.
"""

from maskdiff.distributed import chips

# Gathers of weights and reductions of gradients run on the chip's SparseCores,
# beside the matrix products. Without this XLA lowers the reduce-scatter of a
# gradient over a torus of two or three axes to a whole all-reduce followed by
# a slice: twice the bytes, and every product waits for it.
SPARSE_CORE = {
  'xla_tpu_enable_sparse_core_collective_offload_all_gather': True,
  'xla_tpu_enable_sparse_core_collective_offload_2d_all_gather': True,
  'xla_tpu_enable_sparse_core_collective_offload_3d_all_gather': True,
  'xla_tpu_enable_sparse_core_collective_offload_all_reduce': True,
  'xla_tpu_enable_sparse_core_collective_offload_reduce_scatter': True,
  'xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter': True,
  'xla_tpu_enable_sparse_core_reduce_scatter_v2': True,
}

# On up to 32 chips or so XLA would gather a weight piece by piece between
# pieces of its product, and add the results up through HBM: 60,000 transfers a
# step and half of the speed, by its own estimate.
WHOLE_PRODUCTS = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': 1_000_000}


def _vmem(mib):
  """Lets a fusion use this much on-chip memory, of 64 (v5p) or 128 MiB.

  The default is 16. With more, matrix products keep larger tiles and wait less
  for HBM: on v5p those of the 8B MLP go from 76% to 97% of peak in the
  compiler's estimate. Beyond these values little is left to gain, and
  compilation takes several times as long. The splash kernel's backward tiles
  need 32.
  """
  return {'xla_tpu_scoped_vmem_limit_kib': mib * 1024}


# By the name of the chip in chips.py; v5e has no SparseCores.
OPTIONS = {
  'v5p': _vmem(32) | WHOLE_PRODUCTS | SPARSE_CORE,
  'v5e': _vmem(32) | WHOLE_PRODUCTS,
  'v6e': _vmem(64) | WHOLE_PRODUCTS | SPARSE_CORE,
}


def options(mesh):
  """Options for jax.jit of a program that runs on this mesh; may be empty."""
  chip = chips.by_kind(mesh.devices.flat[0].device_kind)
  return OPTIONS.get(chip.name, {}) if chip else {}
