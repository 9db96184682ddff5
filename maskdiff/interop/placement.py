"""Where the parameters of a model lie that several processes evaluate.

If the devices of each process have room, each process gets a copy of the
parameters and needs no other process to compute. distributed/shares.py then
divides the work. Otherwise the parameters are split over all devices of a
slice, and so is every batch of rows.
"""

import os

import jax

from maskdiff.distributed import consensus, runtime
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import transformer

# Share of the memory that a copy may take, at four bytes per parameter. The
# rest is for activations and caches.
MAX_SHARE = 0.5


def mesh_of(config, tensor):
  """Returns the mesh for the parameters of a config.

  All processes must call this function.

  Args:
    config: ConfigDict of a run.
    tensor: size of this axis.

  Raises:
    UserError: see `mesh.make_mesh`.
  """
  if jax.process_count() > 1 and jax.local_device_count() % tensor == 0:
    size = 4 * transformer.num_params(transformer.from_config(config))[0]
    # Hosts may differ a little in their memory.
    if consensus.from_first(lambda: size <= MAX_SHARE * _memory_bytes()):
      return mesh_lib.one_replica_per_process(tensor)
  slices = mesh_lib.split_by_slice(jax.devices())
  return mesh_lib.make_mesh(replica=len(slices), tensor=tensor)


def own_copy(params):
  """Returns the parameters on the devices of this process, and their mesh.

  Parameters that are not copied to each process, and their mesh, are returned
  as they are.

  Args:
    params: parameter tree on a mesh of `mesh_of`.
  """
  mesh = jax.tree.leaves(params)[0].sharding.mesh
  processes = jax.process_count()
  of_replicas = [
    {device.process_index for device in replica.flat}
    for replica in mesh.devices
  ]
  if processes == 1 or any(len(found) > 1 for found in of_replicas):
    return params, mesh
  local = mesh_lib.own_replica(mesh)

  def one(x):
    shards = [shard.data for shard in x.addressable_shards]
    sharding = jax.sharding.NamedSharding(local, x.sharding.spec)
    return jax.make_array_from_single_device_arrays(x.shape, sharding, shards)

  runtime.print_once(
    f'each of the {processes} processes has a copy of the model and computes a '
    'share of the work'
  )
  return jax.tree.map(one, params), local


def _memory_bytes():
  """Returns the memory of the devices of this process, or of a CPU host."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  if all('bytes_limit' in s for s in stats):
    return sum(s['bytes_limit'] for s in stats)
  return os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
