r"""Fine-tuning of LLaDA 8B on small slices: adapters (LoRA), or all weights.

python launch/finetune.py --config configs/sft_8b.py --workdir DIR \
  --config.init_from=models/LLaDA-8B-Base --config.data.path=data/chat

8,099,467,264 parameters, of which 83,886,080 are adapters of rank 32. The
recipe is that of configs/sft.py, on rows of 4096 tokens; adapters have the
learning rate 2e-4. configs/sft_8b.py:MACHINE sets what is trained, and
microbatches and remat for a machine, by default adapters on 8 chips of v5e.
docs/fine_tuning.md has the plans. All weights do not fit 8 chips of v5e.
"""

import os
import runpy

from maskdiff.config import choose

MACHINES = {
  'v5e-8-lora': dict(rank=32, microbatches=32, remat='attended'),
  'v6e-8-lora': dict(rank=32, microbatches=16, remat='attended'),
  'v5p-8-lora': dict(rank=32, microbatches=16, remat='minimal'),
  'v6e-8': dict(rank=0, microbatches=32, remat='full'),
  'v5p-8': dict(rank=0, microbatches=16, remat='minimal'),
}


def get_config(machine='v5e-8-lora'):
  plan = choose(MACHINES, machine)
  read = lambda name: runpy.run_path(
    os.path.join(os.path.dirname(__file__), name)
  )['get_config']()
  c = read('sft.py')
  of_model = read('8b.py')
  for section in ('model', 'tokens'):
    c[section].update(of_model[section])
  c.model.remat = plan['remat']
  c.objective.predict_mask = True
  c.objective.loss_chunk_tokens = 1056
  c.data.length = 4096
  c.train.microbatches = plan['microbatches']
  c.eval.batch = 16
  c.eval.batches = 16
  c.checkpoint.every_steps = 50  # less than an hour
  c.lora.rank = plan['rank']
  c.lora.base_dtype = 'bfloat16'
  if c.lora.rank:
    c.optimizer.learning_rate = 2e-4
    c.optimizer.final_learning_rate = 2e-5
  return c
