r"""Supervised fine-tuning (SFT) of a trained model on rows with answers.

python launch/finetune.py --config configs/sft.py --workdir runs/sft \
  --config.init_from=models/LLaDA-8B-Base --config.data.path=data/chat

The recipe of LLaDA 8B Instruct (arXiv 2502.09992, section 2.3 and appendix
B.1): 3 epochs, batch 256, learning rate 2.5e-5 after 50 steps of warmup, down
to 2.5e-6 over the last tenth, weight decay 0.1. LLaDA divides the loss of each
row by its own answer tokens: --config.objective.denominator=row.
launch/finetune.py takes the model, the row length and the number of steps from
config.init_from and config.data.path.
"""

from maskdiff.config import default


def get_config():
  c = default()
  c.objective.time_density = 'uniform'
  c.objective.weight = 'bound'
  c.objective.random_length_fraction = 0.0
  c.objective.attend_within = 'document'
  c.train.epochs = 3.0
  c.train.batch = 256
  c.optimizer.learning_rate = 2.5e-5
  c.optimizer.final_learning_rate = 2.5e-6
  c.optimizer.warmup_steps = 50
  c.optimizer.weight_decay = 0.1
  c.eval.every_steps = 200
  c.sample.prompts = ()
  return c
