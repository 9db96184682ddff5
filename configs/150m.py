"""About 150 million parameters: one TPU chip or GPU, on the embedded corpus.

python launch/pretrain.py --config configs/150m.py --workdir runs/150m

153,641,984 parameters; 5000 steps of 64 x 1024 tokens are 328M tokens, 35
epochs. It has not been trained yet.

configs/150m.py:MACHINE sets microbatches and config.model.remat for a machine,
by default one chip of v5e. `gpu` has the least memory, and no plan. A v6e chip
has memory for remat=minimal in one microbatch (22.1 GiB), but in the plan it is
slower: 0.37 s per step.

Plans of launch/plan.py; the time is an optimistic estimate:
  v5e-1, v5e:1x1: 6.9 of 15.75 GiB per chip, 0.72 s per step, 90,696 tokens/s,
    MFU 49%; 1 hours and 1 chip-hours for all tokens.
  v6e-1, v6e:1x1: 3.6 of 31.25 GiB per chip, 0.29 s per step, 224,125 tokens/s,
    MFU 26%; 0.406 hours and 0.406 chip-hours for all tokens.
"""

from maskdiff.config import choose, default

MACHINES = {
  'v5e-1': dict(microbatches=4, remat='minimal', chunk=8448),
  'v6e-1': dict(microbatches=8, remat='attention', chunk=4352),
  'gpu': dict(microbatches=1, remat='full', chunk=8320),
}


def get_config(machine='v5e-1'):
  plan = choose(MACHINES, machine)
  c = default()
  c.model.embed = 1024
  c.model.layers = 12
  c.model.heads = 8
  c.model.kv_heads = 8
  c.model.head_dim = 128
  c.model.mlp = 2688
  c.model.remat = plan['remat']
  c.model.zero_outputs = True
  c.objective.time_density = 'bell'
  # Just over 1/4 of the masked tokens of the batch.
  c.objective.loss_chunk_tokens = plan['chunk']
  c.data.length = 1024
  c.train.batch = 64
  c.train.microbatches = plan['microbatches']
  c.train.steps = 5000
  c.optimizer.name = 'muon'
  c.optimizer.learning_rate = 6e-4
  c.optimizer.final_learning_rate = 6e-5
  c.optimizer.warmup_steps = 500
  c.optimizer.decay_steps = 1000
  c.eval.batch = 32
  c.sample.prompts = ('def read_file(', 'class ')
  c.sample.gen_length = 128
  c.sample.steps = 128
  return c
