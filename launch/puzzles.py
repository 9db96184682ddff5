r"""Writes puzzles for training or evaluation; see maskdiff/evals/puzzles.py.

python launch/puzzles.py --task sudoku --num 60000 --out sudoku.jsonl
python launch/prepare.py --source sudoku.jsonl --out data/sudoku \
  --tokenizer digits.model --row_length 136
python launch/puzzles.py --task sudoku --heldout --num 200 --out heldout.jsonl

The files are JSON lines with "prompt" and "answer"; lines for training also
have "text". No training puzzle is an evaluation puzzle, whatever the seeds.
"""

import json
import sys

from absl import flags

from maskdiff import config
from maskdiff.evals import puzzles
from maskdiff.files import outputs

flags.DEFINE_enum('task', None, sorted(puzzles.PUZZLES), 'Kind of puzzle.')
flags.DEFINE_integer(
  'num', 1000, 'Number of puzzles.', lower_bound=1, upper_bound=10_000_000
)
flags.DEFINE_integer('seed', 0, 'Random seed.', lower_bound=0)
flags.DEFINE_integer(
  'digits',
  puzzles.DIGITS,
  'Digits of the numbers in addition.',
  lower_bound=1,
  upper_bound=1000,
)
flags.DEFINE_bool(
  'heldout', False, 'Write evaluation puzzles instead of training puzzles.'
)
flags.DEFINE_string('out', None, 'Output file of JSON lines.')
flags.mark_flags_as_required(['task', 'out'])


def main(args):
  outputs.check('out', args.out)
  task = args.task, args.seed, args.num
  if args.heldout:
    lines = puzzles.make(*task, digits=args.digits)
  else:
    lines = puzzles.training_lines(*task, digits=args.digits)
  content = ''.join(json.dumps(line) + '\n' for line in lines)
  outputs.write('out', args.out, content)
  print(f'{args.out}: {len(lines)} lines', file=sys.stderr)


if __name__ == '__main__':
  config.run_script(main)
