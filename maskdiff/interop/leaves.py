"""Parameters on disk, read by slices, and the folder that stores them.

A `Leaf` is an array of the parameter tree that has not been read yet. `place`
puts leaves onto a mesh: each process reads the slices of its own devices.
`write` stores each leaf in a safetensors file of its own, part by part. Neither
function holds the whole tree in host memory. The folder also has a `meta.json`,
a manifest in the format of checkpoints, with a fingerprint of every array.
"""

import functools
import json
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.checkpoints import manifest
from maskdiff.checkpoints.fingerprint import fingerprint
from maskdiff.errors import UserError
from maskdiff.files import atomic
from maskdiff.files import folder as folder_lib
from maskdiff.interop import safetensors

PARAMS = 'params'  # the folder in a work directory
META = 'meta.json'
PART_BYTES = 64 << 20


class Leaf(NamedTuple):
  """An array on disk.

  Attributes:
    shape: tuple of int.
    dtype: numpy dtype, as stored.
    read: function from a tuple of slices, one per axis, to that part of the
      array.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[tuple], np.ndarray]


def parts(leaf, dtype=None):
  """Yields the leaf in parts of at most PART_BYTES, cut along its first axis.

  Args:
    leaf: Leaf with at least one axis.
    dtype: numpy dtype of the parts; default: as stored.
  """
  dtype = np.dtype(dtype or leaf.dtype)
  row = math.prod(leaf.shape[1:]) * max(dtype.itemsize, leaf.dtype.itemsize)
  rows = max(1, PART_BYTES // max(row, 1))
  rest = (slice(None),) * (len(leaf.shape) - 1)
  for start in range(0, leaf.shape[0], rows):
    part = leaf.read((slice(start, start + rows), *rest))
    yield np.ascontiguousarray(part, dtype)


def write(folder, leaves, meta, dtype=None):
  """Writes a folder of parameters.

  Args:
    folder: an existing, empty folder.
    leaves: dict of Leaf by name, such as blocks/q.
    meta: checkpoints.manifest.Meta for META.
    dtype: dtype of all written arrays; default: as stored.

  Raises:
    UserError: a file cannot be written.
  """
  sums, entries = {}, {}
  for name, leaf in leaves.items():
    to = np.dtype(dtype or leaf.dtype)
    sums[name] = _Sum()

    def summed_parts(leaf=leaf, to=to, total=sums[name]):
      for part in parts(leaf, to):
        total.add(part)
        yield part

    path = os.path.join(folder, _file(name))
    new = safetensors.New(name, to, leaf.shape, summed_parts)
    safetensors.write(path, [new])
    entries[name] = {'shape': list(leaf.shape), 'dtype': str(to)}
  fingerprints = {name: total.value for name, total in sums.items()}
  path = os.path.join(folder, META)
  values = manifest.make(meta, entries, manifest.nest(fingerprints))
  with safetensors.writing(path):
    atomic.write(path, json.dumps(values))


def files(workdir, leaves):
  """Returns the paths of the files of leaves; [] if they are a checkpoint.

  Args:
    workdir: work directory.
    leaves: dict of Leaf by name.
  """
  paths = [os.path.join(workdir, PARAMS, _file(name)) for name in leaves]
  return [path for path in paths if os.path.exists(path)]


def open_folder(folder):
  """Opens a folder of parameters that `write` made, without reading arrays.

  Returns:
    dict of Leaf by name, and the manifest.Meta.

  Raises:
    UserError: a file is missing or damaged, or a link.
  """
  parent, name = os.path.split(os.path.abspath(folder))
  folder_lib.open_file(parent, os.path.join(name, META)).close()  # no link
  try:
    meta = manifest.read(os.path.join(folder, META))
  except manifest.Damaged as error:
    raise UserError(f'{folder} cannot be used: {error}') from error
  if meta.config is None:
    raise UserError(f'{folder} cannot be used: its {META} has no config')
  leaves = {}
  for name, entry in meta.leaves.items():
    path = os.path.join(folder, _file(name))
    tensor = safetensors.read_header(path).get(name)
    stored = tensor and {
      'shape': list(tensor.shape),
      'dtype': str(tensor.dtype),
    }
    expected = {key: entry[key] for key in ('shape', 'dtype')}
    if stored != expected:
      raise UserError(
        f'{path} has {stored} for {name}, but {META} has {expected}: convert '
        'again'
      )
    leaves[name] = Leaf(
      tensor.shape, tensor.dtype, lambda index, t=tensor: t.view()[index]
    )
  return leaves, meta


def place(leaves, shardings, dtype=None, entries=None, where=''):
  """Reads leaves onto the devices. Each process reads its devices' slices.

  Args:
    leaves: dict of Leaf by name.
    shardings: dict of Sharding by name.
    dtype: dtype of the arrays; default: as stored.
    entries: `leaves` of a manifest; the arrays are compared with its
      fingerprints. None skips the comparison.
    where: path of the folder, for error messages.

  Returns:
    The tree of arrays.

  Raises:
    UserError: an array differs from its fingerprint.
  """
  arrays = {}
  for name, leaf in leaves.items():
    array = jax.make_array_from_callback(
      leaf.shape,
      shardings[name],
      lambda index, leaf=leaf: np.ascontiguousarray(leaf.read(index)),
    )
    # The fingerprint covers the stored bits, so compare it before the cast.
    if entries and int(_fingerprint(array, 0)) != entries[name]['fingerprint']:
      raise UserError(
        f'{where}: bits of {name} have changed since the folder was written; '
        'convert again'
      )
    to = np.dtype(dtype or leaf.dtype)
    arrays[name] = array if to == leaf.dtype else cast(array, to.name)
  return manifest.nest(arrays)


class _Sum:
  """Fingerprint of an array whose parts are added one by one."""

  def __init__(self):
    self.value, self._rows = 0, 0

  def add(self, part):
    self.value = (self.value + int(_fingerprint(part, self._rows))) % 2**32
    self._rows += len(part)


_fingerprint = jax.jit(fingerprint)


@functools.partial(jax.jit, static_argnums=1)
def cast(tree, dtype):
  """Casts the arrays of a tree to the named dtype; shardings stay."""
  return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), tree)


def _file(name):
  return name.replace('/', '.') + '.safetensors'
