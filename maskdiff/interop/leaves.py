"""Parameters on disk that are read by slices, and the folder that holds them.

A `Leaf` is an array of the parameter tree that nobody has read yet. `place`
puts leaves onto a mesh, each process reading the slices of its own devices;
`write` puts them into a folder of safetensors, one file each, in parts, so that
neither takes the memory of a whole tree. Beside the files lies `meta.json`, a
manifest as checkpoints have one, with a fingerprint of every array.
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
from maskdiff.interop import safetensors

PARAMS = 'params'  # the folder in a work directory
META = 'meta.json'
PART_BYTES = 64 << 20


class Leaf(NamedTuple):
  """An array that can be read.

  Attributes:
    shape: tuple.
    dtype: numpy dtype, as stored.
    read: from a tuple of slices, one for each axis, to that part of it.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[tuple], np.ndarray]


def parts(leaf, dtype=None):
  """Yields the leaf in parts along its first axis, of a bounded size.

  Args:
    leaf: Leaf with at least one axis.
    dtype: numpy dtype of the parts, by default as stored.
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
    folder: that is there, and empty.
    leaves: dict of Leaf by name, such as blocks/q.
    meta: checkpoints.manifest.Meta, written beside the arrays.
    dtype: of all that is written, by default as stored.

  Raises:
    UserError: it cannot be written.
  """
  prints, described = {}, {}
  for name, leaf in leaves.items():
    to = np.dtype(dtype or leaf.dtype)
    found = prints[name] = _Sum()

    def checked(leaf=leaf, to=to, found=found):
      for part in parts(leaf, to):
        found.add(part)
        yield part

    path = os.path.join(folder, _file(name))
    safetensors.write(path, [safetensors.New(name, to, leaf.shape, checked)])
    described[name] = {'shape': list(leaf.shape), 'dtype': str(to)}
  prints = {name: found.total for name, found in prints.items()}
  path = os.path.join(folder, META)
  with safetensors.writing(path), open(path, 'w') as f:
    json.dump(manifest.make(meta, described, manifest.nest(prints)), f)


def open_folder(folder):
  """What `write` has put there.

  Returns:
    dict of Leaf by name, and the Meta.

  Raises:
    UserError: something is missing or damaged.
  """
  try:
    meta = manifest.read(os.path.join(folder, META))
  except manifest.Damaged as error:
    raise UserError(f'{folder} cannot be used: {error}') from error
  leaves = {}
  for name, entry in meta.leaves.items():
    path = os.path.join(folder, _file(name))
    tensor = safetensors.read_header(path).get(name)
    stored = tensor and {
      'shape': list(tensor.shape),
      'dtype': str(tensor.dtype),
    }
    wanted = {key: entry[key] for key in ('shape', 'dtype')}
    if stored != wanted:
      raise UserError(
        f'{path} has {stored} for {name}, but {META} has {wanted}: convert '
        'again'
      )
    leaves[name] = Leaf(
      tensor.shape, tensor.dtype, lambda index, t=tensor: t.view()[index]
    )
  return leaves, meta


def place(leaves, shardings, dtype=None, entries=None, where=''):
  """Reads leaves onto the devices, each process what its devices hold.

  Args:
    leaves: dict of Leaf by name.
    shardings: dict of Sharding by name.
    dtype: of the arrays; by default as stored.
    entries: of a manifest, to compare fingerprints with; None: do not.
    where: what is read, for messages.

  Returns:
    The tree of arrays.

  Raises:
    UserError: bits have changed.
  """
  arrays = {}
  for name, leaf in leaves.items():
    array = jax.make_array_from_callback(
      leaf.shape,
      shardings[name],
      lambda index, leaf=leaf: np.ascontiguousarray(leaf.read(index)),
    )
    # Of what is stored, before it is cast.
    if entries and int(_print(array, 0)) != entries[name]['fingerprint']:
      raise UserError(
        f'{where}: bits of {name} have changed since it was written; convert '
        'again'
      )
    to = np.dtype(dtype or leaf.dtype)
    arrays[name] = array if to == leaf.dtype else cast(array, to.name)
  return manifest.nest(arrays)


class _Sum:
  """Fingerprint of an array that comes in parts."""

  def __init__(self):
    self.total, self._rows = 0, 0

  def add(self, part):
    self.total = (self.total + int(_print(part, self._rows))) % 2**32
    self._rows += len(part)


_print = jax.jit(fingerprint)


@functools.partial(jax.jit, static_argnums=1)
def cast(tree, dtype):
  """The arrays of a tree in a dtype, given by its name, where they lie."""
  return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), tree)


def _file(name):
  return name.replace('/', '.') + '.safetensors'
