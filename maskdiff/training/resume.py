"""Start of a run: newest checkpoint, warm start, or random parameters.

A run resumes only with the stage, the model, the objective, the token ids, the
data and the kind of optimizer of its checkpoint. All other config keys may
change; each change is printed.
"""

import functools
import json
from typing import NamedTuple

import jax
import numpy as np

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest, restore, weights
from maskdiff.checkpoints import position as position_lib
from maskdiff.distributed import consensus, runtime
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError, one_line
from maskdiff.interop import load
from maskdiff.model import transformer
from maskdiff.model.trainable import join, trainable
from maskdiff.training import ema as ema_lib
from maskdiff.training import train_state
from maskdiff.training.train_state import TrainState

# Sections and keys.
FIXED = (
  'model',
  'objective',
  'tokens',
  'optimizer.name',
  'lora',
  'drafter',
)
# Keys of these sections that change the result of a step only by rounding, or
# act only at initialization.
MAY_CHANGE = (
  'model.zero_outputs',
  'model.dtype',
  'model.remat',
  'model.attention',
  'model.quantization',
  'objective.loss_chunk_tokens',
)


class Start(NamedTuple):
  """The step and the position of the stage at which a run starts.

  Attributes:
    step: number of steps done; 0 for a new run.
    position: position of the stage, see `Stage.start`.
    evaluation_due: whether the evaluation of this step was interrupted.
  """

  step: int
  position: object
  evaluation_due: bool = False


def agree_on_config(config):
  """Checks that all processes have the same config and code.

  Raises:
    UserError: raised in all processes. Names the difference and the processes.
  """
  consensus.agree(
    {
      'config': manifest.json_digest(manifest.config_json(config)),
      'code': consensus.code_version(),
    }
  )


def agree_on_stage(stage):
  """Checks that all processes have the same stage and data.

  Args:
    stage: Stage.

  Raises:
    UserError: raised in all processes. Names the difference and the processes.
  """
  consensus.agree(
    {'stage': stage.name, 'data': manifest.json_digest(stage.identity)}
  )


def restore_or_init(config, setup, stage, key, checkpointer):
  """Restores the newest checkpoint, or creates the state of a new run.

  A new run takes its parameters from config.init_from, or starts with random
  parameters.

  Args:
    config: ConfigDict of the run.
    setup: RunSetup.
    stage: Stage.
    key: PRNG key of random parameters.
    checkpointer: Checkpointer of the run.

  Returns:
    The TrainState, and a Start.

  Raises:
    UserError: the checkpoint has another stage, other data, or another model,
      objective or optimizer; all checkpoints are damaged; a new run with
      adapters, or with a drafter of a network that does not change, has no
      config.init_from; or config.init_from has another model,
      or no moving average for config.init_from_ema.
  """
  optimizer, shardings = setup.optimizer, setup.shardings
  ema = shardings.ema is not None
  init = functools.partial(train_state.init, setup.model, optimizer, ema=ema)
  targets = restore.targets(jax.eval_shape(init, key), shardings)

  def items_of(meta):
    saved = {'ema': targets.ema} if weights.has_ema(meta.leaves) and ema else {}
    return dict(
      params=targets.params,
      opt_state=targets.opt_state,
      guard=targets.guard,
      **saved,
      **position_lib.targets(meta.leaves, mesh_lib.replicated(setup.mesh)),
    )

  def targets_of(step, meta):
    _check(f'{checkpointer.directory}/{step}', meta, config, stage)
    return items_of(meta)

  found = restore.newest(checkpointer, targets_of)
  if found is None and config.init_from:
    params = load.warm_start(config, setup.mesh)
    source = config.init_from
    if config.init_from_ema:
      source = f'the moving average of {source}'
    runtime.print_once(f'parameters are those of {source}')
    params = _with_new(setup, params, key)
    make_state = functools.partial(
      train_state.from_params, setup.model, optimizer, ema=ema
    )
    make_state = jax.jit(make_state, out_shardings=shardings, donate_argnums=0)
    return make_state(params), Start(0, stage.start)
  if found is None and setup.model.lora.rank:
    raise UserError(
      f'config.lora.rank={setup.model.lora.rank} trains adapters of a trained '
      'model: set --config.init_from, or --config.lora.rank=0'
    )
  if found is None and setup.model.drafter.frozen:
    raise UserError(
      'config.objective.autoregressive_weight=0 trains the drafter of a '
      'trained model, which does not change: set --config.init_from, or '
      '--config.objective.autoregressive_weight=1 to train both'
    )
  if found is None:
    return jax.jit(init, out_shardings=shardings)(key), Start(0, stage.start)
  step, meta, trees = found
  items = dict(zip(items_of(meta), trees, strict=True))
  position = items.pop(position_lib.ITEM, {})
  if ema and 'ema' not in items:
    start_ema = jax.jit(ema_lib.start, out_shardings=shardings.ema)
    items['ema'] = start_ema(items['params'])
  count = jax.device_put(np.int32(step), shardings.step)
  position = position_lib.join(meta.position, position)
  start = Start(step, position, meta.evaluation_due)
  return TrainState(count, **items), start


