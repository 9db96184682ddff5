r"""Preference learning of the tiny run, in minutes on a CPU.

python launch/instructions.py --pairs --num 20000 --out pairs.jsonl \
  --tasks larger,capitals,letters,last_letter
python launch/prepare.py --source pairs.jsonl --chat plain --layout pairs \
  --tokenizer tokenizer/stdlib_4k.model --out data/pairs --row_length 96 \
  --heldout_fraction 0.02
python launch/preferences.py --config configs/preferences_tiny.py \
  --workdir runs/preferences --config.init_from=runs/tiny \
  --config.data.path=data/pairs

The learning rate is not tuned.
"""

from maskdiff.config import default


def get_config():
  c = default()
  c.policy.method = 'vrpo'
  c.policy.settings = (('times', 4),)
  c.train.batch = 16
  c.train.steps = 200
  c.train.log_every_steps = 10
  c.optimizer.learning_rate = 5e-4
  c.optimizer.final_learning_rate = 5e-5
  c.optimizer.warmup_steps = 20
  c.optimizer.decay_steps = 100
  c.optimizer.weight_decay = 0.01
  c.model.dtype = 'float32'
  c.eval.every_steps = 50
  c.eval.batch = 32
  c.eval.batches = 8
  c.sample.prompts = ()
  return c
