"""The parameters of a work directory as leaves, which are read by slices."""

import contextlib
import functools
import os

import numpy as np

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest, restore, weights
from maskdiff.errors import UserError
from maskdiff.interop import adapters, hf
from maskdiff.interop import leaves as leaves_lib
from maskdiff.interop.leaves import Leaf
from maskdiff.model import transformer

DRAFTER = 'drafter/'  # begins the names of its weights


def open_workdir(workdir, stack, ema=False, dtype=None, merge=True):
  """Opens the parameters of a work directory.

  Args:
    workdir: work directory.
    stack: contextlib.ExitStack that closes the checkpointer.
    ema: whether to open the moving average of the weights.
    dtype: dtype of matrices with merged adapters; default: as stored.
    merge: whether to merge adapters and leave out a drafter, if the run has
      any.

  Returns:
    - `config`: ConfigDict; of a model without adapters or drafter if they are
      merged or left out.
    - `leaves`: dict of Leaf by name.
    - `source`: description of the parameters, for messages.
  """
  params = os.path.join(workdir, leaves_lib.PARAMS)
  if os.path.isdir(params):
    if ema:
      raise weights.no_ema(workdir)
    leaves, meta = leaves_lib.open_folder(params)
    config = config_lib.from_dict(meta.config)
    hf.check_leaves(leaves, config.model, params)
    return config, leaves, params
  checkpointer = restore.open_run(workdir)
  stack.enter_context(contextlib.closing(checkpointer))
  step, meta = restore.newest_meta(checkpointer)

  # The layers of an array are read one after the other. A cache of one array
  # suffices to read each array once from the checkpoint.
  @functools.lru_cache(maxsize=1)
  def read(name):
    try:
      return checkpointer.read_array(step, meta, name)
    except manifest.Damaged as error:
      raise UserError(
        f'step {step} of {checkpointer.directory} is damaged: {error}; go back '
        'to an earlier checkpoint with launch/checkpoints.py --rollback'
      ) from error

  source = f'step {step} of {workdir}'
  leaves = {
    parameter: Leaf(
      tuple(meta.leaves[name]['shape']),
      np.dtype(meta.leaves[name]['dtype']),
      lambda index, name=name: read(name)[index],
    )
    for parameter, name in weights.names(meta.leaves, ema, source).items()
  }
  config = config_lib.from_dict(meta.config)
  if merge and config.lora.rank:
    c = transformer.from_config(config).lora
    leaves, config.lora.rank = adapters.merged(c, leaves, dtype), 0
  if merge and config.drafter.kind != 'none':
    leaves = {n: x for n, x in leaves.items() if not n.startswith(DRAFTER)}
    config.drafter.kind, config.objective.name = 'none', 'autoregressive'
  source = f'the moving average of {source}' if ema else source
  return config, leaves, source
