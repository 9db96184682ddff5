"""Compiled programs of policy optimization: of a round, and the train step.

Their arguments have the same shapes in every round, so each is compiled once.
The programs of the sampler are those of sampling/sampler.py.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.rl import policy_step, rollouts, table
from maskdiff.training import step as step_lib
from maskdiff.training.stage import compile_step


class Programs(NamedTuple):
  """Jitted functions of a round; a rollout is a dict of arrays on the mesh.

  copy: params -> the copy that samples, see `rollouts.sampling_copy`.
  to_rows: rollout -> Batch.
  fixed: (list of parameter trees, rollout, round) -> log-probabilities, see
    `policy_step.fixed_log_probs`.
  choose: (rollout, [2] int32) -> PolicyRows, see `policy_step.choose`.
  copies: n, masked copies per answer.
  """

  copy: Callable
  to_rows: Callable
  fixed: Callable
  choose: Callable
  copies: int


def make(config, setup, c):
  """Returns the Programs of a run.

  Args:
    config: ConfigDict.
    setup: RunSetup.
    c: policy_step.PolicyConfig.
  """
  to_rows = functools.partial(
    rollouts.to_batch,
    eos_id=config.tokens.eos_id,
    num_eos=table.find(c.method).num_eos,
  )
  of_batch, of_fixed = policy_step.shardings(c, setup.mesh)

  def choose(rollout, step):
    fixed = rollout.get('log_probs')
    rows = to_rows(rollout)
    return policy_step.choose(c, rows, rollout['advantages'], fixed, step)

  def fixed(params, rollout, number):
    return policy_step.fixed_log_probs(c, params, to_rows(rollout), number)

  def draw(rollout):
    return policy_step.draw(c, to_rows(rollout), jnp.zeros(2, jnp.int32))

  shape = lambda n: jax.ShapeDtypeStruct((config.train.batch, n), np.int32)
  tokens = shape(config.data.length)
  shapes = {'tokens': tokens, 'steps': tokens, 'slots': shape(2)}
  return Programs(
    copy=rollouts.sampling_copy(
      setup.model, setup.mesh, config.policy.sampling_dtype
    ),
    to_rows=jax.jit(to_rows),
    fixed=jax.jit(fixed, out_shardings=of_fixed),
    choose=jax.jit(choose, out_shardings=of_batch),
    copies=len(jax.eval_shape(draw, shapes).masked),
  )


def compile_train_step(config, setup, c, state, batch, key):
  """Compiles the train step of a PolicyConfig; see `Stage.compile`."""
  return compile_step(train_step(config, setup, c), state, batch, key)


def train_step(config, setup, c):
  """Returns the jitted train step of a run; arguments as for `make`."""
  return step_lib.compile_train_step(
    step_lib.step_config(config),
    setup.optimizer,
    setup.mesh,
    functools.partial(policy_step.gradients, c),
    policy_step.shardings(c, setup.mesh)[0],
  )


def place(mesh, arrays):
  """Returns a rollout of NumPy arrays, the same in all processes, on the mesh.

  Args:
    mesh: device mesh.
    arrays: dict of NumPy arrays; `tokens` and `steps` are split by rows.
  """
  rows, rest = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
  sharding = lambda name: rows if name in ('tokens', 'steps') else rest
  return {
    name: jax.make_array_from_callback(x.shape, sharding(name), x.__getitem__)
    for name, x in arrays.items()
  }
