r"""Scores lines of text with a trained model by likelihood, or lets it answer.

python launch/evaluate.py --workdir runs/tiny --task bound --data texts.jsonl
python launch/evaluate.py --workdir runs/tiny --task choices \
  --data questions.jsonl --guidance 0.5
python launch/evaluate.py --workdir runs/tiny --task cloze
python launch/evaluate.py --workdir runs/addition --task addition \
  --sample steps=2 --sample confidence=margin

By likelihood: lines are {"prompt": "...", "answer": "..."} or {"text": "..."}
for bound, {"prompt": "...", "choices": ["...", ...], "answer": 0} for choices,
and {"prompt": "...", "answer": "..."} for greedy. A line with a prompt may have
"suffix": "...", text after the answer, which is then scored given both.

By the sampler: addition, sudoku, countdown and reversal are puzzles, cloze asks
for words of the run's held-out text. They make their own lines, and so does
choices without --data. --data takes lines of `launch/puzzles.py --heldout`.

A JSON line is printed for each, in order, and a last one for all of them, with
the settings. docs/evaluation.md says more.
"""

import functools
import json

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError
from maskdiff.evals import puzzles

SCORED = ('bound', 'choices', 'greedy')
ANSWERED = (*puzzles.PUZZLES, 'cloze')
MADE = (*ANSWERED, 'choices')

flags.DEFINE_string(
  'workdir', None, "The run to load, or a folder in Hugging Face's form."
)
flags.DEFINE_enum(
  'task',
  None,
  [*SCORED, *ANSWERED],
  'bound: nats and bits per byte; choices: accuracy of the likeliest choice; '
  'greedy: whether greedy decoding gives the answer; the others: what the '
  'sampler answers.',
)
flags.DEFINE_string(
  'data', None, 'File of JSON lines; by default lines that are made.'
)
flags.DEFINE_integer('num', 200, 'Lines to make.', lower_bound=1)
flags.DEFINE_multi_string(
  'sample',
  [],
  'KEY=VALUE, a setting of config.sample for those that the sampler answers; '
  'may be repeated.',
)
flags.DEFINE_integer('batch', 32, 'Lines answered at once.', lower_bound=1)
flags.DEFINE_enum(
  'form',
  'count',
  ['count', 'bernoulli', 'left_to_right', 'multi_sample'],
  'Masks of a fixed number of tokens, weighted by L/l; of each token by '
  'chance, weighted by 1/t; the exact chain rule, one query per token; or the '
  'importance-weighted bound, the chain rule in --orders random orders.',
)
flags.DEFINE_integer(
  'orders',
  16,
  'Orders per answer, of --form multi_sample; each takes one query per token.',
  lower_bound=1,
)
flags.DEFINE_integer('samples', 128, 'Masks per answer.', lower_bound=1)
flags.DEFINE_integer(
  'strata', 16, 'Masks that share a stratified draw.', lower_bound=1
)
flags.DEFINE_bool('coupled', False, 'Take each mask with its complement.')
flags.DEFINE_float(
  'guidance', 0.0, 'Classifier-free guidance, w of LLaDA; 0 for none.'
)
flags.DEFINE_integer(
  'seed', 0, 'Of the first line; the next has seed + 1.', lower_bound=0
)
flags.DEFINE_integer(
  'tokens_per_call',
  4096,
  'Tokens that the network computes at once; sets its memory.',
  lower_bound=1,
)
config.define_load_flags()
flags.mark_flags_as_required(['workdir', 'task'])


def main(args):
  from maskdiff.distributed import runtime
  from maskdiff.interop import load

  if not args.data and args.task not in MADE:
    raise UserError(f'--task {args.task} needs --data')
  if args.sample and args.task not in ANSWERED:
    raise UserError(f'--sample: there is no sampling in --task {args.task}')
  with runtime.started(load.writable_workdir(args.workdir)):
    evaluate(args)


