"""LLaDA 1B: dimensions and batch of arXiv 2502.09992, appendix B.2.

python launch/prepare.py --source TEXT --tokenizer LLADA/tokenizer.json \
  --out data/rows --row_length 4096 --workers 64
python launch/pretrain.py --config configs/1b.py --workdir DIR

1,487,243,264 parameters. The learning rate, 4e-4, and the batch, 1280 x 4096,
are the paper's. The paper does not give the exact length of the run; 88,000
steps, 461B tokens, is the last point of its scaling curves. Bell-shaped times,
Muon and zero outputs are not the paper's: docs/recipes.md has what they gain at
2.6M and 12M parameters, and the flags of the paper's recipe.

The token ids are those of LLaDA's tokenizer, a tokenizer.json; for another
tokenizer set config.tokens. launch/prepare.py copies the tokenizer to the rows.

configs/1b.py:MACHINE sets batch, microbatches and steps between checkpoints for
a machine, by default 8 chips of v5e. One chip of v6e, as in Colab, trains the
whole model on batches of 64 rows. The state does not fit one chip of v5e, so
`v5e-1` has 9 of the 22 layers. `v6e-1` and `v5e-1` store the moments in
bfloat16 and read 23B tokens. Their learning rate has not been tried with such a
small batch.

configs/1b.py:tpu has 16 heads of 128 channels instead of 32 of 64, and 5632
hidden channels of the feed-forward layers instead of 5634. The attention
kernel takes as long for a head of 64 channels as for one of 128. It has 1.51B
parameters, and the batches of v6e-8.

Plans of launch/plan.py; the time is an optimistic estimate:
  v5e-8, v5e:2x4: 13.0 of 15.75 GiB per chip, 71.90 s per step, 72,922 tokens/s,
    MFU 44%; 73 days and 14,060 chip-hours for all tokens.
  v6e-8, v6e:2x4: 19.1 of 31.25 GiB per chip, 20.03 s per step, 261,717
    tokens/s, MFU 34%; 20 days and 3,917 chip-hours for all tokens.
  v6e-1, v6e:1x1: 27.5 of 31.25 GiB per chip, 8.78 s per step, 29,869 tokens/s,
    MFU 31%; 8.94 days and 215 chip-hours for all tokens.
  v5e-1, v5e:1x1: 14.3 of 15.75 GiB per chip, 13.95 s per step, 18,788 tokens/s,
    MFU 46%; 14 days and 341 chip-hours for all tokens.
  tpu, v6e:2x4: 17.0 of 31.25 GiB per chip, 15.25 s per step, 343,688 tokens/s,
    MFU 46%; 16 days and 2,983 chip-hours for all tokens.
"""

from maskdiff.config import choose, default

# `chunk` is a little more than a whole part of the masked tokens of a chip in a
# microbatch.
MACHINES = {
  'v5e-8': dict(
    batch=1280, microbatches=80, remat='minimal', chunk=1088, save=25
  ),
  'v6e-8': dict(
    batch=1280, microbatches=20, remat='attention', chunk=2112, save=80
  ),
  'v6e-1': dict(
    batch=64, microbatches=16, remat='attention', chunk=2176, save=200
  ),
  'v5e-1': dict(
    batch=64, microbatches=32, remat='attended', chunk=1088, save=125
  ),
}
MACHINES['tpu'] = MACHINES['v6e-8']


def get_config(machine='v5e-8'):
  plan = choose(MACHINES, machine)
  c = default()
  c.model.vocab_size = 126_464
  c.model.embed = 2048
  c.model.layers = 22
  c.model.heads = 32
  c.model.kv_heads = 4
  c.model.head_dim = 64
  c.model.mlp = 5634
  c.model.tie_embeddings = False
  c.model.remat = plan['remat']
  c.model.zero_outputs = True

  c.tokens.mask_id = 126_336
  c.tokens.bos_id = 126_080
  c.tokens.eos_id = 126_081

  c.objective.predict_mask = True
  c.objective.loss_chunk_tokens = plan['chunk']
  c.objective.time_density = 'bell'

  c.optimizer.name = 'muon'
  c.optimizer.learning_rate = 4e-4
  c.optimizer.final_learning_rate = 4e-5
  c.optimizer.warmup_steps = 2000
  c.optimizer.decay_steps = 8800

  c.data.path = 'data/rows'
  c.data.tokenizer = 'data/rows'
  c.data.length = 4096

  c.train.steps = 88_000
  c.train.batch = plan['batch']
  c.train.microbatches = plan['microbatches']
  c.eval.every_steps = 1000
  c.eval.batch = 64
  c.eval.batches = 8
  c.sample.gen_length = 128
  c.sample.block_length = 32
  c.sample.steps = 128
  c.checkpoint.every_steps = plan['save']  # about every 35 minutes
  if machine.endswith('-1'):
    c.optimizer.moments = 'bfloat16'
    c.eval.batch = 4
    c.eval.batches = 128
  if machine == 'v5e-1':
    c.model.layers = 9
  if machine == 'tpu':
    c.model.heads = 16
    c.model.head_dim = 128
    c.model.mlp = 5632
  return c
