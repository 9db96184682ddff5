r"""Scores text by likelihood, or samples answers and counts the right ones.

python launch/evaluate.py --workdir runs/tiny --task bound --data texts.jsonl
python launch/evaluate.py --workdir runs/tiny --task choices \
  --data questions.jsonl --guidance 0.5
python launch/evaluate.py --workdir runs/tiny --task cloze
python launch/evaluate.py --workdir runs/addition --task addition \
  --sample steps=2 --sample confidence=margin

Tasks scored by likelihood, with their lines of --data:
  bound: {"prompt": "...", "answer": "..."} or {"text": "..."}
  choices: {"prompt": "...", "choices": ["...", ...], "answer": 0}
  greedy: {"prompt": "...", "answer": "..."}
A line with a prompt may have "suffix": "...", the text after the answer. The
score is then conditioned on the suffix too.

Tasks answered by the sampler: addition, sudoku, countdown and reversal are
puzzles; cloze masks words in the run's held-out text. These tasks, and choices,
generate their lines unless --data is given. For a puzzle, --data is a file of
`launch/puzzles.py --heldout`.

Prints one JSON line per line of data, in order, and a last JSON line with the
totals and the settings. See docs/evaluation.md.
"""

import functools

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError, printable
from maskdiff.evals import puzzles
from maskdiff.files import json_text

SCORED = ('bound', 'choices', 'greedy')
ANSWERED = (*puzzles.PUZZLES, 'cloze')
GENERATED = (*ANSWERED, 'choices')
RANDOM_ORDERS = ('multi_sample', 'two_sided')

flags.DEFINE_string('workdir', None, 'Work directory or Hugging Face folder.')
flags.DEFINE_enum(
  'task',
  None,
  [*SCORED, *ANSWERED],
  'bound: nats per token and bits per byte; choices: accuracy of the most '
  'likely choice; greedy: whether greedy decoding gives the answer; other '
  'tasks: whether the sampler gives a right answer.',
)
flags.DEFINE_string(
  'data', None, 'File of JSON lines. Default: generated lines.'
)
flags.DEFINE_integer(
  'num', 200, 'Lines to generate.', lower_bound=1, upper_bound=1_000_000
)
flags.DEFINE_multi_string(
  'sample',
  [],
  'KEY=VALUE, a setting of config.sample, for tasks that the sampler answers. '
  'May be repeated.',
)
flags.DEFINE_integer('batch', 32, 'Lines per sampling batch.', lower_bound=1)
flags.DEFINE_enum(
  'form',
  'count',
  [
    'count',
    'bernoulli',
    'left_to_right',
    'multi_sample',
    'two_sided',
    'windows',
  ],
  'Estimator. count: mask a fixed number of tokens, weight L/l. bernoulli: '
  'mask each token with probability t, weight 1/t. left_to_right: the exact '
  'chain rule, one query per token. multi_sample: the importance-weighted '
  'bound, the chain rule in --orders random orders. two_sided: for --task '
  'bound, this bound and a bound from the other side, from the same orders. '
  'windows: for models trained with sdlm, the exact log-likelihood of emitting '
  'whole windows; the others give that of decoding one token per step.',
)
flags.DEFINE_integer(
  'orders',
  16,
  'Random orders per answer for --form multi_sample and two_sided; one query '
  'per token and order.',
  lower_bound=1,
)
flags.DEFINE_integer('samples', 128, 'Masks per answer.', lower_bound=1)
flags.DEFINE_integer(
  'strata', 16, 'Number of masks that share a stratified draw.', lower_bound=1
)
flags.DEFINE_bool(
  'coupled', False, 'Use each mask together with its complement.'
)
flags.DEFINE_float(
  'guidance',
  0.0,
  'Scale w of classifier-free guidance, as in LLaDA. 0: off.',
  lower_bound=0,
  upper_bound=1000,
)
flags.DEFINE_integer(
  'seed', 0, 'Seed of the first line; the next has seed + 1.', lower_bound=0
)
flags.DEFINE_integer(
  'tokens_per_call',
  4096,
  'Tokens per forward pass; memory grows with it.',
  lower_bound=1,
  upper_bound=2**24,
)
config.define_load_flags()
flags.mark_flags_as_required(['workdir', 'task'])


def main(args):
  if not args.data and args.task not in GENERATED:
    raise UserError(f'--task {args.task} needs --data')
  if args.sample and args.task not in ANSWERED:
    raise UserError(
      f'--sample is for tasks that the sampler answers, not --task {args.task}'
    )
  if args.form == 'two_sided' and args.task != 'bound':
    raise UserError(f'--form two_sided is for --task bound, not {args.task}')
  config.require_workdir(args.workdir)
  from maskdiff.distributed import runtime

  with runtime.started():
    evaluate(args)


