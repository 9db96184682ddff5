r"""Scores lines of text with a trained model, by likelihood.

python launch/evaluate.py --workdir runs/tiny --task bound --data texts.jsonl
python launch/evaluate.py --workdir runs/tiny --task choices \
  --data questions.jsonl --guidance 0.5

Lines are {"prompt": "...", "answer": "..."} or {"text": "..."} for bound,
{"prompt": "...", "choices": ["...", ...], "answer": 0} for choices, and
{"prompt": "...", "answer": "..."} for greedy. A JSON line is printed for each,
in order, and a last one for all of them.
"""

import json

from absl import flags, logging

from maskdiff import config

flags.DEFINE_string(
  'workdir', None, "The run to load, or a folder in Hugging Face's form."
)
flags.DEFINE_enum(
  'task',
  None,
  ['bound', 'choices', 'greedy'],
  'bound: nats and bits per byte; choices: accuracy of the likeliest choice; '
  'greedy: whether greedy decoding gives the answer.',
)
flags.DEFINE_string('data', None, 'File of JSON lines.')
flags.DEFINE_enum(
  'form',
  'count',
  ['count', 'bernoulli', 'left_to_right'],
  'Masks of a fixed number of tokens, weighted by L/l; of each token by '
  'chance, weighted by 1/t; or the exact chain rule, a look a token.',
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
for name in ('workdir', 'task', 'data'):
  flags.mark_flag_as_required(name)


def main(args):
  from maskdiff import run, runtime  # after the flags: bad ones are told first

  with runtime.started(run.own_directory(args.workdir)):
    evaluate(args)


def evaluate(args):
  import jax

  from maskdiff import likelihood, run, tasks
  from maskdiff.estimators import Estimator

  # Orbax warns that the checkpoint is opened to be read only: it is meant so.
  logging.set_verbosity(logging.ERROR)

  lines = tasks.read(args.data, args.task)
  if args.form != 'left_to_right':
    estimator = Estimator(args.form, args.samples, args.strata, args.coupled)
  run_config, tokenizer, params, mesh = run.load(args.workdir)
  c = run.likelihood_config(run_config, args.guidance, args.tokens_per_call)
  network = run.sampler_model(run_config), c, params

  def score(tokens, answer, valid, seeds):
    if args.form == 'left_to_right':
      return likelihood.left_to_right(*network, tokens, answer, valid)
    seeds = [args.seed + s for s in seeds]
    return likelihood.bound(*network, tokens, answer, valid, estimator, seeds)

  def matches(tokens, answer, valid):
    return likelihood.greedy_matches(*network, tokens, answer, valid)

  with jax.set_mesh(mesh):
    rows, total = tasks.TASKS[args.task](
      lines, tokenizer, c.context, matches if args.task == 'greedy' else score
    )
  if jax.process_index() == 0:
    for row in [*rows, total]:
      print(json.dumps(row), flush=True)


if __name__ == '__main__':
  config.run_script(main)
