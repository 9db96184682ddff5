"""Adapters of a run on disk: merged into their matrices when they are read."""

import functools

import numpy as np

from maskdiff.interop.leaves import Leaf
from maskdiff.model import lora


def matrix_of(name):
  """Returns the matrix of an adapter, such as 'q' of 'blocks/q_a'; or None."""
  _, _, weight = name.partition('blocks/')
  return weight[:-2] if weight in lora.ADAPTERS else None


def merged(c, leaves, dtype=None):
  """Returns leaves without adapters that have the parameters of lora.merge.

  Args:
    c: LoraConfig.
    leaves: dict of Leaf by name, with adapters.
    dtype: numpy dtype of the merged matrices; default: as stored.
  """
  found = {n: leaf for n, leaf in leaves.items() if matrix_of(n) is None}
  for matrix in c.matrices:
    name = f'blocks/{matrix}'
    leaf = found[name]
    to = np.dtype(dtype or leaf.dtype)
    factors = functools.cache(functools.partial(_factors, leaves, name))
    read = functools.partial(_read, c.scale, leaf, factors, to)
    found[name] = Leaf(leaf.shape, to, read)
  return found


def _factors(leaves, name):
  """Reads both adapters of a matrix, float32."""
  whole = lambda leaf: leaf.read((slice(None),) * len(leaf.shape))
  return tuple(
    np.asarray(whole(leaves[f'{name}_{side}']), np.float32) for side in 'ab'
  )


def _read(scale, leaf, factors, dtype, index):
  """Reads a slice of a merged matrix; see Leaf.read."""
  a, b = factors()  # first, because the source may cache one array
  inputs = a.ndim - 2
  layers, of_inputs, of_outputs = index[:1], index[1:], index[1 + inputs :]
  of_inputs = of_inputs[:inputs]
  a = a[(*layers, *of_inputs)]
  b = b[(*layers, slice(None), *of_outputs)]
  part = np.asarray(leaf.read(index))
  count, rank = len(a), a.shape[-1]
  product = a.reshape(count, -1, rank) @ b.reshape(count, rank, -1)
  product = product.reshape(part.shape)
  return (part.astype(np.float32) + scale * product).astype(dtype)
