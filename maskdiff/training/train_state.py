"""The state of a training: parameters, optimizer, guard, average and step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import transformer
from maskdiff.model.trainable import trainable
from maskdiff.training import ema as ema_lib
from maskdiff.training import guard as guard_lib
from maskdiff.training import optimizer as optimizer_lib


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['step', 'params', 'opt_state', 'guard', 'ema'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a train step changes.

  Attributes:
    step: int32 scalar, number of batches processed.
    params: parameter tree, float32; the base of adapters may be bfloat16.
    opt_state: optax state of trainable(params). Its step count excludes
      skipped updates.
    guard: state of the spike guard, see guard.py.
    ema: moving average of the parameters, an ema.Ema; None if the run keeps
      none.
  """

  step: jax.Array
  params: dict
  opt_state: tuple
  guard: dict
  ema: ema_lib.Ema | None = None


def shardings(c, optimizer, mesh, ema=False):
  """Returns a TrainState of shardings.

  Args:
    c: TransformerConfig.
    optimizer: from make_optimizer.
    mesh: device mesh.
    ema: whether the state has a moving average, sharded as the parameters.
  """
  shapes = transformer.shapes(c)
  params = mesh_lib.param_shardings(mesh, transformer.axes(c), shapes)
  replicated = mesh_lib.replicated(mesh)
  opt_state = optimizer_lib.state_shardings(
    optimizer, trainable(c, shapes), trainable(c, params), replicated
  )
  guard = jax.tree.map(lambda _: replicated, jax.eval_shape(guard_lib.init))
  average = ema_lib.Ema(params, replicated) if ema else None
  return TrainState(replicated, params, opt_state, guard, average)


def init(c, optimizer, key, ema=False):
  """Returns a TrainState with random parameters.

  Call it under jax.jit with out_shardings.

  Args:
    c: TransformerConfig.
    optimizer: from make_optimizer.
    key: PRNG key.
    ema: whether to keep a moving average.
  """
  return from_params(c, optimizer, transformer.init(c, key), ema)


def from_params(c, optimizer, params, ema=False):
  """Returns the TrainState at step 0 with these parameters.

  Call it under jax.jit with out_shardings.

  Args:
    c: TransformerConfig.
    optimizer: from make_optimizer.
    params: parameter tree.
    ema: whether to keep a moving average, which starts at the parameters.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(trainable(c, params)),
    guard=guard_lib.init(),
    ema=ema_lib.start(params) if ema else None,
  )
