"""LLaDA 8B (configs/8b.py) on two slices of v5p-128, 128 chips in total.

python launch/pretrain.py --config configs/8b_multislice.py --workdir DIR

8,015,581,184 parameters. Each slice holds a whole replica of the state. The
slices sum their gradients over the data-centre network once per step, so a
slice computes its half of the batch, 10 rows per chip, in one microbatch. To
fit it, layers store fewer activations than in configs/8b.py.

Plans of launch/plan.py; the time is an optimistic estimate:
  two slices of v5p:4x4x4: 61.9 of 95.74 GiB per chip, 6.59 s per step, 795,638
    tokens/s, MFU 70%; 33 days and 102,783 chip-hours for all tokens.
"""

import os
import runpy


def get_config():
  path = os.path.join(os.path.dirname(__file__), '8b.py')
  c = runpy.run_path(path)['get_config']()
  c.mesh.replica = 2
  c.train.microbatches = 1
  c.model.remat = 'attention'
  return c
