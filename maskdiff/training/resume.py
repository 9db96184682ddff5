"""Where a run begins: at its newest whole checkpoint, or with the parameters of
another, or with fresh ones.

A run goes on only as what it was: the model, the objective and the data of its
checkpoints. Everything else may change, and is said.
"""

import functools
import hashlib
import json

import jax
import numpy as np

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest, restore
from maskdiff.distributed import consensus, runtime
from maskdiff.errors import UserError
from maskdiff.interop import load
from maskdiff.training import step as step_lib
from maskdiff.training.step import TrainState

FIXED = ('model', 'objective', 'tokens')
# What the step computes does not depend on these, up to rounding.
MAY_CHANGE = (
  'model.dtype',
  'model.remat',
  'model.attention',
  'objective.loss_chunk_tokens',
)


def agree(config, identity):
  """Stops all processes if one has another config, code or data.

  Args:
    config: ConfigDict.
    identity: fingerprint of the data.

  Raises:
    UserError: names what differs, and where.
  """
  digest = lambda value: hashlib.blake2b(
    json.dumps(value, sort_keys=True).encode(), digest_size=8
  ).hexdigest()
  consensus.agree(
    {
      'config': digest(manifest.config_json(config)),
      'code': consensus.code_version(),
      'data': digest(identity),
    }
  )


def restore_or_init(config, c, key, optimizer, shardings, checkpointer, data):
  """Restores the newest checkpoint; if there never was one, takes parameters
  from config.init_from, or draws them.

  Args:
    config: the config, and c its StepConfig.
    key: PRNG key of fresh parameters.
    optimizer: from make_optimizer.
    shardings: TrainState of shardings.
    checkpointer: Checkpointer of the run.
    data: fingerprint of the data.

  Returns:
    The TrainState, the steps done, and the meta of the checkpoint, {} if the
    run starts from scratch.

  Raises:
    UserError: the checkpoint saw other data, or is of another model or
      objective; or there are checkpoints and none is whole; or
      config.init_from has another model.
  """
  init = functools.partial(step_lib.init_state, c.model, optimizer)
  targets = restore.targets(jax.eval_shape(init, key), shardings)

  def targets_of(step, meta):
    _check(f'{checkpointer.directory}/{step}', meta, config, data)
    return dict(
      params=targets.params, opt_state=targets.opt_state, guard=targets.guard
    )

  found = restore.newest(checkpointer, targets_of)
  if found is None and config.init_from:
    params = load.warm_start(config, shardings.step.mesh)
    runtime.say(f'parameters are those of {config.init_from}')
    begin = functools.partial(step_lib.start_state, optimizer)
    begin = jax.jit(begin, out_shardings=shardings, donate_argnums=0)
    return begin(params), 0, {}
  if found is None:
    return jax.jit(init, out_shardings=shardings)(key), 0, {}
  step, meta, (params, opt_state, guard) = found
  count = jax.device_put(np.int32(step), shardings.step)
  return TrainState(count, params, opt_state, guard), step, meta


def _check(name, meta, config, data):
  """Compares a checkpoint with the config and the data of the run."""
  for item, now in data.items():
    before = meta.data.get(item)
    if before == now:
      continue
    differs = f'{name} was trained on data with {item}={before}, not {now}'
    if not config.data.allow_change:
      raise UserError(
        f'{differs}; use that again or another --workdir, or '
        '--config.data.allow_change=True to go on from here'
      )
    runtime.say(differs)
  was = config_lib.flatten(config_lib.from_dict(meta.config))
  changed = {
    key: f'{was[key]!r}, now {value!r}'
    for key, value in config_lib.flatten(config).items()
    if was[key] != value
  }
  for key in changed:
    if key.partition('.')[0] in FIXED and key not in MAY_CHANGE:
      raise UserError(
        f'{name} was trained with config.{key}={was[key]!r}, not '
        f'{config_lib.flatten(config)[key]!r}; use that again or another '
        '--workdir'
      )
  for key, how in changed.items():
    runtime.say(f'changed since {name}: config.{key} was {how}')
