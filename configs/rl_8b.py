r"""Policy optimization of LLaDA 8B: ESPO's tasks, with its published settings.

python launch/rl.py --config configs/rl_8b.py --workdir DIR \
  --config.init_from=models/LLaDA-8B-Instruct
python launch/plan.py --config configs/rl_8b.py --topology v5p:2x2x1

configs/rl_8b.py:TASK sets the task, gsm8k, math, countdown (the default),
sudoku or code, and trains all parameters; TASK_lora, such as countdown_lora,
trains adapters. ESPO trains adapters, except for code. docs/rl_8b.md has the
plans, the files that gsm8k, math and code need, and what is not as published.

The values are those of ML-GSAI/ESPO at commit b5f2dac: recipes/train.yaml, and
above it recipes/run_TASK_llada.sh. A comment names another source, or says that
a value is not published.
"""

import os
import runpy

from maskdiff.config import choose

# group: num_generations. kl: beta. clip: epsilon. steps: diffusion_steps.
# rate, decay, norm: learning_rate, weight_decay, max_grad_norm.
_TASKS = {
  'gsm8k': dict(group=6, kl=1e-3, steps=256),
  'math': dict(group=16, kl=1e-3, steps=256),
  'countdown': dict(group=6, kl=3e-3, steps=128, clip=0.0),
  'sudoku': dict(group=6, kl=1e-2, steps=128),
  'code': dict(group=10, kl=1e-2, steps=256, rate=1e-6, decay=0.1, norm=0.8),
}
# Questions and reward. ESPO has other prompts; the rewards for countdown and
# sudoku are its own.
_QUESTIONS = {
  'gsm8k': ('gsm8k.jsonl', 'math'),
  'math': ('math.jsonl', 'math'),
  'countdown': ('countdown_tags', 'countdown_published'),
  'sudoku': ('sudoku_tags', 'sudoku_published'),
  'code': ('code.jsonl', 'code_reward.py:reward'),
}
TASKS = {
  task + suffix: (task, rank)
  for task in _TASKS
  for suffix, rank in (('', 0), ('_lora', 128))
}


def get_config(name='countdown'):
  task, rank = choose(TASKS, name)
  v = dict(clip=0.2, rate=3e-6, decay=0.01, norm=0.2) | _TASKS[task]
  path = os.path.join(os.path.dirname(__file__), '8b.py')
  c = runpy.run_path(path)['get_config']()

  c.policy.method = 'espo'  # M=2 (num_mc), k2, ratios per token, baseline
  c.policy.settings = (
    ('clip_low', v['clip']),
    ('clip_high', v['clip']),
    ('kl_weight', v['kl']),
  )
  c.policy.task, c.policy.reward = _QUESTIONS[task]
  # 8 processes x per_device_train_batch_size x gradient_accumulation_steps
  # answers: 96, for math 256, for code 160.
  c.policy.prompts = 16
  c.policy.group = v['group']
  c.policy.inner_steps = 8  # num_iterations
  c.policy.sampling_dtype = 'bfloat16'  # torch_dtype
  c.policy.reference_dtype = 'bfloat16'  # torch_dtype

  c.sample.prompts = ()
  c.sample.gen_length = 256  # max_completion_length
  c.sample.block_length = 32  # espo_trainer.py, generate
  c.sample.steps = v['steps']
  c.sample.temperature = 1.0  # generation_temperature
  c.sample.remasking = 'low_confidence'  # espo_trainer.py, generate

  # 400 tokens of the prompt (max_prompt_length) and 256 slots are 656; the
  # attention kernel takes multiples of 128.
  c.data.length = 768
  # 16 prompts per round are 467 rounds for the 7,473 questions of GSM8K, one
  # epoch (num_train_epochs). The numbers of other questions are not published.
  c.train.steps = 467 * c.policy.inner_steps
  c.train.batch = c.policy.prompts * c.policy.group
  c.train.microbatches = 1  # does not change the loss
  c.train.log_every_steps = 8  # a round; ESPO: every step
  c.model.remat = 'full'  # does not change the loss

  c.optimizer.schedule = 'wsd'  # constant_with_warmup
  c.optimizer.learning_rate = v['rate']
  c.optimizer.final_learning_rate = v['rate']
  c.optimizer.warmup_steps = 4  # warmup_ratio 0.001
  c.optimizer.decay_steps = 0
  c.optimizer.b1 = 0.9
  c.optimizer.b2 = 0.99
  c.optimizer.eps = 1e-8  # default of transformers
  c.optimizer.weight_decay = v['decay']
  c.optimizer.clip_norm = v['norm']
  c.guard.spike_sigmas = 0.0

  c.lora.rank = rank
  c.lora.alpha = 64.0
  c.lora.targets = ('all',)  # the seven projections
  c.lora.base_dtype = 'bfloat16'  # torch_dtype

  c.eval.every_steps = 80  # ESPO does not evaluate during the training
  c.eval.batch = 16
  c.eval.answers = 64
  c.checkpoint.every_steps = 80
  c.checkpoint.keep_every_steps = 800
  return c
