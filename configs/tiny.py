"""A few million parameters on the embedded corpus, in minutes on a laptop.

python launch/pretrain.py --config configs/tiny.py --workdir runs/tiny
"""

from maskdiff.config import default


def get_config():
  c = default()
  c.model.embed = 192
  c.model.layers = 6
  c.model.heads = 6
  c.model.kv_heads = 6
  c.model.head_dim = 32
  c.model.mlp = 512
  c.model.dtype = 'float32'
  c.model.remat = 'none'
  c.data.length = 128
  c.train.batch = 32
  c.train.steps = 300
  c.optimizer.learning_rate = 2e-3
  c.optimizer.final_learning_rate = 1e-4
  c.optimizer.warmup_steps = 50
  c.optimizer.decay_steps = 100
  c.eval.steps = 100
  c.sample.prompts = ('def read_file(',)
  return c