def evaluate(args):
  import jax

  from maskdiff.evals import answered as answered_lib
  from maskdiff.evals import scored
  from maskdiff.interop import load
  from maskdiff.likelihood.estimators import FORMS, Estimator

  # Orbax warns that the checkpoint is opened read-only, which is intended.
  logging.set_verbosity(logging.ERROR)

  answered = args.task in ANSWERED
  lines, estimator = None, None
  if args.data:
    lines = scored.read(args.data, 'greedy' if answered else args.task)
    for line in lines if answered else ():
      answer = line.value['answer']
      if not puzzles.correct(args.task, line.value, answer):
        raise UserError(
          f'{line.where}: {answer!r} is not a right answer of --task '
          f'{args.task}; see launch/puzzles.py'
        )
  if args.form in FORMS and not answered:
    estimator = Estimator(args.form, args.samples, args.strata, args.coupled)
  values = config.parse_pairs(args.sample)
  loaded = load.load(
    args.workdir, args.tensor, args.dtype, args.ema, args.rope_scaling
  )
  model = load.Model(*loaded)
  if lines is None:
    lines = [scored.Line(*line) for line in generate(args, model)]
  if answered:
    rows, total = answered_lib.answer_lines(
      model,
      values,
      [line.value for line in lines],
      functools.partial(puzzles.correct, args.task),
      args.seed,
      args.batch,
      counter(len(lines), 'lines'),
    )
  else:
    rows, total = score(args, model, estimator, lines)
  total |= {
    'task': args.task,
    # A path that is not UTF-8 would make the line invalid JSON.
    'data': printable(args.data or f'{args.num} made with seed {args.seed}'),
    'workdir': printable(args.workdir),
    'dtype': model.dtype,
    'ema': args.ema,
    'rope_scaling': list(model.config.model.rope_scaling),
  }
  if jax.process_index() == 0:
    for row in [*rows, total]:
      print(json_text.dumps(row), flush=True)


def generate(args, model):
  """Generates the lines of the task; returns a list of (name, line)."""
  from maskdiff.evals import heldout

  if args.task in puzzles.PUZZLES:
    lines = puzzles.make(args.task, args.seed, args.num)
  else:
    draw = {'cloze': heldout.cloze, 'choices': heldout.choices}[args.task]
    found = heldout.documents(model.config, model.tokenizer)
    context = model.config.data.length
    lines = draw(found, model.tokenizer, context, args.seed, args.num)
  return [(f'{args.task} {i}', line) for i, line in enumerate(lines)]


def counter(total, unit):
  """Returns the function that counts finished lines; None: do not count."""
  import jax

  from maskdiff.monitoring import progress

  return None if jax.process_index() else progress.counter(total, unit)


def score(args, model, estimator, lines):
  """Returns the rows and the totals of a task scored by likelihood."""
  import dataclasses

  import jax

  from maskdiff.evals import scored
  from maskdiff.likelihood import bounds, bracket, queries
  from maskdiff.objectives.table import OBJECTIVES

  c = queries.likelihood_config(
    model.config, args.guidance, args.tokens_per_call
  )
  network = model.network
  if OBJECTIVES[network.objective].left_to_right:
    scored.check_no_suffixes(lines)
    if args.form in RANDOM_ORDERS:
      raise UserError(
        f'--form {args.form}: an autoregressive model has one order only and '
        'gives the exact log-likelihood; leave out --form'
      )

  def bound(answers, seeds):
    count = counter(len(answers.tokens), 'rows')
    if args.form == 'left_to_right':
      return bounds.left_to_right(network, c, answers, count)
    if args.form == 'windows':
      return bounds.whole_windows(network, c, answers, count)
    seeds = [args.seed + s for s in seeds]
    if args.form in RANDOM_ORDERS:
      scored.check_masks(answers, orders=args.orders)
      function = {
        'multi_sample': bounds.multi_sample,
        'two_sided': bracket.bracket,
      }[args.form]
      return function(network, c, answers, args.orders, seeds, count)
    scored.check_masks(answers, samples=args.samples)
    return bounds.bound(network, c, answers, estimator, seeds, count)

  def matches(answers):
    count = counter(len(answers.tokens), 'rows')
    return bounds.greedy_matches(network, c, answers, count)

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
    elif args.form in RANDOM_ORDERS:
      total['estimator'] = {'form': args.form, 'orders': args.orders}
  return rows, total


if __name__ == '__main__':
  config.run_script(main)
