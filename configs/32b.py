"""A 32B model on 64 chips of v5p (v5p-128), as an example of a large model.

python launch/pretrain.py --config configs/32b.py --workdir DIR

32,501,273,600 parameters: the dimensions of Qwen2.5-32B (arXiv 2412.15115)
with LLaDA's vocabulary. No masked diffusion model of this size is published.
Batch and tokens are those of configs/8b.py; learning rates are half of its
rates. None of them has been tried.

Plans of launch/plan.py; the time is an optimistic estimate:
  v5p:4x4x4: 53.1 of 95.74 GiB per chip, 50.72 s per step, 103,372 tokens/s, MFU
    73%; 258 days and 395,552 chip-hours for all tokens.
"""

import os
import runpy


def get_config():
  path = os.path.join(os.path.dirname(__file__), '8b.py')
  c = runpy.run_path(path)['get_config']()
  c.model.embed = 5120
  c.model.layers = 64
  c.model.heads = 40
  c.model.kv_heads = 8
  c.model.mlp = 27_648
  c.model.remat = 'attention'
  c.checkpoint.every_steps = 50  # 42 minutes
  c.optimizer.pieces = tuple(
    (end, first / 2, last / 2) for end, first, last in c.optimizer.pieces
  )
  return c
