"""The state of a training: parameters, optimizer, guard and step number."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import transformer
from maskdiff.training import guard as guard_lib
from maskdiff.training import optimizer as optimizer_lib


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['step', 'params', 'opt_state', 'guard'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a train step changes.

  Attributes:
    step: int32 scalar, number of batches processed.
    params: parameter tree, float32.
    opt_state: optax state. Its step count excludes skipped updates.
    guard: state of the spike guard, see guard.py.
  """

  step: jax.Array
  params: dict
  opt_state: tuple
  guard: dict


def shardings(c, optimizer, mesh):
  """Returns a TrainState of shardings.

  Args:
    c: TransformerConfig.
    optimizer: from make_optimizer.
    mesh: device mesh.
  """
  shapes = transformer.shapes(c)
  params = mesh_lib.param_shardings(mesh, transformer.axes(c), shapes)
  replicated = mesh_lib.replicated(mesh)
  opt_state = optimizer_lib.state_shardings(
    optimizer, shapes, params, replicated
  )
  guard = jax.tree.map(lambda _: replicated, jax.eval_shape(guard_lib.init))
  return TrainState(replicated, params, opt_state, guard)


def init(c, optimizer, key):
  """Returns a TrainState with random parameters.

  Call it under jax.jit with out_shardings.

  Args:
    c: TransformerConfig.
    optimizer: from make_optimizer.
    key: PRNG key.
  """
  return from_params(optimizer, transformer.init(c, key))


def from_params(optimizer, params):
  """Returns the TrainState at step 0 with these parameters."""
  return TrainState(
    jnp.zeros((), jnp.int32), params, optimizer.init(params), guard_lib.init()
  )
