r"""Policy optimization of a tiny model on countdown, in minutes on a CPU.

python launch/tasks.py --task countdown --num 60000 --out countdown.jsonl
python tokenizer/train.py --input countdown.jsonl --vocab_size 293 \
  --out digits.model
python launch/prepare.py --source countdown.jsonl --tokenizer digits.model \
  --out data/countdown --row_length 144
python launch/pretrain.py --config configs/puzzles.py:countdown \
  --workdir runs/countdown --config.data.path=data/countdown \
  --config.data.tokenizer=digits.model --config.train.steps=4000 \
  --config.optimizer.decay_steps=1333
python launch/rl.py --config configs/rl_countdown.py --workdir runs/rl \
  --config.init_from=runs/countdown

docs/policy_methods.md has the results of these settings with each method. The
training ends after 125 rounds.
"""

from maskdiff.config import default


def get_config():
  c = default()
  c.policy.method = 'espo'
  c.policy.task = 'countdown'
  c.policy.prompts = 4
  c.policy.group = 8
  c.policy.inner_steps = 2
  c.policy.sampling_dtype = 'float32'
  c.policy.eval_temperature = 1.0
  c.data.length = 24
  c.model.dtype = 'float32'
  c.model.remat = 'none'
  c.train.batch = 32
  c.train.steps = 250
  c.train.log_every_steps = 4
  c.optimizer.learning_rate = 3e-4
  c.optimizer.final_learning_rate = 3e-4
  c.optimizer.warmup_steps = 8
  c.optimizer.decay_steps = 0
  c.optimizer.weight_decay = 0.0
  c.eval.every_steps = 50
  c.eval.answers = 200
  c.sample.prompts = ()
  c.sample.gen_length = 9
  c.sample.block_length = 9
  c.sample.steps = 9
  c.sample.temperature = 1.0
  return c
