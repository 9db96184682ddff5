"""Compiles the programs of a round of policy optimization for a TPU topology.

target.py compiles the denoising step, which is one of them.
"""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import lora, transformer
from maskdiff.planner.target import Target, compile_on, params_on, sharded
from maskdiff.rl import (
  policy_step,
  programs,
  reference,
  rollouts,
  stage_config,
)
from maskdiff.training import run_setup, train_state
from maskdiff.training.run_setup import RunSetup
from maskdiff.training.train_state import TrainState


class Round(NamedTuple):
  """The programs of a round, and their arguments as ShapeDtypeStructs.

  Attributes:
    config: ConfigDict.
    target: Target.
    setup: RunSetup.
    c: policy_step.PolicyConfig.
    programs: programs.Programs.
    state: TrainState.
    reference: parameter tree; None: not needed, or the base of the adapters.
    copy: parameters of the sampler.
  """

  config: ConfigDict
  target: Target
  setup: RunSetup
  c: policy_step.PolicyConfig
  programs: programs.Programs
  state: TrainState
  reference: dict | None
  copy: dict

  @property
  def fixed_params(self):
    """Parameter trees of `c.fixed_networks`."""
    params = self.state.params
    base = lora.base(params) if self.reference is None else self.reference
    return [
      {'old': params, 'reference': base}[name] for name in self.c.fixed_networks
    ]


def open_round(config, target):
  """Returns the Round of a config.

  Args:
    config: ConfigDict that passed config.validate_mesh.
    target: Target.

  Raises:
    UserError: a setting of the method is not valid, or the network needs a mask
      token and the config has no id for it.
  """
  setup = run_setup.setup_on(config, target.mesh)
  c = stage_config.policy_config(config)
  made = programs.make(config, setup, c)
  state = jax.eval_shape(
    functools.partial(
      train_state.init,
      setup.model,
      setup.optimizer,
      ema=config.train.ema_decay > 0,
    ),
    jax.eval_shape(lambda: jax.random.key(0)),
  )
  state = sharded(state, setup.shardings)
  of_reference = None
  if c.reference and not reference.is_base(config):
    changed = config.copy_and_resolve_references()
    changed.lora.rank = 0
    of_reference = params_on(
      transformer.from_config(changed),
      target.mesh,
      jnp.dtype(config.policy.reference_dtype),
    )
  return Round(
    config=config,
    target=target,
    setup=setup,
    c=c,
    programs=made,
    state=state,
    reference=of_reference,
    copy=sharded(
      jax.eval_shape(made.copy, state.params),
      rollouts.copy_shardings(setup.model, target.mesh),
    ),
  )


def parameters_to_copy(r):
  """Returns the parameters that the sampler needs, by kind.

  Args:
    r: Round.

  Returns:
    dict from (parameter, copy), ShapeDtypeStructs, to the number of parameters
    of this shape, dtype and sharding.
  """
  pairs = zip(
    jax.tree.leaves(r.state.params), jax.tree.leaves(r.copy), strict=True
  )
  return collections.Counter(pairs)


def compile_copy(r, pair):
  """Compiles the copy of a parameter for the sampler.

  Args:
    r: Round.
    pair: key of `parameters_to_copy`.

  Returns:
    Compiled.

  Raises:
    jax.errors.JaxRuntimeError: the compiler fails, e.g. for lack of memory.
  """
  param, copy = pair
  cast = rollouts.cast(copy.sharding, copy.dtype)
  return compile_on(cast, r.target.mesh, param)


def compile_fixed(r):
  """Compiles `policy_step.fixed_log_probs`; returns Compiled.

  Args:
    r: Round.

  Raises:
    jax.errors.JaxRuntimeError: the compiler fails, e.g. for lack of memory.
  """
  number = jax.ShapeDtypeStruct((), jnp.int32)
  return compile_on(
    r.programs.fixed, r.target.mesh, r.fixed_params, _rollout(r), number
  )


def compile_step(r):
  """Compiles the train step; see `compile_fixed`."""
  rollout, c = _rollout(r), r.c
  if c.fixed_steps and c.fixed_networks:
    number = jax.ShapeDtypeStruct((), jnp.int32)
    rollout['log_probs'] = jax.eval_shape(
      r.programs.fixed, r.fixed_params, rollout, number
    )
  step = jax.ShapeDtypeStruct((2,), jnp.int32)
  return compile_on(
    programs.train_step(r.config, r.setup, c),
    r.target.mesh,
    r.state,
    jax.eval_shape(r.programs.choose, rollout, step),
    jax.eval_shape(lambda: jax.random.key(0)),
  )


def _rollout(r):
  """Returns a rollout without log-probabilities, see rounds.py."""
  rows, mesh = r.config.train.batch, r.target.mesh
  tokens = jax.ShapeDtypeStruct(
    (rows, r.config.data.length),
    jnp.int32,
    sharding=mesh_lib.batch_sharding(mesh),
  )
  rest = lambda shape, dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=mesh_lib.replicated(mesh)
  )
  return {
    'tokens': tokens,
    'steps': tokens,
    'slots': rest((rows, 2), jnp.int32),
    'advantages': rest((rows,), jnp.float32),
  }
