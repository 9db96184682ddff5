"""Muon: orthogonalizes the momentum of each matrix.

The algorithm is Keller Jordan's (https://kellerjordan.github.io/posts/muon).
Updates have the scale of Moonlight (arXiv 2502.16982, section 2.2): their root
mean square is that of AdamW's updates, about RMS, so the learning rate and the
weight decay of AdamW serve both.

Muon applies to the matrices of the layers. Their logical axes tell rows from
columns, so a new matrix needs no edit here. optimizer.py combines Muon with
AdamW for the embedding, the head, gains and biases.
"""

import collections
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from maskdiff.distributed.mesh import STATE_AXES

# Odd polynomial a x + b x^3 + c x^5 of the singular values. Five iterations
# take values in [0.01, 1] to [0.68, 1.14] and smaller ones to at most 1.21. The
# slope at 0 is a^5 = 485.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-8  # added to the norm, so that a zero gradient gives a zero update
RMS = 0.2  # of the update of a matrix
# Mesh axes over which whole matrices are distributed. Replicas repeat the work,
# because they may be in different slices.
MATRIX_AXES = ('sequence', 'fsdp', 'tensor')


class MuonState(NamedTuple):
  momentum: dict


def matrix_sides(axes):
  """Returns the dimensions that are rows and those that are columns.

  The dimensions of a head are one side: queries [N, D, H, K] are N matrices of
  D rows and H x K columns.

  Args:
    axes: logical axes of a parameter.

  Returns:
    Two tuples of dimensions, or None if the parameter is not a matrix of the
    layers.

  Raises:
    ValueError: the parameter has more than two sides.
  """
  if 'layers' not in axes:
    return None
  sides = []
  for dimension, axis in enumerate(axes):
    if axis == 'head_dim' and sides:
      sides[-1] += (dimension,)
    elif axis != 'layers':
      sides.append((dimension,))
  if len(sides) > 2:
    raise ValueError(
      f'a parameter with the axes {axes} is not a stack of matrices; give its '
      'sides in maskdiff/training/muon.py'
    )
  return tuple(sides) if len(sides) == 2 else None


def scale_by_muon(decay, dtype, axes):
  """Returns Muon without learning rate, an optax.GradientTransformation.

  The momentum is a moving average of the gradients with Nesterov's correction.
  The arithmetic is float32.

  Args:
    decay: decay rate of the momentum.
    dtype: dtype in which the momentum is stored.
    axes: tree of the parameters' logical axes. Every parameter has two sides;
      others are replaced by optax.MaskedNode.
  """

  def init(params):
    return MuonState(optax.tree.zeros_like(params, dtype=dtype))

  def update(gradients, state, params=None):
    average = lambda m, g: decay * m + (1 - decay) * g
    momentum = optax.tree.cast(state.momentum, jnp.float32)
    momentum = jax.tree.map(average, momentum, gradients)
    updates = orthogonalize(
      jax.tree.map(average, momentum, gradients),
      axes,
    )
    return updates, MuonState(optax.tree.cast(momentum, dtype))

  return optax.GradientTransformation(init, update)


@jax.named_scope('part(optimizer: Newton-Schulz)')
def orthogonalize(tree, axes):
  """Orthogonalizes every matrix of a tree, and scales it to RMS.

  Args:
    tree: tree of float32 arrays.
    axes: tree of their logical axes.

  Returns:
    The same tree. The matrix U S V^T becomes about RMS sqrt(max(m, n)) U V^T,
    for m rows and n columns.
  """
  leaves, structure = jax.tree.flatten(tree)
  stacks, restores = zip(
    *map(_matrices, leaves, structure.flatten_up_to(axes)), strict=True
  )
  # Matrices of one shape are distributed over the devices as one stack, so that
  # each device gets the same number.
  groups = collections.defaultdict(list)
  for index, stack in enumerate(stacks):
    groups[stack.shape[1:]].append(index)
  results = list(stacks)
  for shape, indices in groups.items():
    scale = RMS * math.sqrt(max(shape))
    found = _map_matrices(
      lambda x, scale=scale: scale * newton_schulz(x),
      [stacks[index] for index in indices],
    )
    for index, stack in zip(indices, found, strict=True):
      results[index] = stack
  return structure.unflatten(
    restore(stack) for restore, stack in zip(restores, results, strict=True)
  )


