"""LLaDA 8B on two slices of v5p-128, 128 chips: configs/8b.py on more of them.

python launch/pretrain.py --config configs/8b_multislice.py --workdir DIR

8,015,581,184 parameters. Each slice holds a whole replica of the state, and the
network of the data centre carries the sum of the gradients between them, once
a step: a slice takes its half of the batch, 10 rows a chip, at once. For that
the layers keep less than in configs/8b.py.

PLANS
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
