"""The device mesh and the tables that say how arrays lie on it.

Four mesh axes: `replica` (whole copies of the state, at least one per slice),
`fsdp` (the state and the batch are split), `sequence` (the length is split)
and `tensor` (heads, mlp and vocabulary are split). Arrays are described by
logical axes, which the two tables map to mesh axes. All mesh axes are Auto:
XLA places the collectives, led by `shard` at a few points of the model.
"""

import collections
import math
import warnings

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from maskdiff.errors import UserError

AXES = ('replica', 'fsdp', 'sequence', 'tensor')
BATCH_AXES = ('replica', 'fsdp')

PARAM_RULES = {
  'layers': None,
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_dim': None,
  'mlp': 'tensor',
  'vocab': 'tensor',
}
ACTIVATION_RULES = {
  'batch': BATCH_AXES,
  'length': 'sequence',
  'embed': None,
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_dim': None,
  'mlp': 'tensor',
}


def make_mesh(replica=1, fsdp=-1, sequence=1, tensor=1, devices=None):
  """Builds the mesh; one of the four sizes may be -1 and takes what is left.

  Only `replica` spans slices of TPUs, which are connected by the network of
  the data centre: a slice holds an equal number of replicas, and the groups of
  the other three axes stay on the fast links inside it.

  Args:
    replica: size of this axis.
    fsdp: size of this axis; by default all devices are on it.
    sequence: size of this axis.
    tensor: size of this axis.
    devices: the devices to use, all of them by default; a topology's when
      compiling for machines that are not here.

  Raises:
    UserError: the sizes do not multiply to the number of devices, or replicas
      do not fit into slices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [replica, fsdp, sequence, tensor]
  named = ', '.join(f'{a}={s}' for a, s in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise UserError(
      f'config.mesh ({named}): sizes are positive, and one of them may be -1'
    )
  rest, remainder = divmod(len(devices), math.prod(s for s in sizes if s > 0))
  sizes = [rest if s == -1 else s for s in sizes]
  if remainder or math.prod(sizes) != len(devices):
    raise UserError(
      f'config.mesh ({named}) does not multiply to the {len(devices)} devices '
      'that are here; set one axis to -1 to let it take what is left'
    )
  slices = split_by_slice(devices)
  if sizes[0] % len(slices) or len(set(map(len, slices))) > 1:
    raise UserError(
      f'config.mesh ({named}): the devices are {len(slices)} slices of '
      f'{", ".join(str(n) for n in sorted(set(map(len, slices))))}, which '
      'hold equal numbers of whole replicas: set '
      f'--config.mesh.replica={len(slices)} or a multiple of it, and '
      '--config.mesh.fsdp=-1'
    )
  inside = [sizes[0] // len(slices), *sizes[1:]]
  return jax.sharding.Mesh(
    np.concatenate([_arrange(inside, one) for one in slices]),
    AXES,
    axis_types=(jax.sharding.AxisType.Auto,) * len(AXES),
  )


def split_by_slice(devices):
  """The devices as a list of slices, each a list; one slice if not on TPUs.

  GPUs have slices too, one a node, but between nodes they need no replicas.
  """
  slices = collections.defaultdict(list)
  for device in devices:
    tpu = device.platform == 'tpu'
    slices[getattr(device, 'slice_index', 0) if tpu else 0].append(device)
  return [slices[index] for index in sorted(slices)]


def _arrange(sizes, devices):
  """The devices of a slice as an array, neighbours on the axes being close."""
  for split in (False, True):
    try:
      return mesh_utils.create_device_mesh(
        sizes, devices, allow_split_physical_axes=split
      )
    except (NotImplementedError, AssertionError, ValueError):
      pass  # an axis is not a product of whole physical axes
  # Part of a slice, or two devices a chip: JAX lays out whole tori alone.
  if devices[0].platform == 'tpu' and len(devices) > 2:  # two have one order
    named = ', '.join(f'{a}={s}' for a, s in zip(AXES, sizes, strict=True))
    warnings.warn(
      f'a mesh of {named} is not laid out along the links between these '
      f'{len(devices)} TPU devices, and may be slow: use all devices of a '
      'slice, and sizes in config.mesh that are products of its axes',
      stacklevel=2,
    )
  return np.asarray(devices).reshape(sizes)


def batch_shards(mesh):
  """The number of parts that the rows of a batch are split into."""
  return math.prod(mesh.shape[a] for a in BATCH_AXES)


def batch_sharding(mesh):
  """Sharding of a [B, L] array of tokens."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES, 'sequence'))


def replicated(mesh):
  """Sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def is_matrix(axes):
  """Whether a parameter has two or more logical axes besides `layers`."""
  return sum(a != 'layers' for a in axes) >= 2


def param_spec(axes):
  """PartitionSpec of a parameter with these logical axes.

  A vector is not worth a collective: only matrices are split.
  """
  if not is_matrix(axes):
    return PartitionSpec()
  return PartitionSpec(*(PARAM_RULES[a] for a in axes))


def param_shardings(mesh, axes, shapes):
  """Shardings of a parameter tree.

  Args:
    axes: tree of tuples of logical axis names.
    shapes: the same tree, of arrays or ShapeDtypeStructs.

  Raises:
    UserError: a dimension cannot be split evenly; names parameter and axis.
  """

  def one(path, shape, axes):
    spec = param_spec(axes)
    for name, size, mesh_axis in zip(axes, shape.shape, spec, strict=False):
      if mesh_axis and size % mesh.shape[mesh_axis]:
        raise UserError(
          f'parameter {jax.tree_util.keystr(path, simple=True, separator="/")}'
          f': {name} = {size} is not divisible by mesh.{mesh_axis} = '
          f'{mesh.shape[mesh_axis]}; choose another config.mesh.{mesh_axis}'
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, shapes, axes)


def whole(tree):
  """Puts every array of a tree whole on every device, for any host to read."""
  return jax.tree.map(lambda x: shard(x, *[None] * x.ndim), tree)


def shard(x, *axes):
  """Constrains an activation to its place on the current mesh.

  Does nothing outside `jax.set_mesh`. A dimension that its mesh axes do not
  divide (a batch of two prompts on eight chips) stays whole.

  Args:
    x: array.
    *axes: one logical axis name or None per dimension.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x

  def place(size, axis):
    names = ACTIVATION_RULES[axis] if axis else None
    split = (names,) if isinstance(names, str) else names or ()
    return (
      names if size % math.prod(mesh.shape[n] for n in split) == 0 else None
    )

  if len(axes) != x.ndim:
    raise ValueError(f'{len(axes)} axes for an array of {x.ndim} dimensions')
  spec = PartitionSpec(*map(place, x.shape, axes))
  return jax.lax.with_sharding_constraint(x, spec)
