"""The device mesh and the shardings of parameters and activations.

The mesh has four axes:
- `replica` holds complete copies of the state, at least one per slice.
- `fsdp` splits the batch.
- `sequence` splits the length, and in attention the heads, if their numbers
  allow.
- `tensor` splits heads, mlp and vocabulary.
`fsdp` and `sequence` together split the state.

Arrays are described by logical axes, which two tables map to mesh axes. All
mesh axes are Auto: XLA inserts the collectives, guided by sharding constraints
(`shard`) at a few points of the model.
"""

import collections
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec

from maskdiff.errors import UserError

AXES = ('replica', 'fsdp', 'sequence', 'tensor')
BATCH_AXES = ('replica', 'fsdp')
STATE_AXES = ('fsdp', 'sequence')

PARAM_RULES = {
  'layers': None,
  'embed': STATE_AXES,
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'head_dim': None,
  'mlp': 'tensor',
  'vocab': 'tensor',
  'rank': None,
  'drafts': None,
  'taps': None,
}
ACTIVATION_RULES = {
  'batch': BATCH_AXES,
  'length': 'sequence',
  'embed': None,
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'heads_of_rows': ('tensor', 'sequence'),
  'head_dim': None,
  'mlp': 'tensor',
}


def make_mesh(replica=1, fsdp=-1, sequence=1, tensor=1, devices=None):
  """Builds the device mesh; a size of -1 takes all remaining devices.

  Only `replica` spans TPU slices, which the data centre network connects. Each
  slice holds the same number of replicas, and the other three axes stay on the
  fast links (ICI) inside a slice.

  Args:
    replica: size of this axis.
    fsdp: size of this axis; -1 by default, which puts all devices on it.
    sequence: size of this axis.
    tensor: size of this axis.
    devices: devices to use; None for all. Pass the devices of a topology to
      compile for machines that are not attached.

  Raises:
    UserError: the product of the sizes is not the number of devices, or
      slices do not hold equal numbers of replicas.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [replica, fsdp, sequence, tensor]
  named = ', '.join(f'{a}={s}' for a, s in zip(AXES, sizes, strict=True))
  if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
    raise UserError(
      f'config.mesh ({named}): give positive sizes, of which one may be -1'
    )
  rest, remainder = divmod(len(devices), math.prod(s for s in sizes if s > 0))
  sizes = [rest if s == -1 else s for s in sizes]
  if remainder or math.prod(sizes) != len(devices):
    raise UserError(
      f'config.mesh ({named}): the product of the sizes is not the number of '
      f'devices, {len(devices)}; set one axis to -1 to use all devices'
    )
  slices = split_by_slice(devices)
  if sizes[0] % len(slices) or len(set(map(len, slices))) > 1:
    raise UserError(
      f'config.mesh ({named}): there are {len(slices)} slices of '
      f'{", ".join(str(n) for n in sorted(set(map(len, slices))))} devices, '
      'and each slice must hold the same number of replicas: set '
      f'--config.mesh.replica={len(slices)} or a multiple of it, and '
      '--config.mesh.fsdp=-1'
    )
  inside = [sizes[0] // len(slices), *sizes[1:]]
  return _mesh(np.concatenate([_arrange(inside, one) for one in slices]))


def one_replica_per_process(tensor=1):
  """Builds a mesh with a replica on the devices of each process.

  Args:
    tensor: size of this axis, which divides the number of devices of a process.
  """
  devices = collections.defaultdict(list)
  for device in jax.devices():
    devices[device.process_index].append(device)
  # The few devices of a host are neighbours in their order.
  sizes = len(devices), jax.local_device_count() // tensor, 1, tensor
  return _mesh(np.asarray([devices[p] for p in sorted(devices)]).reshape(sizes))


def own_replica(mesh):
  """Returns the mesh of the replica on the devices of this process."""
  mine = [
    d.process_index == jax.process_index() for d in mesh.devices[:, 0, 0, 0]
  ]
  return _mesh(mesh.devices[np.flatnonzero(mine)])


def _mesh(devices):
  return jax.sharding.Mesh(
    devices, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
  )


def split_by_slice(devices):
  """Groups devices by TPU slice; devices other than TPUs are one slice.

  JAX also gives GPUs a slice index, one per node, but every mesh axis may span
  GPU nodes.

  Returns:
    List of lists of devices.
  """
  slices = collections.defaultdict(list)
  for device in devices:
    tpu = device.platform == 'tpu'
    slices[getattr(device, 'slice_index', 0) if tpu else 0].append(device)
  return [slices[index] for index in sorted(slices)]


def _arrange(sizes, devices):
  """Arranges the devices of a slice so that mesh neighbours are close."""
  for split in (False, True):
    try:
      return mesh_utils.create_device_mesh(
        sizes, devices, allow_split_physical_axes=split
      )
    except (NotImplementedError, AssertionError, ValueError):
      pass  # an axis is not a product of complete physical axes
  # Part of a slice, or two devices per chip: JAX arranges complete tori only.
  # The order of two devices does not matter.
  if devices[0].platform == 'tpu' and len(devices) > 2:
    named = ', '.join(f'{a}={s}' for a, s in zip(AXES, sizes, strict=True))
    warnings.warn(
      f'a mesh of {named} does not follow the links between these '
      f'{len(devices)} TPU devices and may be slow: use all devices of a '
      'slice, and sizes in config.mesh that are products of its axes',
      stacklevel=2,
    )
  return np.asarray(devices).reshape(sizes)


def device_kind():
  """Returns JAX's name for the kind of device that the program runs on."""
  # In ahead-of-time compilation the program runs on the devices of the mesh,
  # not on those of this machine.
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else getattr(mesh, 'abstract_device', None)
  kind = getattr(device, 'device_kind', None)
  return kind or jax.devices()[0].device_kind


