r"""A small model on a puzzle of maskdiff/evals/puzzles.py, in minutes on a CPU.

python launch/puzzles.py --task sudoku --num 60000 --out sudoku.jsonl
python tokenizer/train.py --input sudoku.jsonl --vocab_size 282 \
  --out digits.model
python launch/prepare.py --source sudoku.jsonl --tokenizer digits.model \
  --out data/sudoku --row_length 136
python launch/pretrain.py --config configs/puzzles.py --workdir runs/sudoku \
  --config.data.path=data/sudoku --config.data.tokenizer=digits.model
python launch/evaluate.py --workdir runs/sudoku --task sudoku

For other puzzles use configs/puzzles.py:countdown and so on, with the
vocabulary and the row length below. docs/evaluation.md has the results.
"""

from maskdiff.config import choose, default

# Vocabulary size, tokens per row, attend_within. The vocabulary is as small as
# possible: characters, and also names for reversal. A row holds a whole number
# of puzzles, so that no puzzle is cut. The facts of reversal vary in length, so
# rows pack them like text.
PUZZLES = {
  'sudoku': (282, 136, 'document'),
  'addition': (288, 100, 'document'),
  'countdown': (293, 144, 'document'),
  'reversal': (450, 128, 'row'),
}


def get_config(puzzle='sudoku'):
  c = default()
  vocab_size, length, attend_within = choose(PUZZLES, puzzle)
  c.model.vocab_size = vocab_size
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
  c.train.steps = 2000
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
