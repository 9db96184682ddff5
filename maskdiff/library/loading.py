"""Opens a trained model: `maskdiff.load`."""

import functools
import os

import jax
from absl import logging

from maskdiff import config as config_lib
from maskdiff.distributed import runtime
from maskdiff.errors import UserError, suggestion
from maskdiff.files.paths import local_path
from maskdiff.interop import hf_tokenizer, placement
from maskdiff.interop import load as load_lib
from maskdiff.library import arguments


def load(
  path,
  tensor=1,
  dtype=None,
  with_tokenizer=True,
  ema=False,
  rope_scaling=None,
):
  """Loads a run or a Hugging Face folder onto all devices.

  Each of several processes gets a copy, if its devices have room for one.

  Args:
    path: work directory of a run or of a conversion, or a Hugging Face folder.
    tensor: number of devices among which every layer is split.
    dtype: name of the parameters' dtype; default: as stored.
    with_tokenizer: whether to load the tokenizer. A folder without one gives a
      Model without one, whose special ids are those of its config.
    ema: load the moving average of the weights, which runs with
      config.train.ema_decay keep, instead of the weights themselves.
    rope_scaling: tokens of a training row, and of the longest row: scales the
      rotary positions of a bidirectional model, as config.model.rope_scaling.

  Returns:
    interop.load.Model: config, tokenizer (or None), params, mesh.

  Raises:
    UserError: the folder does not exist, or its model cannot be loaded.
  """
  arguments.check_whole(tensor=tensor)
  path = str(local_path(path))
  if not os.path.isdir(path):
    raise UserError(
      f'there is no folder {path!r}: give the work directory of a run, or a '
      'Hugging Face folder'
    )
  dtypes = config_lib.WEIGHT_DTYPES
  if dtype is not None and dtype not in dtypes:
    raise UserError(
      f'dtype={dtype!r}: choose one of {", ".join(dtypes)}'
      + suggestion(dtype, dtypes)
    )
  runtime.quiet_without_tpu(os.environ, jax.config.jax_platforms)
  # Orbax warns that the checkpoint is opened read-only, which is intended.
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    if with_tokenizer and hf_tokenizer.has_tokenizer(path):
      loaded = load_lib.load(path, tensor, dtype, ema, rope_scaling)
      return load_lib.Model(*loaded)
    mesh_of = functools.partial(placement.mesh_of, tensor=tensor)
    config, params = load_lib.load_params(path, mesh_of, dtype, ema)
    config_lib.scale_rows(config, rope_scaling)
  finally:
    logging.set_verbosity(verbosity)
  return load_lib.Model(config, None, *placement.own_copy(params))
