"""LLaDA 1B: dimensions and batch of arXiv 2502.09992, appendix B.2.

python launch/prepare.py --source TEXT --tokenizer LLADA/tokenizer.json \
  --out data/rows --row_length 4096 --workers 64
python launch/pretrain.py --config configs/1b.py --workdir DIR

1,487,243,264 parameters. The learning rate, 4e-4, and the batch, 1280 x 4096,
are the paper's; the length of the run is not published exactly: 88,000 steps,
461B tokens, is the last point of its scaling curves.

The token ids are those of LLaDA's own tokenizer, a tokenizer.json; for another
one set config.tokens. Preparation leaves a copy of it with the rows. Batch and
microbatches are for 8 chips of v5e: 2 rows a chip at a time. The TPU compiler
says that this step takes 12.3 of a chip's 16 GiB (tests/test_pods.py).
"""

from maskdiff.config import default


def get_config():
  c = default()
  c.model.vocab_size = 126_464
  c.model.embed = 2048
  c.model.layers = 22
  c.model.heads = 32
  c.model.kv_heads = 4
  c.model.head_dim = 64
  c.model.mlp = 5634
  c.model.tie_embeddings = False

  c.tokens.mask_id = 126_336
  c.tokens.bos_id = 126_080
  c.tokens.eos_id = 126_081

  c.objective.predict_mask = True
  c.objective.loss_chunk_tokens = 1024

  c.optimizer.learning_rate = 4e-4
  c.optimizer.final_learning_rate = 4e-5
  c.optimizer.warmup_steps = 2000
  c.optimizer.decay_steps = 8800

  c.data.path = 'data/rows'
  c.data.tokenizer = 'data/rows'
  c.data.length = 4096

  c.train.steps = 88_000
  c.train.batch = 1280
  c.train.microbatches = 80
  c.eval.every_steps = 1000
  c.eval.batch = 64
  c.eval.batches = 8
  c.sample.gen_length = 128
  c.sample.block_length = 32
  c.sample.steps = 128
  c.checkpoint.every_steps = 1000
  return c
