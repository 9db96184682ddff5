r"""Masked diffusion and an autoregressive baseline on the same 6.1M tokens.

python launch/pretrain.py --config configs/proof.py --workdir runs/masked
python launch/pretrain.py --config configs/proof.py \
  --workdir runs/autoregressive --config.objective.name=autoregressive

The model and the recipe of configs/tiny.py, trained for 6,000 steps: two
thirds of an epoch of the embedded corpus, less than an hour on one CPU core.
Both runs read the same rows in the same order, with the same model and
optimizer.
"""

from maskdiff.config import default


def get_config():
  c = default()
  c.model.embed = 192
  c.model.layers = 4
  c.model.heads = 3
  c.model.kv_heads = 3
  c.model.head_dim = 64
  c.model.mlp = 512
  c.model.rope_theta = 1000.0
  c.model.dtype = 'float32'
  c.model.zero_outputs = True
  c.objective.time_density = 'bell'
  c.data.length = 128
  c.train.batch = 8
  c.train.steps = 6000
  c.train.log_every_steps = 50
  c.optimizer.name = 'muon'
  c.optimizer.learning_rate = 2e-3
  c.optimizer.final_learning_rate = 1e-4
  c.optimizer.warmup_steps = 100
  c.optimizer.decay_steps = 1500
  c.eval.every_steps = 750
  c.eval.batches = 32
  c.sample.prompts = ('def read_file(', 'class ', 'import ')
  c.sample.block_length = 4
  c.sample.temperature = 0.7
  return c