def on_one_cpu():
  """Returns whether the program runs on a CPU, and is not split by a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return device_kind() == 'cpu' and (mesh.empty or mesh.size == 1)


def batch_shards(mesh):
  """Returns the number of shards into which the rows of a batch are split."""
  return math.prod(mesh.shape[a] for a in BATCH_AXES)


def whole_batch(mesh, rows):
  """Returns a number of rows, rounded up to an equal number on every shard.

  A batch whose rows cannot be split evenly is computed by all devices.
  """
  shards = 1 if mesh.empty else batch_shards(mesh)
  return -(-rows // shards) * shards


def batch_sharding(mesh):
  """Returns the sharding of a [B, L] array of tokens."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES, 'sequence'))


def replicated(mesh):
  """Returns the sharding of an array that is replicated on all devices."""
  return NamedSharding(mesh, PartitionSpec())


def is_matrix(axes):
  """Returns whether a parameter has two or more axes, not counting layers."""
  return sum(a != 'layers' for a in axes) >= 2


def param_spec(axes):
  """Returns the PartitionSpec of a parameter with these logical axes.

  Only matrices are split: a vector is too small to be worth a collective.
  """
  if not is_matrix(axes):
    return PartitionSpec()
  return PartitionSpec(*(PARAM_RULES[a] for a in axes))


def param_shardings(mesh, axes, shapes):
  """Returns the shardings of a parameter tree.

  Args:
    mesh: device mesh.
    axes: tree of tuples of logical axis names.
    shapes: the same tree, of arrays or ShapeDtypeStructs.

  Raises:
    UserError: a dimension cannot be split evenly. The message names the
      parameter and the axis.
  """

  def one(path, shape, axes):
    spec = param_spec(axes)
    for name, size, split in zip(axes, shape.shape, spec, strict=False):
      parts = _size(mesh, split)
      if size % parts:
        split = [a for a in _names(split) if mesh.shape[a] > 1]
        over = ' x '.join(f'mesh.{a}' for a in split)
        raise UserError(
          f'parameter {jax.tree_util.keystr(path, simple=True, separator="/")}'
          f': {name} = {size} is not divisible by {over} = {parts}; choose '
          f'another config.mesh.{split[0]}'
        )
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(one, shapes, axes)


def _size(mesh, axes):
  """Returns the number of parts into which mesh axes split a dimension."""
  return math.prod(mesh.shape[a] for a in _names(axes))


def _names(axes):
  """Returns a tuple of the mesh axes of a dimension of a spec."""
  return (axes,) if isinstance(axes, str) else axes or ()


def attention_axes(heads, kv_heads):
  """Returns the logical axes of queries, and those of keys and values.

  If `tensor` x `sequence` divides the numbers of heads, each device attends
  with some heads of whole rows (DeepSpeed-Ulysses, arXiv 2309.14509). It gets
  them by an all-to-all, so no device holds all keys. Otherwise it attends with
  all heads of its own positions, and keys and values must be gathered.

  Args:
    heads: H.
    kv_heads: G.

  Returns:
    Logical axes of [B, H, L, K] and of [B, G, L, K], for `shard`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else _size(mesh, ACTIVATION_RULES['heads_of_rows'])
  if heads % parts == kv_heads % parts == 0:
    axes = 'batch', 'heads_of_rows', None, 'head_dim'
    return axes, axes
  return (
    ('batch', 'heads', 'length', 'head_dim'),
    ('batch', 'kv_heads', 'length', 'head_dim'),
  )


def replicate(tree):
  """Replicates all arrays of a tree, so that each host can read them."""
  return jax.tree.map(lambda x: shard(x, *[None] * x.ndim), tree)


def shard(x, *axes):
  """Constrains the sharding of an activation on the current mesh.

  Does nothing outside `jax.set_mesh`. A dimension whose size is not divisible
  by its mesh axes is not split, e.g. a batch of two prompts on eight chips.

  Args:
    x: array.
    *axes: one logical axis name or None per dimension.

  Raises:
    ValueError: the number of axes is not the number of dimensions.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x

  def mesh_axes(size, axis):
    names = ACTIVATION_RULES[axis] if axis else None
    return names if size % _size(mesh, names) == 0 else None

  if len(axes) != x.ndim:
    raise ValueError(f'{len(axes)} axes for an array of {x.ndim} dimensions')
  spec = PartitionSpec(*map(mesh_axes, x.shape, axes))
  return jax.lax.with_sharding_constraint(x, spec)


def pad_length(*arrays):
  """Returns arrays with zeros at the ends of rows, for jax.shard_map.

  It refuses a length that the devices along `sequence` do not divide.

  Args:
    *arrays: [B, L, ...] each.
  """
  parts = jax.sharding.get_abstract_mesh().shape['sequence']
  added = -arrays[0].shape[1] % parts
  widths = lambda x: [(0, 0), (0, added)] + [(0, 0)] * (x.ndim - 2)
  return [jnp.pad(x, widths(x)) if added else x for x in arrays]
