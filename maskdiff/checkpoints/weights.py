"""The weights in a checkpoint: the parameters, or their moving average.

The item `params` holds the parameters. If the run keeps a moving average, the
item `ema` holds a tree like the parameters, `ema/params`, and the number of its
updates, `ema/updates`. Code that loads a trained model reads one of the two.
"""

import jax
import numpy as np

from maskdiff.errors import UserError, inline

_PREFIX = {False: 'params/', True: 'ema/params/'}


def has_ema(leaves):
  """Returns whether a checkpoint holds a moving average.

  Args:
    leaves: `Meta.leaves` of the checkpoint.
  """
  return any(name.startswith(_PREFIX[True]) for name in leaves)


def no_ema(source):
  """Returns the UserError for weights without a moving average.

  Args:
    source: folder, or step and folder, for the message.
  """
  return UserError(
    f'{inline(source)} has no moving average of the weights (EMA), which runs '
    'keep with --config.train.ema_decay=0.9999: leave out --ema (ema=True, '
    'config.init_from_ema) to load the weights themselves'
  )


def targets(leaves, params, ema, replicated, source):
  """Returns the targets with which `Checkpointer.restore` reads the weights.

  Args:
    leaves: `Meta.leaves` of the checkpoint.
    params: tree of ShapeDtypeStructs with shardings, like the parameters.
    ema: whether to read the moving average instead of the parameters.
    replicated: sharding of the number of updates.
    source: name of the checkpoint, for the error.

  Returns:
    Dict with one item. `restored` returns the weights from it.

  Raises:
    UserError: the checkpoint has no moving average.
  """
  if not ema:
    return {'params': params}
  if not has_ema(leaves):
    raise no_ema(source)
  updates = jax.ShapeDtypeStruct((), np.int32, sharding=replicated)
  return {'ema': {'params': params, 'updates': updates}}


def restored(tree, ema):
  """Returns the weights in the tree restored for the item of `targets`."""
  return tree['params'] if ema else tree


def names(leaves, ema, source):
  """Returns {name of a parameter, such as blocks/q: name in the manifest}.

  Args:
    leaves: see `targets`.
    ema: see `targets`.
    source: see `targets`.

  Raises:
    UserError: the checkpoint has no moving average.
  """
  if ema and not has_ema(leaves):
    raise no_ema(source)
  prefix = _PREFIX[bool(ema)]
  return {
    name.removeprefix(prefix): name
    for name in leaves
    if name.startswith(prefix)
  }
