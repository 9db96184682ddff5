"""LLaDA 8B: dimensions, batch and learning-rate plan of arXiv 2502.09992.

python launch/prepare.py --source TEXT --tokenizer LLADA/tokenizer.json \
  --out data/rows --row_length 4096 --workers 64
python launch/pretrain.py --config configs/8b.py --workdir DIR

8,015,581,184 parameters, 2.3T tokens in 438,690 steps of 1280 x 4096 (section
2.2 and appendix B.2): 0 -> 4e-4 over 2000 steps, constant to 1.2T tokens, 1e-4
for the next 0.8T, and down to 1e-5 over the last 0.3T. Adam's betas and the
clipping norm are not published; these are SMDM's (arXiv 2410.18514). The mask
token has a column in the head and is part of the softmax, as in LLaDA.

The token ids are those of LLaDA's tokenizer, a tokenizer.json; for another
tokenizer set config.tokens. launch/prepare.py copies the tokenizer to the rows.

configs/8b.py:MACHINE sets batch, microbatches and remat for a machine, by
default 64 chips of v5p with the paper's batch. On 256 chips, and on 64 chips of
Ironwood (tpu7x-128), the batch has 1536 rows, a fifth more, and the run reads
the same number of tokens. The recipe is
LLaDA's until another one is shown to learn faster at 150M parameters or more
(docs/recipes.md). configs/8b.py:llada is and stays this recipe.

configs/8b.py:illada and illada-v6e-256 have the shape of iLLaDA 8B (arXiv
2606.25331): tied embeddings, 8 heads of keys and values, rows of 8192 tokens,
12T tokens. Its learning rates and its batch are not published; these are
LLaDA's, with changes after the same shares of the tokens. The id of the mask
token is that of its sampler; set config.tokens to the ids of bos and eos of the
tokenizer.

configs/8b.py:32k and 128k have rows of 32,768 and 131,072 tokens, on 64 chips
of v5p. A batch has as many tokens as the paper's. Four and 16 chips share a
row, and in attention they share its heads.

Plans of launch/plan.py; the time is an optimistic estimate:
  v5p-128, v5p:4x4x4: 56.4 of 95.74 GiB per chip, 12.10 s per step, 433,343
    tokens/s, MFU 76%; 61 days and 94,357 chip-hours for all tokens.
  v5e-256, v5e:16x16: 10.1 of 15.75 GiB per chip, 10.34 s per step, 608,399
    tokens/s, MFU 62%; 44 days and 268,830 chip-hours for all tokens.
  v6e-256, v6e:16x16: 18.5 of 31.25 GiB per chip, 2.68 s per step, 2,351,171
    tokens/s, MFU 52%; 11 days and 69,563 chip-hours for all tokens.
  tpu7x-128, tpu7x:4x4x4: 54.9 of 94.75 GiB per chip, 4.33 s per step, 1,453,082
    tokens/s, MFU 51%; 18 days and 28,139 chip-hours for all tokens.
  illada, v5p:4x4x4: 55.1 of 95.74 GiB per chip, 15.12 s per step, 346,737
    tokens/s, MFU 69%; 401 days and 615,260 chip-hours for all tokens.
  illada-v6e-256, v6e:16x16: 19.7 of 31.25 GiB per chip, 2.19 s per step,
    1,918,694 tokens/s, MFU 48%; 72 days and 444,747 chip-hours for all tokens.
  32k, v5p:4x4x4: 57.4 of 95.74 GiB per chip, 33.57 s per step, 156,195
    tokens/s, MFU 51%; 170 days and 261,780 chip-hours for all tokens.
  128k, v5p:4x4x4: 60.5 of 95.74 GiB per chip, 99.52 s per step, 52,680
    tokens/s, MFU 45%; 505 days and 776,169 chip-hours for all tokens.
"""

from maskdiff.config import choose, default

MACHINES = {
  'v5p-128': dict(batch=1280, microbatches=5, remat='minimal'),
  'v5e-256': dict(batch=1536, microbatches=3, remat='attended'),
  'v6e-256': dict(batch=1536, microbatches=1, remat='attended'),
  'tpu7x-128': dict(batch=1536, microbatches=3, remat='minimal'),
}
MACHINES['llada'] = MACHINES['v5p-128']
# Rows of 8192 tokens.
MACHINES['illada'] = dict(batch=640, microbatches=5, remat='minimal', save=200)
MACHINES['illada-v6e-256'] = dict(batch=512, microbatches=1, remat='attention')
# Long rows on 64 chips of v5p.
MACHINES['32k'] = MACHINES['v5p-128'] | dict(
  batch=160, length=32_768, sequence=4, eval=32, save=100
)
MACHINES['128k'] = MACHINES['v5p-128'] | dict(
  batch=40, length=131_072, sequence=16, eval=8, save=25
)
LLADA_TOKENS, ILLADA_TOKENS = 2.3e12, 12e12


def get_config(machine='v5p-128'):
  plan = choose(MACHINES, machine)
  c = default()
  c.model.vocab_size = 126_464
  c.model.embed = 4096
  c.model.layers = 32
  c.model.heads = 32
  c.model.kv_heads = 32
  c.model.head_dim = 128
  c.model.mlp = 12_288
  c.model.tie_embeddings = False
  c.model.remat = plan['remat']

  c.tokens.mask_id = 126_336
  c.tokens.bos_id = 126_080
  c.tokens.eos_id = 126_081

  c.objective.predict_mask = True
  c.objective.time_density = 'uniform'
  c.objective.weight = 'bound'
  # Just over 1/8 of the masked tokens that a chip has in 4 rows.
  c.objective.loss_chunk_tokens = 1056

  c.data.path = 'data/rows'
  c.data.tokenizer = 'data/rows'
  c.data.length = plan.get('length', 4096)
  c.mesh.sequence = plan.get('sequence', 1)

  tokens = LLADA_TOKENS
  if machine.startswith('illada'):
    c.model.vocab_size = 155_136
    c.model.kv_heads = 8
    c.model.mlp = 14_336
    c.model.tie_embeddings = True
    c.tokens.update(mask_id=5, bos_id=1, eos_id=2)
    c.data.length = 8192
    tokens = ILLADA_TOKENS

  step_of = lambda share: round(
    share * tokens / (plan['batch'] * c.data.length)
  )
  c.optimizer.name = 'adamw'
  c.optimizer.schedule = 'piecewise'
  c.optimizer.pieces = (
    (2_000, 0.0, 4e-4),
    (step_of(1.2 / 2.3), 4e-4, 4e-4),
    (step_of(2.0 / 2.3), 1e-4, 1e-4),
    (step_of(1), 1e-4, 1e-5),
  )

  c.train.steps = step_of(1)
  c.train.batch = plan['batch']
  c.train.microbatches = plan['microbatches']
  c.eval.every_steps = 1000
  c.eval.batch = plan.get('eval', 256)
  c.eval.batches = 4
  c.sample.gen_length = 128
  c.sample.block_length = 32
  c.sample.steps = 128
  c.guard.spike_sigmas = 6.0  # large batches have no spikes by chance
  c.checkpoint.every_steps = plan.get('save', 250)  # less than an hour
  c.checkpoint.keep_every_steps = 10_000
  return c
