"""LLaDA 8B (configs/8b.py), trained by block diffusion in blocks of 32 tokens.

python launch/pretrain.py --config configs/8b_blocks.py --workdir DIR

8,015,581,184 parameters; batch, tokens and learning rates of configs/8b.py. A
training row has two copies of its 4096 tokens, so a chip computes two rows at
once, in twice as many microbatches.

Plans of launch/plan.py; the time is an optimistic estimate:
  v5p-128, v5p:4x4x4: 57.3 of 95.74 GiB per chip, 23.80 s per step, 220,280
    tokens/s, MFU 70%; 121 days and 185,622 chip-hours for all tokens.
The step takes 0.98 of the time of two steps of configs/8b.py: all positions are
computed twice, but attention computes 24 of 64 tiles, fewer than two rows of
masked diffusion have.
"""

import os
import runpy


def get_config():
  path = os.path.join(os.path.dirname(__file__), '8b.py')
  c = runpy.run_path(path)['get_config']()
  c.objective.name = 'block_diffusion'
  c.objective.block_length = 32
  c.train.microbatches = 10
  c.checkpoint.every_steps = 125  # less than an hour on 64 chips of v5p
  return c
