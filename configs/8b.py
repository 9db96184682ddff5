"""LLaDA 8B: dimensions, batch and learning-rate plan of arXiv 2502.09992.

python launch/prepare.py --source TEXT --tokenizer LLADA/tokenizer.json \
  --out data/rows --row_length 4096 --workers 64
python launch/pretrain.py --config configs/8b.py --workdir DIR

8,015,581,184 parameters, 2.3T tokens in 438,690 steps of 1280 x 4096 (section
2.2 and appendix B.2): 0 -> 4e-4 over 2000 steps, constant to 1.2T tokens, 1e-4
for the next 0.8T, and down to 1e-5 over the last 0.3T. Adam's betas and the
clipping are not published; these are SMDM's (arXiv 2410.18514). The mask id
has a column in the head and takes part in the softmax, as in LLaDA.

The token ids are those of LLaDA's own tokenizer, a tokenizer.json; for another
one set config.tokens. Preparation leaves a copy of it with the rows. Batch and
microbatches are for 64 chips of v5p: 4 rows a chip at a time. The TPU compiler
says that this step takes 66.7 of a chip's 95 GiB (tests/test_pods.py).
"""

from maskdiff.config import default


def get_config():
  c = default()
  c.model.vocab_size = 126_464
  c.model.embed = 4096
  c.model.layers = 32
  c.model.heads = 32
  c.model.kv_heads = 32
  c.model.head_dim = 128
  c.model.mlp = 12_288
  c.model.tie_embeddings = False
  c.model.remat = 'minimal'

  c.tokens.mask_id = 126_336
  c.tokens.bos_id = 126_080
  c.tokens.eos_id = 126_081

  c.objective.predict_mask = True
  c.objective.loss_chunk_tokens = 1024

  c.optimizer.schedule = 'piecewise'
  c.optimizer.pieces = (
    (2_000, 0.0, 4e-4),
    (228_882, 4e-4, 4e-4),
    (381_470, 1e-4, 1e-4),
    (438_690, 1e-4, 1e-5),
  )

  c.data.path = 'data/rows'
  c.data.tokenizer = 'data/rows'
  c.data.length = 4096

  c.train.steps = 438_690
  c.train.batch = 1280
  c.train.microbatches = 5
  c.eval.every_steps = 1000
  c.eval.batch = 256
  c.eval.batches = 4
  c.sample.gen_length = 128
  c.sample.block_length = 32
  c.sample.steps = 128
  c.checkpoint.every_steps = 1000
  return c
