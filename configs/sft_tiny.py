r"""Fine-tunes the tiny run on a small instruction set, in minutes on a CPU.

python launch/instructions.py --num 60000 --out instructions.jsonl \
  --tasks addition,addition,addition,letters,last_letter,module
python launch/prepare.py --source instructions.jsonl --chat plain --turns all \
  --align 16 --fill_eos --tokenizer tokenizer/stdlib_4k.model \
  --out data/instructions --row_length 128
python launch/finetune.py --config configs/sft_tiny.py --workdir runs/chat \
  --config.init_from=runs/tiny --config.data.path=data/instructions
python launch/chat.py --workdir runs/chat --chat_template plain --gen_length 16

The recipe is that of configs/tiny.py. docs/fine_tuning.md has a transcript, and
the results on puzzles.
"""

from maskdiff.config import default


def get_config():
  c = default()
  c.objective.time_density = 'bell'
  c.objective.random_length_fraction = 0.0
  c.objective.attend_within = 'document'
  c.train.batch = 16
  c.train.steps = 2500
  c.train.log_every_steps = 20
  c.optimizer.name = 'muon'
  c.optimizer.learning_rate = 2e-3
  c.optimizer.final_learning_rate = 1e-4
  c.optimizer.warmup_steps = 50
  c.optimizer.decay_steps = 900
  c.eval.every_steps = 500
  c.eval.batch = 16
  c.eval.batches = 4
  c.eval.answers = 100
  c.sample.prompts = ()
  return c
