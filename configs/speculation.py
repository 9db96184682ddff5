r"""An autoregressive model of 10.4M parameters, and networks trained from it.

python benchmarks/copying.py --out copying.jsonl
python launch/prepare.py --source copying.jsonl --out data/copying \
  --tokenizer tokenizer/stdlib_4k.model --row_length 128 \
  --heldout_fraction 0.02
python launch/pretrain.py --config configs/speculation.py \
  --workdir runs/autoregressive
python launch/pretrain.py --config configs/speculation.py:sdlm_8 \
  --workdir runs/sdlm_8 --config.init_from=runs/autoregressive

The data are the embedded corpus and a copying task. The recipe is that of
configs/proof.py. The networks of METHODS predict several tokens per pass.
docs/speculation.md compares them.
"""

from maskdiff.config import choose, default

METHODS = {'autoregressive': {}, 'continued': {}}
METHODS |= {
  f'sdlm_{d}': {'objective.name': 'sdlm', 'objective.window_length': d}
  for d in (4, 8, 16, 32)
}
METHODS |= {
  f'blocks_{length}': {
    'objective.name': 'block_diffusion',
    'objective.block_length': length,
    'model.predict_next': True,
  }
  for length in (4, 16, 32)
}
METHODS['masked'] = {
  'objective.name': 'masked_diffusion',
  'model.predict_next': True,
}
# A step of a drafter takes less time, because the network has no backward pass:
# their trainings have about the time of the others on a CPU core.
METHODS |= {
  f'{kind}_8': {
    'objective.name': 'drafting',
    'objective.window_length': 8,
    'drafter.kind': kind,
    'drafter.layers': 1,  # of a block drafter
    'train.steps': steps,
    'optimizer.decay_steps': steps // 2,
    'optimizer.learning_rate': rate,
    'eval.every_steps': steps,
  }
  for kind, steps, rate in (
    ('medusa', 300, 4e-3),
    ('mtp', 120, 4e-3),
    ('block', 240, 2e-3),
  )
}


def get_config(method='autoregressive'):
  c = default()
  c.model.embed = 384
  c.model.layers = 5
  c.model.heads = 6
  c.model.kv_heads = 6
  c.model.head_dim = 64
  c.model.mlp = 1024
  c.model.rope_theta = 1000.0
  c.model.dtype = 'float32'
  c.model.remat = 'none'
  c.model.zero_outputs = True
  c.objective.name = 'autoregressive'
  c.objective.time_density = 'bell'
  c.data.path = 'embedded=1,data/copying=1'
  c.data.length = 128
  c.train.batch = 16
  c.train.steps = 1060
  c.train.log_every_steps = 10
  c.optimizer.name = 'muon'
  c.optimizer.learning_rate = 2e-3
  c.optimizer.final_learning_rate = 1e-4
  c.optimizer.warmup_steps = 40
  c.optimizer.decay_steps = 300
  c.eval.every_steps = 250
  c.eval.batch = 16
  c.eval.batches = 4
  c.sample.prompts = ()
  if method != 'autoregressive':
    c.train.steps = 60
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 8
    c.optimizer.decay_steps = 30
    c.eval.every_steps = 60
  c.update_from_flattened_dict(choose(METHODS, method))
  return c
