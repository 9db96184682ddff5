r"""Converts a Hugging Face folder to a work directory, or back.

python launch/convert.py --from hf --in models/LLaDA-8B-Base --out runs/llada
python launch/convert.py --to hf --in runs/tiny --out models/tiny
python launch/convert.py --to peft --in runs/lora --out models/adapters
python launch/convert.py --check --in models/LLaDA-8B-Base

A Hugging Face folder holds config.json, safetensors and usually a tokenizer.
--to hf merges the adapters of a run with LoRA; --to peft writes only them.
--check prints the tensors and compares logits of this package with logits of a
NumPy implementation of the published code. With --from or --to, the check
follows the conversion.
"""

import os
import signal
import sys

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError

DTYPES = ('float32', 'bfloat16', 'float16')
flags.DEFINE_enum('from', None, ['hf'], 'Write a work directory.')
flags.DEFINE_enum(
  'to',
  None,
  ['hf', 'peft'],
  'Write a Hugging Face folder; or, for a run with adapters (LoRA), a folder '
  'of the package peft.',
)
flags.DEFINE_bool('check', False, 'Print the tensors and compare logits.')
flags.DEFINE_string('in', None, 'Directory to convert or to check.')
flags.DEFINE_string('out', None, 'Output directory; must not exist.')
flags.DEFINE_enum(
  'dtype', None, DTYPES, 'Dtype of the written weights. Default: as stored.'
)
flags.DEFINE_enum(
  'family',
  None,
  ['llada', 'dream', 'qwen2', 'qwen3', 'llama'],
  'Family of the folder that --to writes. Default: a family that fits.',
)
flags.DEFINE_float(
  'shard_gb',
  5.0,
  'Size in GB of the safetensors files that --to writes.',
  lower_bound=0,
)
flags.DEFINE_integer(
  'mask_id',
  None,
  'Id of the mask token, for a network that was trained without a mask token.',
  lower_bound=0,
)
flags.DEFINE_bool(
  'without_tokenizer',
  False,
  'Convert the weights only, if maskdiff cannot read the tokenizer.',
)
config.define_ema_flag()
flags.mark_flag_as_required('in')


def main(args):
  kind = {name: args[name].value for name in ('from', 'to')}
  source, out = args['in'].value, args.out
  if all(kind.values()) or not (any(kind.values()) or args.check):
    raise UserError('give one of --from hf, --to hf, --to peft and --check')
  if any(kind.values()) and out is None:
    raise UserError('--out is missing: give the output directory')
  if not os.path.isdir(source):
    raise UserError(f'--in {source}: there is no such directory')
  for name, needs in (
    ('family', 'to'),
    ('ema', 'to'),
    ('mask_id', 'from'),
    ('without_tokenizer', 'from'),
  ):
    if args[name].value not in (None, False) and not kind[needs]:
      raise UserError(f'--{name} is for --{needs} hf')
  if args.to == 'peft' and (args.ema or args.dtype or args.check):
    raise UserError(
      '--to peft writes the adapters in float32, without a check of logits: '
      'leave out --ema, --dtype and --check'
    )
  import jax

  if any(kind.values()) and not args.check:  # a conversion runs on the host
    jax.config.update('jax_platforms', 'cpu')
  # Orbax warns that the checkpoint is opened read-only, which is intended.
  logging.set_verbosity(logging.ERROR)

  from maskdiff.files import new_folder
  from maskdiff.interop import convert, peft

  # Exit through `finally` clauses, which remove unfinished folders.
  for number in (signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
      signal.signal(number, lambda number, frame: sys.exit(128 + number))

  def say(lines):
    for line in lines:
      print(line, flush=True)

  if any(kind.values()):
    say(new_folder.remove_unfinished(out))
  if kind['from']:
    say(
      convert.from_hf(
        source, out, args.dtype, args.mask_id, not args.without_tokenizer
      )
    )
  if kind['to'] == 'peft':
    say(peft.to_peft(source, out, args.family))
  if kind['to'] == 'hf':
    max_bytes = int(args.shard_gb * 1e9)
    say(
      convert.to_hf(source, out, args.dtype, args.family, max_bytes, args.ema)
    )
  if args.check:
    if kind['to']:
      say(convert.check(out, source, args.ema))
    else:
      say(convert.check(source, out))


if __name__ == '__main__':
  config.run_script(main)
