"""Samples from a trained model: continues prompts, or fills gaps in a text.

python launch/sample.py --workdir runs/tiny --prompt "def read_file(" \
  --gen_length 64 --steps 64 [--show]
python launch/sample.py --workdir runs/tiny --infill "for i in {{4}}: print(i)"
"""

import sys
import time

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError

flags.DEFINE_string('workdir', None, 'The run to load.')
flags.DEFINE_multi_string('prompt', [], 'Text to continue; may be repeated.')
flags.DEFINE_multi_string(
  'infill', [], 'Text with gaps, {{n}} for n tokens; may be repeated.'
)
flags.DEFINE_integer(
  'gen_length', None, 'Tokens to add to a prompt.', lower_bound=1
)
flags.DEFINE_integer(
  'steps', None, 'Denoising steps; by default one a token.', lower_bound=1
)
flags.DEFINE_integer(
  'block_length',
  None,
  'Tokens filled together; by default as in training.',
  lower_bound=1,
)
flags.DEFINE_float(
  'temperature', None, '0 takes the most probable token.', lower_bound=0
)
flags.DEFINE_string('remasking', None, 'low_confidence or random.')
flags.DEFINE_integer(
  'seed', 0, 'Of the first sample; the next has seed + 1.', lower_bound=0
)
flags.DEFINE_bool('show', False, 'Show the text after each denoising step.')
flags.mark_flag_as_required('workdir')


def main(args):
  from maskdiff import runtime  # after the flags: a bad one is told at once

  with runtime.started(args.workdir):
    sample(args)


def sample(args):
  import jax

  from maskdiff import run, sampler

  # Orbax warns that the checkpoint is opened to be read only: it is meant so.
  logging.set_verbosity(logging.ERROR)

  if args.prompt and args.infill:
    raise UserError('give either --prompt or --infill, not both')
  run_config, tokenizer, params, mesh = run.load(args.workdir)
  s = run_config.sample
  if args.infill:
    canvas, fill, valid = sampler.fill_gaps(args.infill, tokenizer.encode)
  else:
    prompts = [tokenizer.encode(p) for p in args.prompt or ['']]
    added = s.gen_length if args.gen_length is None else args.gen_length
    canvas, fill, valid = sampler.continue_prompts(prompts, added)

  s.gen_length = most = int(fill.sum(axis=1).max())
  length = s.block_length if args.block_length is None else args.block_length
  s.block_length = min(length, max(most, 1))
  blocks = -(-most // s.block_length)
  s.steps = blocks * s.block_length if args.steps is None else args.steps
  if args.temperature is not None:
    s.temperature = args.temperature
  s.remasking = args.remasking or s.remasking
  request = (
    run.sampler_model(run_config),
    run.sampler_config(run_config),
    params,
    canvas,
    fill,
    valid,
    [args.seed + i for i in range(len(canvas))],
  )

  def show(rows):
    texts = (tokenizer.decode(r[ok]) for r, ok in zip(rows, valid, strict=True))
    say('\n---\n'.join(texts))

  def say(text, **kwargs):
    if jax.process_index() == 0:
      print(text, flush=True, **kwargs)

  with jax.set_mesh(mesh):
    if args.show:
      for canvas in sampler.trace(*request):
        if sys.stdout.isatty():
          say('\x1b[2J\x1b[H', end='')
        show(canvas)
        if not sys.stdout.isatty():
          say('=' * 8)
      return
    began = time.monotonic()
    rows = jax.device_get(sampler.generate(*request))
  show(rows)
  say(
    f'{fill.sum()} tokens in {s.steps} steps and '
    f'{time.monotonic() - began:.1f} s, compilation included',
    file=sys.stderr,
  )


if __name__ == '__main__':
  config.run_script(main)
