r"""Converts published checkpoints to work directories, and back; or checks one.

python launch/convert.py --from hf --in models/LLaDA-8B-Base --out runs/llada
python launch/convert.py --to hf --in runs/tiny --out models/tiny
python launch/convert.py --check --in models/LLaDA-8B-Base

A folder in Hugging Face's form has config.json and safetensors, and perhaps a
tokenizer. With --from or --to, --check compares after the conversion: logits
computed in NumPy as the published code does with those of this package.
"""

import os

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError

DTYPES = ('float32', 'bfloat16', 'float16')
flags.DEFINE_enum('from', None, ['hf'], 'Make a work directory of a folder.')
flags.DEFINE_enum('to', None, ['hf'], 'Make a folder of a work directory.')
flags.DEFINE_bool('check', False, 'Print the tensors and compare logits.')
flags.DEFINE_string('in', None, 'What to convert, or to check.')
flags.DEFINE_string('out', None, 'Where to; must not be there yet.')
flags.DEFINE_enum(
  'dtype', None, DTYPES, 'Of what is written; by default as stored.'
)
flags.DEFINE_enum(
  'family',
  None,
  ['llada', 'dream', 'qwen2', 'qwen3', 'llama'],
  'Of the folder that --to writes; by default what fits.',
)
flags.DEFINE_float(
  'shard_gb', 5.0, 'Size of the files that --to writes.', lower_bound=0
)
flags.DEFINE_integer(
  'mask_id', None, 'Of a network that never had a mask.', lower_bound=0
)
flags.DEFINE_bool(
  'without_tokenizer', False, 'Leave out a tokenizer that cannot be used here.'
)
flags.mark_flag_as_required('in')


def main(args):
  kind = {name: args[name].value for name in ('from', 'to')}
  source, out = args['in'].value, args.out
  if all(kind.values()) or not (any(kind.values()) or args.check):
    raise UserError('give one of --from hf, --to hf and --check')
  if any(kind.values()) and out is None:
    raise UserError('--out is missing: where to convert to')
  if not os.path.isdir(source):
    raise UserError(f'--in {source}: there is no such directory')
  for name, needs in (
    ('family', 'to'),
    ('mask_id', 'from'),
    ('without_tokenizer', 'from'),
  ):
    if args[name].value not in (None, False) and not kind[needs]:
      raise UserError(f'--{name} is for --{needs} hf')
  import jax

  if any(kind.values()) and not args.check:  # no accelerator is needed
    jax.config.update('jax_platforms', 'cpu')
  # Orbax warns that the checkpoint is opened to be read only: it is meant so.
  logging.set_verbosity(logging.ERROR)

  from maskdiff.interop import convert

  def say(lines):
    for line in lines:
      print(line, flush=True)

  if kind['from']:
    say(
      convert.from_hf(
        source, out, args.dtype, args.mask_id, not args.without_tokenizer
      )
    )
  if kind['to']:
    max_bytes = int(args.shard_gb * 1e9)
    say(convert.to_hf(source, out, args.dtype, args.family, max_bytes))
  if args.check:
    if kind['to']:
      say(convert.check(out, source))
    else:
      say(convert.check(source, out))


if __name__ == '__main__':
  config.run_script(main)
