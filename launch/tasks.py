r"""Writes questions of reinforcement learning; see maskdiff/rl/tasks.py.

python launch/tasks.py --task countdown --num 20000 --out countdown.jsonl
python launch/tasks.py --task countdown --heldout --num 200 --out heldout.jsonl
python launch/tasks.py --task countdown --num 100 --reward my_rewards.py:score

The lines have "prompt" and "answer"; lines for training also have "text", for
launch/prepare.py. They train the model with which reinforcement learning
begins. No question for training is like one of --heldout, whatever the seeds.
--reward scores the right answers, to try a reward of your own.
"""

import json
import sys

from absl import flags

from maskdiff import config
from maskdiff.errors import UserError
from maskdiff.files import outputs
from maskdiff.rl import reward_pool, rewards, tasks

flags.DEFINE_string(
  'task',
  None,
  f'{", ".join(tasks.TASKS)}; reasoning_gym:NAME,NAME; or FILE.jsonl with '
  '"prompt" and "answer".',
)
flags.DEFINE_integer(
  'num', 1000, 'Number of questions.', lower_bound=1, upper_bound=10_000_000
)
flags.DEFINE_integer('seed', 0, 'Random seed.', lower_bound=0)
flags.DEFINE_bool(
  'heldout', False, 'Questions for evaluation instead of training.'
)
flags.DEFINE_string('out', None, 'Output file of JSON lines.')
flags.DEFINE_string(
  'reward',
  None,
  f'Score the right answers: {", ".join(rewards.REWARDS)}, FILE.py:FUNCTION, '
  'or "default" for the reward of the task.',
)
flags.DEFINE_integer(
  'workers', 2, 'Processes that compute rewards.', lower_bound=1
)
flags.DEFINE_float(
  'timeout_s', 10.0, 'Limit of a reward, in seconds.', lower_bound=0.001
)
flags.mark_flags_as_required(['task'])


def main(args):
  if not args.out and not args.reward:
    raise UserError('give --out, --reward or both')
  if args.out:
    outputs.check('out', args.out)
  task = tasks.get(args.task)
  questions = task.draw(args.seed, args.num, args.heldout)
  if args.reward:
    print(scored(args, task, questions), file=sys.stderr)
  if args.out:
    if not args.heldout:
      questions = [{**q, 'text': q['prompt'] + q['answer']} for q in questions]
    content = ''.join(json.dumps(line) + '\n' for line in questions)
    outputs.write('out', args.out, content)
    print(f'{args.out}: {len(questions)} lines', file=sys.stderr)


def scored(args, task, questions):
  """Returns a line on the rewards of the right answers."""
  name = task.reward if args.reward == 'default' else args.reward
  source = rewards.find(name)
  with reward_pool.RewardPool(source, args.workers, args.timeout_s) as pool:
    pool.check(questions[0])
    found = pool.score(questions, [q['answer'] for q in questions])
  means = {'reward': found.total} | found.parts
  line = ', '.join(f'{key} {value.mean():.3f}' for key, value in means.items())
  errors = ', '.join(
    f'{kind} {number} ({found.messages[kind]})'
    for kind, number in found.errors.items()
  )
  return f'right answers: {line}; errors: {errors or "none"}'


if __name__ == '__main__':
  config.run_script(main)
