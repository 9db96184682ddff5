r"""Preference learning (VRPO) of a fine-tuned model on pairs of answers.

python launch/preferences.py --config configs/preferences.py \
  --workdir runs/preferences --config.init_from=models/LLaDA-8B-Instruct \
  --config.data.path=data/pairs

The recipe of LLaDA 1.5 (arXiv 2505.19223): one epoch, batches of 64 pairs, 8
masks per answer that policy and reference share, beta 0.2, 0.05 times the loss
of fine-tuning, AdamW with weight decay 0.01, and learning rate 5e-7 after 15
steps of warmup, with cosine decay.
"""

from maskdiff.config import default


def get_config():
  c = default()
  c.policy.method = 'vrpo'
  c.policy.settings = (
    ('times', 8),
    ('masks_per_time', 1),
    ('preference_scale', 0.2),
    ('chosen_weight', 0.05),
  )
  c.train.epochs = 1.0
  c.train.batch = 64
  c.optimizer.schedule = 'cosine'
  c.optimizer.learning_rate = 5e-7
  c.optimizer.final_learning_rate = 0.0
  c.optimizer.warmup_steps = 15
  c.optimizer.weight_decay = 0.01
  c.eval.every_steps = 200
  c.sample.prompts = ()
  return c
