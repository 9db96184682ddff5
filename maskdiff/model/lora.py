"""Low-rank adapters of the matrices of the layers (LoRA, arXiv 2106.09685).

A target with the matrix W, [inputs, outputs], also has A, [inputs, rank], and
B, [rank, outputs], and computes x W + (alpha / rank) (x A) B. Only A and B are
trained; all other parameters are the base. The product is applied to
activations: a layer that added the product of A and B to W would need the
gradient by W in the backward pass, which is a third of the FLOPs of full
fine-tuning, and would round small changes away in bfloat16.

B is 0 at the start, so the network computes what the base computes. Adapters
are weights of transformer.Blocks, named as their matrix with `_a` and `_b`.
There is no dropout: random masks vary the inputs already.
"""

import dataclasses

import jax
import jax.numpy as jnp

from maskdiff.config import lora
from maskdiff.model import int8
from maskdiff.model.products import product

# Names of targets, and of their matrices in transformer.Blocks.
TARGETS = dict(
  zip(lora.TARGETS, ('q', 'k', 'v', 'o', 'gate', 'up', 'down'), strict=True)
)
ADAPTERS = frozenset(f'{m}_{s}' for m in TARGETS.values() for s in 'ab')


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Settings of the adapters; see config/lora.py."""

  rank: int = 0  # 0: no adapters
  alpha: float = 32.0
  targets: tuple[str, ...] = ('all',)  # keys of TARGETS, or 'all'
  base_dtype: str = 'float32'  # of the other parameters

  @property
  def matrices(self):
    """Names of the matrices that have adapters, in the order of TARGETS."""
    every = self.rank and 'all' in self.targets
    return [
      matrix
      for target, matrix in TARGETS.items()
      if every or (self.rank and target in self.targets)
    ]

  @property
  def scale(self):
    """The factor of the low-rank product."""
    return self.alpha / self.rank


def split_axes(matrix, values):
  """Splits values per axis of a matrix, without `layers`: inputs, outputs."""
  inputs = 2 if matrix == 'o' else 1  # heads and head_dim, or embed, or mlp
  return tuple(values[:inputs]), tuple(values[inputs:])


def project(c, w, matrix, equation, x):
  """Returns the product of activations with a matrix of a layer.

  Args:
    c: LoraConfig.
    w: dict, the weights of a layer; see blocks.stacked.
    matrix: name of the matrix.
    equation: einsum of `x` and the matrix, such as 'bld,dhk->bhlk'.
    x: [B, L, D], or as the equation says.
  """
  quantized = isinstance(w[matrix], int8.Int8Matrix)
  y = (int8.product if quantized else product)(equation, x, w[matrix])
  if f'{matrix}_a' not in w:
    return y
  operands, result = equation.split('->')
  letters, of_matrix = operands.split(',')
  inputs, outputs = map(''.join, split_axes(matrix, of_matrix))
  with jax.named_scope('network(adapters)'):
    low = jnp.einsum(f'{letters},{inputs}r->blr', x, w[f'{matrix}_a'])
    up = f'blr,r{outputs}->{result}'
    return y + jnp.einsum(up, c.scale * low, w[f'{matrix}_b'])


def trained(tree):
  """Returns the part of a parameter tree that training changes.

  Args:
    tree: parameter tree, of arrays or anything else.

  Returns:
    The adapters, {'blocks': ...}; the whole tree if it has none.
  """
  adapters = {k: x for k, x in tree['blocks'].items() if k in ADAPTERS}
  return {'blocks': adapters} if adapters else tree


def base(tree):
  """Returns a parameter tree without adapters."""
  blocks = {k: x for k, x in tree['blocks'].items() if k not in ADAPTERS}
  return {**tree, 'blocks': blocks}


def cast_base(c, tree):
  """Returns a parameter tree whose base has the dtype `c.base_dtype`."""
  if not c.rank:
    return tree
  cast = lambda x: x.astype(c.base_dtype)
  adapters = trained(tree)['blocks']
  tree = jax.tree.map(cast, base(tree))
  return {**tree, 'blocks': tree['blocks'] | adapters}


def merge(c, params):
  """Returns the parameters without adapters that compute the same function.

  The sum W + (alpha / rank) A B is computed in float32, one layer at a time,
  and rounded to the dtype of W.

  Args:
    c: LoraConfig.
    params: parameter tree with adapters.
  """
  blocks = dict(base(params)['blocks'])

  def one(layer):
    w, a, b = layer
    low_rank = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
    return (w.astype(jnp.float32) + c.scale * low_rank).astype(w.dtype)

  for matrix in c.matrices:
    a, b = (params['blocks'][f'{matrix}_{s}'] for s in 'ab')
    blocks[matrix] = jax.lax.map(one, (blocks[matrix], a, b))
  return {**params, 'blocks': blocks}
