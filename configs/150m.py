"""About 150 million parameters: one TPU chip or GPU, on the embedded corpus.

python launch/pretrain.py --config configs/150m.py --workdir runs/150m

153,641,984 parameters; 5000 steps of 64 x 1024 tokens are 35 epochs. It has
not been trained yet.
"""

from maskdiff.config import default


def get_config():
  c = default()
  c.model.embed = 1024
  c.model.layers = 12
  c.model.heads = 8
  c.model.kv_heads = 8
  c.model.head_dim = 128
  c.model.mlp = 2688
  c.data.length = 1024
  c.train.batch = 64
  c.train.steps = 5000
  c.optimizer.learning_rate = 6e-4
  c.optimizer.final_learning_rate = 6e-5
  c.optimizer.warmup_steps = 500
  c.optimizer.decay_steps = 1000
  c.eval.batch = 32
  c.sample.prompts = ('def read_file(', 'class ')
  c.sample.gen_length = 128
  c.sample.steps = 128
  return c