def evaluate(args):
  import jax

  from maskdiff.evals import answered as answered_lib
  from maskdiff.evals import scored
  from maskdiff.interop import load
  from maskdiff.likelihood.estimators import FORMS, Estimator

  # Orbax warns that the checkpoint is opened to be read only: it is meant so.
  logging.set_verbosity(logging.ERROR)

  answered = args.task in ANSWERED
  lines, estimator = None, None
  if args.data:
    lines = scored.read(args.data, 'greedy' if answered else args.task)
    for line in lines if answered else ():
      answer = line.value['answer']
      if not puzzles.correct(args.task, line.value, answer):
        raise UserError(
          f'{line.where}: {answer!r} is no right answer, so this is no line of '
          f'--task {args.task}; see launch/puzzles.py'
        )
  if args.form in FORMS and not answered:
    estimator = Estimator(args.form, args.samples, args.strata, args.coupled)
  values = config.parse_pairs(args.sample)
  model = answered_lib.Model(*load.load(args.workdir, args.tensor, args.dtype))
  if lines is None:
    lines = [scored.Line(*line) for line in made(args, model)]
  if answered:
    rows, total = answered_lib.ask(
      model,
      values,
      [line.value for line in lines],
      functools.partial(puzzles.correct, args.task),
      args.seed,
      args.batch,
    )
  else:
    rows, total = score(args, model, estimator, lines)
  total |= {
    'task': args.task,
    'data': args.data or f'{args.num} made with seed {args.seed}',
    'workdir': args.workdir,
    'dtype': model.dtype,
  }
  if jax.process_index() == 0:
    for row in [*rows, total]:
      print(json.dumps(row), flush=True)


def made(args, model):
  """Lines of the task with where they come from."""
  from maskdiff.evals import heldout

  if args.task in puzzles.PUZZLES:
    lines = puzzles.make(args.task, args.seed, args.num)
  else:
    draw = {'cloze': heldout.cloze, 'choices': heldout.choices}[args.task]
    found = heldout.documents(model.config, model.tokenizer)
    context = model.config.data.length
    lines = draw(found, model.tokenizer, context, args.seed, args.num)
  return [(f'{args.task} {i}', line) for i, line in enumerate(lines)]


def score(args, model, estimator, lines):
  """Rows and total of a task that is scored by likelihood."""
  import dataclasses

  import jax

  from maskdiff.evals import scored
  from maskdiff.likelihood import bounds, queries
  from maskdiff.objectives.table import OBJECTIVES

  c = queries.likelihood_config(
    model.config, args.guidance, args.tokens_per_call
  )
  network = model.network
  if OBJECTIVES[network.objective].left_to_right:
    scored.check_ends(lines)
    if args.form == 'multi_sample':
      raise UserError(
        '--form multi_sample: an autoregressive model has one order only and '
        'gives the log-likelihood itself: leave out --form'
      )

  def bound(answers, seeds):
    if args.form == 'left_to_right':
      return bounds.left_to_right(network, c, answers)
    seeds = [args.seed + s for s in seeds]
    if args.form == 'multi_sample':
      return bounds.multi_sample(network, c, answers, args.orders, seeds)
    return bounds.bound(network, c, answers, estimator, seeds)

  def matches(answers):
    return bounds.greedy_matches(network, c, answers)

  with jax.set_mesh(model.mesh):
    rows, total = scored.TASKS[args.task](
      lines,
      model.tokenizer,
      c.context,
      matches if args.task == 'greedy' else bound,
    )
  total['guidance'] = args.guidance
  if args.task != 'greedy':
    total['estimator'] = args.form
    if estimator:
      total['estimator'] = dataclasses.asdict(estimator)
    elif args.form == 'multi_sample':
      total['estimator'] = {'form': args.form, 'orders': args.orders}
  return rows, total


if __name__ == '__main__':
  config.run_script(main)
