r"""Evaluates a trained model on tasks of lm-eval (LM Evaluation Harness).

python launch/harness.py --workdir runs/tiny --tasks arc_easy,lambada_openai \
  --limit 100 --model samples=64 --model steps=32 --out results.json
python launch/harness.py --workdir runs/tiny --include_path my_tasks \
  --tasks my_questions

maskdiff/evals/harness.py lists the settings of --model. The results contain
the settings.
"""

import sys

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError
from maskdiff.files import json_text, outputs

flags.DEFINE_string('workdir', None, 'Work directory or Hugging Face folder.')
flags.DEFINE_list('tasks', None, 'Names of tasks, separated by commas.')
flags.DEFINE_string('include_path', None, 'Directory with your own tasks.')
flags.DEFINE_multi_string(
  'model',
  [],
  'KEY=VALUE, a setting: samples, strata, form, coupled, guidance, '
  'check_greedy, seed, batch_size, or a key of config.sample; may be repeated.',
)
flags.DEFINE_integer(
  'num_fewshot', None, 'Examples before each question.', lower_bound=0
)
flags.DEFINE_integer(
  'limit', None, 'Questions per task. Default: all.', lower_bound=1
)
flags.DEFINE_string('out', None, 'JSON file for all results, with the answers.')
config.define_load_flags()
flags.mark_flags_as_required(['workdir', 'tasks'])


def main(args):
  if args.out:
    outputs.check('out', args.out)
  config.require_workdir(args.workdir)
  from maskdiff.distributed import runtime

  with runtime.started():
    evaluate(args)


def evaluate(args):
  import jax

  from maskdiff.evals import harness  # reports a missing lm-eval

  import lm_eval  # isort: skip
  from lm_eval.tasks import TaskManager
  from lm_eval.utils import handle_non_serializable, make_table

  # Orbax warns that the checkpoint is opened read-only, which is intended.
  logging.set_verbosity(logging.ERROR)

  tasks = TaskManager(include_path=args.include_path)
  unknown = [name for name in args.tasks if not tasks.match_tasks([name])]
  if unknown:
    raise UserError(f'--tasks: lm-eval has no task {", ".join(unknown)}')
  settings = config.parse_pairs(args.model)
  keys = ('workdir', 'tensor', 'dtype', 'ema', 'rope_scaling')
  loaded = {key: getattr(args, key) for key in keys}
  for key in loaded:
    if key in settings:
      raise UserError(f'--model {key}: use the flag --{key}')
  model = harness.MaskDiff.create_from_arg_string(
    ','.join(f'{key}={value}' for key, value in settings.items()),
    loaded,
  )
  results = lm_eval.simple_evaluate(
    model=model,
    tasks=args.tasks,
    num_fewshot=args.num_fewshot,
    limit=args.limit,
    task_manager=tasks,
    log_samples=bool(args.out),
  )
  if jax.process_index():
    return
  print(make_table(results))
  print(json_text.dumps(model.get_model_info()))
  if args.out:
    content = json_text.dumps(results, default=handle_non_serializable)
    outputs.write('out', args.out, content)
    print(f'results: {args.out}', file=sys.stderr)


if __name__ == '__main__':
  config.run_script(main)
