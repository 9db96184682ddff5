"""Tiny models and configs, for tests of all rooms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff import config as config_lib
from maskdiff.model import transformer
from maskdiff.model.transformer import TransformerConfig
from maskdiff.training.optimizer import OptimizerConfig

MODEL = TransformerConfig(
  vocab_size=24,
  embed=16,
  layers=2,
  heads=2,
  kv_heads=1,
  head_dim=8,
  mlp=24,
  tie_embeddings=False,
  rope_theta=1e4,
  norm_eps=1e-5,
  dtype='float32',
  remat='none',
  attention='xla',
)
# Constant learning rate 0.1, gradients not clipped.
OPTIMIZER = OptimizerConfig(
  schedule='piecewise',
  learning_rate=0.0,
  final_learning_rate=0.0,
  warmup_steps=0,
  decay_steps=0,
  pieces=((1000, 0.1, 0.1),),
  b1=0.9,
  b2=0.95,
  eps=1e-8,
  weight_decay=0.1,
  clip_norm=1e9,
  moments='float32',
)
# Keys of a config whose model is tiny.
MODEL_KEYS = {
  'model.embed': 16,
  'model.layers': 1,
  'model.heads': 2,
  'model.kv_heads': 2,
  'model.head_dim': 8,
  'model.mlp': 16,
  'model.dtype': 'float32',
}
# Keys of a config for a run that takes seconds.
TRAIN_KEYS = {
  **MODEL_KEYS,
  'model.remat': 'none',
  'objective.loss_chunk_tokens': 32,
  'optimizer.learning_rate': 1e-2,
  'optimizer.warmup_steps': 2,
  'optimizer.decay_steps': 2,
  'data.length': 16,
  'eval.batch': 16,
  'eval.batches': 2,
}


def model(**changes):
  """Returns MODEL with other values for some fields."""
  return dataclasses.replace(MODEL, **changes)


def strong_params():
  """Returns parameters of MODEL whose predictions differ between positions.

  Matrices are larger than at initialization; gains are 1.
  """
  random = np.random.default_rng(5)

  def draw(axes, x):
    if 'vocab' not in axes and len(axes) < 3:
      return jnp.ones(x.shape)
    return jnp.asarray(random.normal(size=x.shape) / 2, jnp.float32)

  return jax.tree.map(
    draw,
    transformer.axes(MODEL),
    transformer.shapes(MODEL),
    is_leaf=lambda x: isinstance(x, tuple),
  )


def config(keys):
  """Returns the default ConfigDict with other values for some keys."""
  c = config_lib.default()
  c.update_from_flattened_dict(keys)
  return c


def config_file(path, keys):
  """Writes a file for --config that sets keys, and returns its path."""
  path.write_text(
    'from maskdiff import config\n\n'
    'def get_config():\n'
    '  c = config.default()\n'
    f'  c.update_from_flattened_dict({keys!r})\n'
    '  return c\n'
  )
  return path
