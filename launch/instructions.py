r"""Writes a small instruction set; see maskdiff/evals/instructions.py.

python launch/instructions.py --num 20000 --out instructions.jsonl
python launch/prepare.py --source instructions.jsonl --chat plain --turns all \
  --tokenizer tokenizer/stdlib_4k.model --out data/instructions \
  --row_length 256
python launch/instructions.py --heldout --num 500 --out heldout.jsonl

Lines for training are conversations with "messages". With --heldout, lines are
questions with "prompt", "answer" and "task", none of which is in a conversation
for training, whatever the seeds. --reasoning_gym=basic_arithmetic,gcd writes
questions of the package reasoning-gym instead. With --pairs, lines have a
"prompt", and as "chosen" and "rejected" a right and a wrong answer.
"""

import json
import sys

from absl import flags

from maskdiff import config
from maskdiff.errors import UserError
from maskdiff.evals import instructions, reasoning_tasks
from maskdiff.files import outputs

flags.DEFINE_integer(
  'num', 1000, 'Number of lines.', lower_bound=1, upper_bound=10_000_000
)
flags.DEFINE_integer('seed', 0, 'Random seed.', lower_bound=0)
flags.DEFINE_list(
  'tasks',
  None,
  f'Tasks, separated by commas: {", ".join(instructions.TASKS)}. Default: all.',
)
flags.DEFINE_list(
  'reasoning_gym', [], 'Tasks of the package reasoning-gym, instead of our own.'
)
flags.DEFINE_bool(
  'heldout', False, 'Write questions for evaluation, not conversations.'
)
flags.DEFINE_bool(
  'pairs', False, 'Write a right and a wrong answer to each question.'
)
flags.DEFINE_string('out', None, 'Output file of JSON lines.')
flags.mark_flags_as_required(['out'])


def main(args):
  if args.tasks and args.reasoning_gym:
    raise UserError('give one of --tasks and --reasoning_gym')
  if args.pairs and (args.heldout or args.reasoning_gym):
    raise UserError(
      '--pairs has questions for training, of --tasks: remove --heldout and '
      '--reasoning_gym'
    )
  outputs.check('out', args.out)
  if args.reasoning_gym:
    lines = reasoning_tasks.questions(
      args.reasoning_gym, args.seed, args.num, args.heldout
    )
  elif args.pairs:
    lines = instructions.preferences(args.seed, args.num, args.tasks)
  elif args.heldout:
    lines = instructions.questions(args.seed, args.num, True, args.tasks)
  else:
    lines = instructions.conversations(args.seed, args.num, args.tasks)
  content = ''.join(json.dumps(line) + '\n' for line in lines)
  outputs.write('out', args.out, content)
  print(f'{args.out}: {len(lines)} lines', file=sys.stderr)


if __name__ == '__main__':
  config.run_script(main)
