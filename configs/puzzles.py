"""0.6 million parameters on a puzzle of maskdiff/evals/puzzles.py.

python launch/puzzles.py --task addition --num 200000 --out addition.jsonl
python launch/prepare.py --source addition.jsonl --out data/addition \
  --tokenizer tokenizer/stdlib_4k.model --row_length 130
python launch/pretrain.py --config configs/puzzles.py:addition \
  --workdir runs/addition --config.data.path=data/addition
python launch/evaluate.py --workdir runs/addition --task addition

Likewise sudoku, countdown and reversal, with the row length below: a whole
number of puzzles but for reversal. docs/evaluation.md says what comes out.
"""

from maskdiff.config import choose, default

# Tokens of a row, steps, and what a position sees.
PUZZLES = {
  'addition': (100, 2000, 'document'),
  'sudoku': (136, 2000, 'document'),
  'countdown': (144, 2000, 'document'),
  'reversal': (128, 2000, 'row'),
}


def get_config(puzzle='addition'):
  c = default()
  length, steps, attend_within = choose(PUZZLES, puzzle)
  c.model.embed = 64
  c.model.layers = 4
  c.model.heads = 4
  c.model.kv_heads = 4
  c.model.head_dim = 16
  c.model.mlp = 192
  c.model.rope_theta = 100.0
  c.model.dtype = 'float32'
  c.model.remat = 'none'
  c.objective.attend_within = attend_within
  c.data.length = length
  c.train.batch = 16
  c.train.steps = steps
  c.train.log_every_steps = 50
  c.optimizer.learning_rate = 3e-3
  c.optimizer.final_learning_rate = 1e-4
  c.optimizer.warmup_steps = 100
  c.optimizer.decay_steps = 600
  c.eval.every_steps = 1000
  c.eval.batch = 16
  c.eval.batches = 2
  c.sample.prompts = ()
  return c
