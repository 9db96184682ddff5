"""XLA options for the TPU compiler, by chip.

The options were chosen by compiling the 8B train step, or only its matrix
products, for each chip and comparing the compiler's own time estimates.
docs/speed.md lists the gains on v5p. The options apply to one compilation, not
to the process, so that the planner and the run compile the same program.
"""

from maskdiff.distributed import chips

# The SparseCores of the chip gather weights and reduce gradients while the
# matrix products run. Without these options XLA lowers the reduce-scatter of a
# gradient over a torus of two or three axes to a complete all-reduce followed
# by a slice: twice the bytes, and every product waits for it.
SPARSE_CORE = {
  'xla_tpu_enable_sparse_core_collective_offload_all_gather': True,
  'xla_tpu_enable_sparse_core_collective_offload_2d_all_gather': True,
  'xla_tpu_enable_sparse_core_collective_offload_3d_all_gather': True,
  'xla_tpu_enable_sparse_core_collective_offload_all_reduce': True,
  'xla_tpu_enable_sparse_core_collective_offload_reduce_scatter': True,
  'xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter': True,
  'xla_tpu_enable_sparse_core_reduce_scatter_v2': True,
}

# On up to about 32 chips XLA would interleave the gather of a weight with parts
# of its product and sum the results in HBM (windowed einsum): 60,000 transfers
# per step and half the speed, by the compiler's own estimate.
WHOLE_PRODUCTS = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': 1_000_000}


def _vmem(mib):
  """Limit on the on-chip memory of a fusion.

  A core has 64 (v5p, Ironwood) or 128 MiB.

  The default is 16 MiB. With a higher limit matrix products use larger tiles
  and wait less for HBM: on v5p the products of the 8B MLP go from 76% to 97%
  of the peak in the compiler's estimate. Higher limits than those below gain
  little, and make compilation several times as slow. The backward tiles of
  the splash kernel need 32 MiB.
  """
  return {'xla_tpu_scoped_vmem_limit_kib': mib * 1024}


# By Chip.name; v5e has no SparseCores. Ironwood has the options of v5p: the
# compiler accepts them, and no others were compared.
OPTIONS = {
  'v5p': _vmem(32) | WHOLE_PRODUCTS | SPARSE_CORE,
  'v5e': _vmem(32) | WHOLE_PRODUCTS,
  'v6e': _vmem(64) | WHOLE_PRODUCTS | SPARSE_CORE,
  'tpu7x': _vmem(32) | WHOLE_PRODUCTS | SPARSE_CORE,
}


def options(mesh):
  """Returns compiler options for jax.jit on this mesh; may be empty."""
  chip = chips.by_kind(mesh.devices.flat[0].device_kind)
  return OPTIONS.get(chip.name, {}) if chip else {}