def newton_schulz(x):
  """Returns a matrix with the same singular vectors and values of about 1.

  Args:
    x: [m, n] float32.
  """
  a, b, c = COEFFICIENTS
  x = x / (jnp.linalg.norm(x) + EPS)
  wide = x.shape[0] <= x.shape[1]

  def iterate(_, x):
    gram = x @ x.T if wide else x.T @ x  # of the smaller side
    polynomial = b * gram + c * gram @ gram
    return a * x + (polynomial @ x if wide else x @ polynomial)

  return jax.lax.fori_loop(0, ITERATIONS, iterate, x)


def iteration_flops(shapes, axes):
  """Returns the FLOPs of all iterations of an update.

  Args:
    shapes: tree of the parameters, arrays or ShapeDtypeStructs.
    axes: tree of their logical axes.
  """
  leaves, structure = jax.tree.flatten(shapes)
  total = 0
  for x, names in zip(leaves, structure.flatten_up_to(axes), strict=True):
    if sides := matrix_sides(names):
      m, n = sorted(math.prod(x.shape[d] for d in side) for side in sides)
      # Two products of (m, m, n) and one of (m, m, m).
      products = 4 * m**2 * n + 2 * m**3
      total += x.size // (m * n) * ITERATIONS * products
  return total


def _matrices(x, axes):
  """Returns a parameter as [N, D, n], and the function that undoes it.

  Embed is the first side of every matrix, so that matrices into and out of the
  residual stream form one stack, and `fsdp` splits the same dimension of all.
  """
  first, second = matrix_sides(axes)
  if axes[second[0]] == 'embed':
    first, second = second, first
  order = (axes.index('layers'), *first, *second)
  sizes = [math.prod(x.shape[d] for d in side) for side in (first, second)]
  moved = [x.shape[d] for d in order]
  inverse = sorted(range(x.ndim), key=order.__getitem__)
  return (
    x.transpose(order).reshape(-1, *sizes),
    lambda stack: stack.reshape(moved).transpose(inverse),
  )


def _map_matrices(f, stacks):
  """Applies a function to every matrix of some stacks [N, m, n].

  On a mesh the devices exchange shards of matrices for whole matrices, apply
  the function, and exchange the results. Otherwise XLA would gather the shards
  of all matrices in every iteration (docs/speed.md).
  """
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else math.prod(mesh.shape[a] for a in MATRIX_AXES)
  # One matrix after the other, because the temporaries of a whole stack would
  # be larger than its momentum.
  if parts == 1:
    return [jax.lax.map(f, stack) for stack in stacks]
  x = jnp.concatenate(stacks)
  count, *shape = x.shape
  x = jnp.pad(x, ((0, -count % parts), (0, 0), (0, 0)))
  # Each step moves one mesh axis, which is an all-to-all along this axis. For
  # several at once XLA gathers the whole stack.
  steps = [
    PartitionSpec(None, STATE_AXES, 'tensor'),
    PartitionSpec('sequence', 'fsdp', 'tensor'),
    PartitionSpec(('sequence', 'fsdp'), None, 'tensor'),
    PartitionSpec(MATRIX_AXES, None, None),
  ]
  for spec in steps:
    x = jax.lax.with_sharding_constraint(x, spec)
  # [matrices per device, devices, m, n]
  x = x.reshape(parts, -1, *shape).swapaxes(0, 1)
  place = lambda x: jax.lax.with_sharding_constraint(
    x, PartitionSpec(MATRIX_AXES, None, None)
  )
  x = jax.lax.map(lambda x: place(jax.vmap(f)(place(x))), x)
  x = x.swapaxes(0, 1).reshape(-1, *shape)
  for spec in reversed(steps):
    x = jax.lax.with_sharding_constraint(x, spec)
  ends = list(itertools.accumulate(len(stack) for stack in stacks))
  return jnp.split(x[:count], ends[:-1])