def _with_new(setup, params, key):
  """Returns parameters of another model with what they lack, freshly drawn.

  That is a drafter, or adapters, whose product is 0.
  """
  c, of_run = setup.model, setup.shardings.params
  if c.lora.rank:
    lacks = functools.partial(trainable, c)
  elif 'drafter' in of_run and 'drafter' not in params:
    lacks = lambda tree: {'drafter': tree['drafter']}
  else:
    return params
  draw = jax.jit(
    lambda key: lacks(transformer.init(c, key)), out_shardings=lacks(of_run)
  )
  return join(params, draw(key))


def _like(position, start):
  """Returns whether a saved position has the type of the first position."""
  if type(start) is int:
    return type(position) is int and 0 <= position < 2**63
  return isinstance(position, dict) == isinstance(start, dict)


def _check(name, meta, config, stage):
  """Compares a checkpoint with the config and the stage of the run.

  Prints each difference that is allowed.

  Args:
    name: path of the checkpoint, for messages.
    meta: manifest.Meta.
    config: ConfigDict of the run.
    stage: Stage of the run.

  Raises:
    Damaged: the metadata lacks the position of the stage.
    UserError: a difference is not allowed.
  """
  if meta.stage != stage.name:
    raise UserError(
      f'{name} is a checkpoint of {meta.stage}, not of {stage.name}; use '
      'another --workdir, and --config.init_from to start from its parameters'
    )
  if meta.identity is None or not _like(meta.position, stage.start):
    raise manifest.Damaged('its meta has no identity or position of the stage')
  identity = json.loads(json.dumps(stage.identity))
  for item in identity | meta.identity:  # keys of both, in their order
    before, now = meta.identity.get(item), identity.get(item)
    if before == now:
      continue
    difference = one_line(
      f'{name} was trained on data with {item}={before}, not {now}', 500
    )
    if not config.data.allow_change:
      raise UserError(
        f'{difference}; use the same data or another --workdir, or set '
        '--config.data.allow_change=True to continue with this data'
      )
    runtime.print_once(difference)
  old = config_lib.flatten(
    config_lib.from_dict(meta.config, f'the config of {name}')
  )
  new = config_lib.flatten(config)
  changed = [key for key, value in new.items() if old[key] != value]
  refused = [
    f'config.{key}={old[key]!r}, not {new[key]!r}'
    for key in changed
    if (key in FIXED or key.partition('.')[0] in FIXED)
    and key not in MAY_CHANGE
  ]
  if refused:
    values = 'value' if len(refused) == 1 else 'values'
    raise UserError(
      f'{name} was trained with {"; ".join(refused)}; use the same {values} or '
      'another --workdir'
    )
  for key in changed:
    runtime.print_once(
      f'changed since {name}: config.{key} was {old[key]!r}, now {new[key]!r}'
    )
  has_ema, ema = weights.has_ema(meta.leaves), config.train.ema_decay > 0
  if ema and not has_ema:
    runtime.print_once(
      f'{name} has no moving average of the weights: the average starts at its '
      'parameters'
    )
  if has_ema and not ema:
    runtime.print_once(
      f'the moving average of the weights in {name} will not be in later '
      'checkpoints: config.train.ema_decay=0'
    )
