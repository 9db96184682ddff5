"""AdamW or Muon, with clipping, weight decay and learning-rate schedules."""

import dataclasses

import jax
import optax

from maskdiff.distributed.mesh import is_matrix
from maskdiff.training import muon


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Settings of the optimizer; see config/optimizer.py."""

  schedule: str  # wsd, cosine or piecewise
  learning_rate: float
  final_learning_rate: float
  warmup_steps: int
  decay_steps: int  # wsd: number of steps of the linear decay
  pieces: tuple  # piecewise: (last step, rate at its start, rate at its end)
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float
  moments: str  # dtype in which Adam's moments and Muon's momentum are stored
  name: str = 'adamw'  # or muon
  muon_momentum: float = 0.95


def learning_rate(c, steps):
  """Returns the learning-rate schedule, a function of the step (int32 scalar).

  `wsd` (warmup, stable, decay): linear warmup from 0, constant, linear decay
  over the last `decay_steps`. `cosine`: linear warmup, then half a cosine.
  Both end at `final_learning_rate`. `piecewise`: linear between the two rates
  of each piece; the rate may jump between pieces. The schedule of LLaDA 8B
  (arXiv 2502.09992, section 2.2) has four pieces.

  Args:
    c: OptimizerConfig.
    steps: number of steps of the whole training.
  """
  if c.schedule == 'cosine':
    return optax.warmup_cosine_decay_schedule(
      0.0, c.learning_rate, c.warmup_steps, steps, c.final_learning_rate
    )
  pieces = c.pieces
  if c.schedule == 'wsd':
    pieces = (
      (c.warmup_steps, 0.0, c.learning_rate),
      (steps - c.decay_steps, c.learning_rate, c.learning_rate),
      (steps, c.learning_rate, c.final_learning_rate),
    )
  starts = [0, *(end for end, _, _ in pieces[:-1])]
  lines = [
    (start, *piece)
    for start, piece in zip(starts, pieces, strict=True)
    if piece[0] > start
  ]
  return optax.join_schedules(
    [
      optax.linear_schedule(first, last, end - start)
      for start, end, first, last in lines
    ],
    [end for _, end, _, _ in lines[:-1]],
  )


def make_optimizer(c, steps, axes):
  """Returns AdamW or Muon with clipping, an optax.GradientTransformation.

  Args:
    c: OptimizerConfig.
    steps: number of steps of the whole training.
    axes: tree of the parameters' logical axes. Weight decay applies to
      matrices, but not to biases and normalization gains.
  """
  decay_mask = jax.tree.map(
    is_matrix, axes, is_leaf=lambda a: isinstance(a, tuple)
  )
  return optax.chain(
    optax.clip_by_global_norm(c.clip_norm),
    scale_by_muon_and_adam(c, axes) if c.name == 'muon' else scale_by_adam(c),
    optax.add_decayed_weights(c.weight_decay, mask=decay_mask),
    optax.scale_by_learning_rate(learning_rate(c, steps)),
  )


def scale_by_muon_and_adam(c, axes):
  """Returns Muon for the matrices of the layers, and Adam for all others.

  Args:
    c: OptimizerConfig.
    axes: tree of the parameters' logical axes.
  """
  is_axes = lambda a: isinstance(a, tuple)
  labels = jax.tree.map(
    lambda a: 'muon' if muon.matrix_sides(a) else 'adam', axes, is_leaf=is_axes
  )
  if 'muon' not in jax.tree.leaves(labels):
    return scale_by_adam(c)
  of_matrices = jax.tree.map(
    lambda a: a if muon.matrix_sides(a) else optax.MaskedNode(),
    axes,
    is_leaf=is_axes,
  )
  return optax.partition(
    {
      'adam': scale_by_adam(c),
      'muon': muon.scale_by_muon(c.muon_momentum, c.moments, of_matrices),
    },
    labels,
  )


def scale_by_adam(c):
  """Returns optax.scale_by_adam with both moments stored as `c.moments`.

  The arithmetic is float32. bfloat16 saves 4 bytes per parameter, as in
  DeepSeek-V3 (arXiv 2412.19437, section 3.3.3). It needs b2 well below 1: a
  change of less than 1/256 of the moment is rounded away.
  """
  adam = optax.scale_by_adam(c.b1, c.b2, c.eps)

  def cast(state, dtype):
    mu, nu = optax.tree.cast((state.mu, state.nu), dtype)
    return state._replace(mu=mu, nu=nu)

  def update(gradients, state, params=None):
    updates, state = adam.update(gradients, cast(state, 'float32'), params)
    return updates, cast(state, c.moments)

  return optax.GradientTransformation(
    lambda params: cast(adam.init(params), c.moments), update
  )


def state_shardings(optimizer, params, param_shardings, replicated):
  """Returns shardings of the optimizer state.

  Adam's moments and Muon's momentum are sharded as the parameters are.

  Args:
    optimizer: from make_optimizer.
    params: tree of arrays or ShapeDtypeStructs.
    param_shardings: tree of shardings with the structure of `params`.
    replicated: sharding of everything else, such as step counts.
  """
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  return optax.tree.map_params(
    optimizer,
    lambda x, sharding: x if is_masked(x) else sharding,
    jax.eval_shape(optimizer.init, params),
    param_shardings,
    transform_non_params=lambda _: replicated,
    is_leaf=is_masked,
  )
