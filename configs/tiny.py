"""2.6 million parameters on the embedded corpus, in minutes on two CPU cores.

python launch/pretrain.py --config configs/tiny.py --workdir runs/tiny

Expect a bound of 4.6 nats per token on held-out text; the unigram entropy is
6.2. docs/recipes.md compares the recipe, bell-shaped times, Muon and zero
outputs, with LLaDA's. Rows are short, so rope_theta is 1000 instead of 500000:
with short rotary wavelengths the bound falls faster.
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
  c.model.remat = 'none'
  c.model.zero_outputs = True
  c.objective.time_density = 'bell'
  c.objective.loss_chunk_tokens = 128
  c.data.length = 128
  c.train.batch = 8
  c.train.steps = 1100
  c.train.log_every_steps = 20
  c.optimizer.name = 'muon'
  c.optimizer.learning_rate = 2e-3
  c.optimizer.final_learning_rate = 1e-4
  c.optimizer.warmup_steps = 60
  c.optimizer.decay_steps = 350
  c.eval.every_steps = 220
  c.eval.batches = 16
  c.sample.prompts = ('def read_file(',)
  c.sample.block_length = 4
  c.sample.temperature = 0.7
  return c
