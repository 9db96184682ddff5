"""Makes a run with random parameters and a tiny config."""

import contextlib

import jax
import tiny

from maskdiff.checkpoints import manifest
from maskdiff.checkpoints.checkpoint import Checkpointer
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.model import transformer
from maskdiff.training import step


def save(path, tokenizer, **changes):
  """Writes the run into a directory and returns its config.

  Args:
    path: pathlib.Path of the directory.
    tokenizer: data.tokenizer.Tokenizer.
    changes: config keys with _ for the dot, e.g. data_path.
  """
  changes = {key.replace('_', '.', 1): value for key, value in changes.items()}
  keys = {'data.tokenizer': tokenizer.path, 'data.length': 32}
  config = tiny.config(tiny.MODEL_KEYS | keys | changes)
  params = transformer.init(step.step_config(config).model, jax.random.key(0))
  meta = manifest.Meta(config=manifest.config_json(config))
  with contextlib.closing(Checkpointer(path / 'checkpoints', keep=1)) as saver:
    saver.save(1, {'params': params}, meta)
  tokenizer_lib.copy(tokenizer, str(path))
  return config
