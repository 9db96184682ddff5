r"""Writes puzzles to train on, or to be asked; see maskdiff/evals/puzzles.py.

python launch/puzzles.py --task sudoku --num 60000 --out sudoku.jsonl
python launch/prepare.py --source sudoku.jsonl --out data/sudoku \
  --tokenizer digits.model --row_length 136
python launch/puzzles.py --task sudoku --heldout --num 200 --out asked.jsonl

The files are JSON lines with "prompt" and "answer", those to train on with
"text" besides. No puzzle is both trained on and asked, whatever the seeds.
"""

import json

from absl import flags

from maskdiff import config
from maskdiff.errors import writing
from maskdiff.evals import puzzles

flags.DEFINE_enum('task', None, sorted(puzzles.PUZZLES), 'Which puzzles.')
flags.DEFINE_integer('num', 1000, 'How many.', lower_bound=1)
flags.DEFINE_integer('seed', 0, 'Of the draw.', lower_bound=0)
flags.DEFINE_integer(
  'digits', puzzles.DIGITS, 'Of the numbers of addition.', lower_bound=1
)
flags.DEFINE_bool('heldout', False, 'Puzzles to be asked, not to train on.')
flags.DEFINE_string('out', None, 'File of JSON lines to write.')
flags.mark_flags_as_required(['task', 'out'])


def main(args):
  what = args.task, args.seed, args.num
  if args.heldout:
    lines = puzzles.make(*what, digits=args.digits)
  else:
    lines = puzzles.training_lines(*what, digits=args.digits)
  with writing('out', args.out), open(args.out, 'w', encoding='utf-8') as f:
    f.writelines(json.dumps(line) + '\n' for line in lines)


if __name__ == '__main__':
  config.run_script(main)
