r"""Plans a config on TPUs, without a TPU: memory, step time, communication.

python launch/plan.py --config configs/8b.py --topology v5p:4x4x4 \
  [--num_slices 2] [--json FILE] [--plot FILE.png] [--config.train.batch=320]
python launch/plan.py --config configs/8b.py --topology v5p:4x4x4 --sweep
python launch/plan.py --config configs/8b.py --topology v5e:2x4 --mode sample
python launch/plan.py --config configs/rl_8b.py:countdown --topology v6e:4x4

The TPU compiler (pip install -r requirements-tpu.txt) compiles the train step
of launch/pretrain.py; a large model takes one or two minutes. If the config
sets keys of config.policy, the programs of launch/rl.py are compiled. Give
--config.init_from to plan for the model of a folder. The memory is the
compiler's allocation; the time is an estimate. Exit status 1: the config, or
every config of a sweep, needs more memory than a chip has.
"""

import os
import re
import sys

from absl import flags

from maskdiff import config
from maskdiff.errors import UserError, printable
from maskdiff.files import json_text, outputs
from maskdiff.planner.environment import COMPILER_ENVIRONMENT

config.define_config_flag()
flags.DEFINE_string(
  'topology', None, 'Topology of one slice, such as v5p:4x4x4.'
)
flags.DEFINE_integer(
  'num_slices', 1, 'Number of slices.', lower_bound=1, upper_bound=1024
)
flags.DEFINE_enum(
  'mode',
  None,
  ['train', 'sample', 'rl'],
  'Plan a train step, a denoising step, or a round of policy optimization. '
  'Default: rl if the config sets keys of config.policy, else train.',
)
flags.DEFINE_integer('prompts', 8, 'sample: prompts per batch.', lower_bound=1)
flags.DEFINE_integer(
  'prompt_tokens', 128, 'sample: tokens per prompt.', lower_bound=0
)
flags.DEFINE_integer(
  'tensor',
  1,
  'sample: tensor parallelism, chips that share each layer.',
  lower_bound=1,
)
flags.DEFINE_enum(
  'dtype', 'float32', config.WEIGHT_DTYPES, 'sample: dtype of the weights.'
)
flags.DEFINE_bool('sweep', False, 'Plan and rank many configs.')
flags.DEFINE_list(
  'sweep_rows', '1,2,4,8', 'sweep: rows per chip and microbatch.'
)
flags.DEFINE_list(
  'sweep_remat', 'minimal,full', 'sweep: values of model.remat.'
)
flags.DEFINE_multi_string(
  'sweep_mesh',
  ['fsdp=-1', 'fsdp=-1,tensor=2'],
  'sweep: a mesh, such as fsdp=-1,tensor=2; may be repeated.',
)
flags.DEFINE_string(
  'json', None, 'JSON file for all numbers; see maskdiff/planner/fields.py.'
)
flags.DEFINE_string('plot', None, 'File for a bar chart of the time per part.')
flags.mark_flags_as_required(['config', 'topology'])


def main(args):
  os.environ.update(COMPILER_ENVIRONMENT)
  # These modules import JAX, which reads the environment.
  from maskdiff.planner import plot, sweep, tables

  mode = args.mode or _mode(args.config)
  if args.sweep and (args.plot or mode != 'train'):
    raise UserError(
      f'--sweep cannot be combined with --plot or --mode {mode}: it plans '
      'train steps of launch/pretrain.py'
    )
  # Check the files before compiling for minutes.
  if args.plot:
    plot.check_plot(args.plot)
  for flag in ('json', 'plot'):
    if args[flag].value:
      outputs.check(flag, args[flag].value)
  if args.sweep:
    rows = [_positive(rows) for rows in args.sweep_rows]
    meshes = [_mesh(sizes) for sizes in args.sweep_mesh]
    result = sweep.sweep(
      args.config,
      args.topology,
      rows=rows,
      remats=args.sweep_remat,
      meshes=meshes,
      num_slices=args.num_slices,
      say=lambda line: print(printable(line), file=sys.stderr, flush=True),
    )
    print(tables.format_sweep(result))
    fits = any(p['fits'] for p in result)
  else:
    result = _plan(args, mode)
    print(tables.format_table(result))
    fits = result['fits']
  if args.json:
    outputs.write('json', args.json, json_text.dumps(result, indent=2) + '\n')
    print(f'plan: {args.json}', file=sys.stderr)
  if args.plot:
    plot.plot(result, args.plot)
    print(f'plot: {args.plot}', file=sys.stderr)
  if not fits:
    sys.exit(1)


def _mode(settings):
  """Returns the mode of a config."""
  changed = any(
    value != config.KEYS[f'policy.{name}'].default
    for name, value in settings.policy.items()
  )
  return 'rl' if changed else 'train'


def _plan(args, mode):
  """Returns the plan of a config, a dict."""
  from maskdiff.planner import plan, plan_rl, plan_sample
  from maskdiff.rl import stage_config

  where = args.topology, args.num_slices
  if mode == 'train':
    return plan.plan(args.config, *where)
  if mode == 'sample':
    return plan_sample.plan_sample(
      args.config,
      args.topology,
      args.prompts,
      args.prompt_tokens,
      args.num_slices,
      args.tensor,
      args.dtype,
    )
  settings = args.config
  if settings.init_from:
    given = args['config'].override_values
    settings = stage_config.complete(settings, given)
  return plan_rl.plan_rl(settings, *where)


def _positive(text):
  if not re.fullmatch('[1-9][0-9]{0,8}', text):
    raise UserError(f'--sweep_rows: {text!r} is not a positive number')
  return int(text)


def _mesh(text):
  """Returns a dict of mesh sizes from axis=size,axis=size."""
  pairs = [part.split('=') for part in text.split(',')]
  try:
    return {axis: int(size) for axis, size in pairs}
  except ValueError as error:
    raise UserError(
      f'--sweep_mesh {text!r}: write axis=size,axis=size'
    ) from error


if __name__ == '__main__':
  config.run_script(main)
