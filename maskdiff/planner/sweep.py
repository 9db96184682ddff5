"""Plans many configs of a training run and ranks them."""

import itertools
import math

import jax

from maskdiff import config as config_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError, one_line
from maskdiff.planner import tables
from maskdiff.planner.fields import FIELDS
from maskdiff.planner.plan import plan_on
from maskdiff.planner.target import open_target, topology_devices


def sweep(config, topology, rows, remats, meshes, num_slices=1, say=print):
  """Plans every combination, one after the other, and ranks the plans that fit.

  The batch sizes of the config are rounded to the nearest size that the mesh
  divides. The number of microbatches follows from the rows per chip. After a
  plan that does not fit or does not compile, the sweep skips larger numbers of
  rows for the same mesh and remat.

  Args:
    config: ConfigDict with the keys of config.default().
    topology: topology of one slice.
    rows: list of int, rows that a chip computes at once.
    remats: list of values of config.model.remat.
    meshes: list of dicts from mesh axis to size. Axes that a dict leaves out
      keep the sizes of the config.
    num_slices: number of slices.
    say: function that receives one line of text per plan.

  Returns:
    List of plans: first those that fit, sorted by tokens/s per chip (fastest
    first), then the others.

  Raises:
    UserError: the topology, a value of remat or a mesh axis is unknown.
  """
  topology_devices(topology, num_slices)
  # Compiling takes minutes, so check all arguments first.
  for remat in remats:
    if remat not in config_lib.CHOICES['model.remat']:
      raise UserError(
        f'remat {remat!r} is unknown; choose one of '
        + ', '.join(config_lib.CHOICES['model.remat'])
      )
  for axis in itertools.chain(*meshes):
    if axis not in mesh_lib.AXES:
      raise UserError(
        f'{axis!r} is not a mesh axis; choose one of '
        + ', '.join(mesh_lib.AXES)
      )
  plans = []
  for sizes, remat in itertools.product(meshes, remats):
    for count in sorted(rows):
      result = _candidate(config, topology, num_slices, count, remat, sizes)
      plans.append(result)
      say(tables.sweep_line(result))
      jax.clear_caches()
      if not result['fits']:
        break
  by_speed = lambda p: (not p['fits'], -(p['tokens_per_s_per_chip'] or 0))
  return sorted(plans, key=by_speed)


def _candidate(config, topology, num_slices, rows, remat, sizes):
  """Returns the plan of one combination; an error goes into its `error`."""
  config = config.copy_and_resolve_references()
  config.model.remat = remat
  config_lib.validate(config)
  for axis, size in sizes.items():
    config.mesh[axis] = size
  failed = dict.fromkeys(FIELDS) | {
    'mode': 'train',
    'status': 'does not compile',
    'fits': False,
    'topology': topology,
    'num_slices': num_slices,
    'mesh': ','.join(f'{a}={config.mesh[a]}' for a in mesh_lib.AXES),
    'rows_per_chip': float(rows),
    'remat': remat,
  }
  try:
    target = open_target(config, topology, num_slices)
    at_once = rows * mesh_lib.batch_shards(target.mesh)
    parts = max(1, round(config.train.batch / at_once))
    config.train.microbatches = parts
    config.train.batch = parts * at_once
    config.eval.batch = _nearest(config.eval.batch, target.mesh)
    config_lib.validate(config)
    return plan_on(config, target)
  except ValueError as error:  # includes UserError and JAX's shape errors
    return failed | {'error': one_line(error)}


def _nearest(batch, mesh):
  """Returns the even batch size nearest to `batch` that the mesh divides."""
  unit = math.lcm(mesh_lib.batch_shards(mesh), 2)
  return max(1, round(batch / unit)) * unit
