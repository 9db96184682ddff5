r"""Samples from a trained model: continues prompts, or fills gaps in a text.

python launch/sample.py --workdir runs/tiny --prompt "def read_file(" \
  --gen_length 64 --steps 64 [--show] [--html replay.html]
python launch/sample.py --workdir runs/tiny --infill "for i in {{4}}: print(i)"
python launch/sample.py --workdir runs/tiny --prompts prompts.jsonl \
  --remasking threshold --block_length 32 --stop_at_eos --out answers.jsonl
python launch/sample.py --workdir runs/tiny --interactive
"""

import contextlib
import dataclasses
import json
import sys
import time

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError, writing
from maskdiff.sampling import prompts as prompts_lib

flags.DEFINE_string(
  'workdir', None, "The run to load, or a folder in Hugging Face's form."
)
flags.DEFINE_multi_string('prompt', [], 'Text to continue; may be repeated.')
flags.DEFINE_multi_string(
  'infill', [], 'Text with gaps, {{n}} for n tokens; may be repeated.'
)
flags.DEFINE_string(
  'prompts',
  None,
  'File of texts to continue, one per line; or JSON lines, in a file named '
  '*.jsonl, with "prompt", or in all of them "infill", and perhaps "seed".',
)
flags.DEFINE_bool(
  'interactive',
  False,
  'Answer lines as they are typed, or come through a pipe: a text to continue, '
  'or one with gaps.',
)
flags.DEFINE_string(
  'out', None, 'File for JSON lines with the texts, instead of printing them.'
)
flags.DEFINE_integer(
  'gen_length', None, 'Tokens to add to a prompt.', lower_bound=1
)
flags.DEFINE_integer(
  'steps',
  None,
  'Denoising steps, of a text with gaps its own; by default one a token.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'block_length',
  None,
  'Tokens filled together; by default as in training.',
  lower_bound=1,
)
flags.DEFINE_integer(
  'seed', 0, 'Of the first sample; the next has seed + 1.', lower_bound=0
)
flags.DEFINE_integer('batch', 16, 'Texts sampled at once.', lower_bound=1)
flags.DEFINE_bool('show', False, 'Show the text after each denoising step.')
flags.DEFINE_string(
  'html', None, 'File for a page that replays the denoising in a browser.'
)
flags.mark_flag_as_required('workdir')

# Flags that have the name of a key of config.sample and override it.
OVERRIDES = (
  'temperature',
  'top_k',
  'top_p',
  'remasking',
  'schedule',
  'confidence',
  'threshold',
  'factor',
  'guidance',
  'stop_at_eos',
  'logits_eos_inf',
  'confidence_eos_eot_inf',
  'eot_id',
  'cache',
  'refresh',
  'lookahead',
)
flags.DEFINE_float(
  'temperature', None, '0 takes the most probable token.', lower_bound=0
)
flags.DEFINE_integer('top_k', None, 'Draw from so many tokens.', lower_bound=0)
flags.DEFINE_float('top_p', None, 'Draw from tokens of this probability.')
flags.DEFINE_enum(
  'remasking',
  None,
  config.CHOICES['sample.remasking'],
  'Which predictions of a step are kept.',
)
flags.DEFINE_enum(
  'schedule',
  None,
  config.CHOICES['sample.schedule'],
  'How the number of masked tokens falls over the steps.',
)
flags.DEFINE_enum(
  'confidence',
  None,
  config.CHOICES['sample.confidence'],
  'What a prediction is judged by.',
)
flags.DEFINE_float(
  'threshold', None, 'Confidence that --remasking threshold asks for.'
)
flags.DEFINE_float('factor', None, 'Of --remasking factor.')
flags.DEFINE_float(
  'guidance', None, 'Scale of classifier-free guidance; twice the work.'
)
flags.DEFINE_bool('stop_at_eos', None, 'End an answer at its first eos.')
flags.DEFINE_bool(
  'suppress_mask',
  False,
  'Never predict the mask token, which networks trained with '
  'config.objective.predict_mask could, as LLaDA.',
)
flags.DEFINE_bool('logits_eos_inf', None, 'Never predict eos.')
flags.DEFINE_bool(
  'confidence_eos_eot_inf', None, 'Commit eos and end of turn last.'
)
flags.DEFINE_integer('eot_id', None, 'Id of the end of turn.')
flags.DEFINE_enum(
  'cache',
  None,
  config.CHOICES['sample.cache'],
  'Keep keys and values for the steps of a block.',
)
flags.DEFINE_integer(
  'refresh', None, 'Steps between passes over all; 0: one a block.'
)
flags.DEFINE_integer(
  'lookahead', None, 'Blocks of masks ahead that the network sees; -1: all.'
)
flags.DEFINE_bool(
  'open_length',
  False,
  'Answers as long as they become, block by block until an eos; --gen_length '
  'is then the most.',
)
config.define_load_flags()


def main(args):
  from maskdiff.distributed import runtime as runtime_lib
  from maskdiff.interop import load

  given = (args.prompt, args.infill, args.prompts, args.interactive)
  if sum(map(bool, given)) > 1:
    raise UserError('give one of --prompt, --infill, --prompts, --interactive')
  if args.show and (args.prompts or args.interactive or args.out):
    raise UserError('--show prints texts of --prompt or --infill alone')
  if args.html and (args.prompts or args.interactive):
    raise UserError('--html replays texts of --prompt or --infill alone')
  with runtime_lib.started(load.own_directory(args.workdir)):
    sample(args)


def sample(args):
  import jax

  from maskdiff.distributed import runtime as runtime_lib
  from maskdiff.interop import load
  from maskdiff.sampling import answers, layouts, request

  # Orbax warns that the checkpoint is opened to be read only: it is meant so.
  logging.set_verbosity(logging.ERROR)
  if args.interactive and jax.process_count() > 1:
    raise UserError('--interactive is for a single process')
  prompts, gaps = ([], False) if args.interactive else requested(args)
  run_config, tokenizer, params, mesh = load.load(
    args.workdir, args.tensor, args.dtype
  )
  most = args.gen_length or run_config.sample.gen_length
  context = run_config.data.length
  if args.open_length and not args.gen_length:
    most = context
  if not args.interactive:
    texts = answers.encode_texts(
      prompts,
      gaps,
      tokenizer.encode,
      most,
      context if args.open_length else None,
    )
    layouts.check_context(context, texts.request.valid)
    if gaps:
      most = int(texts.request.fill.sum(axis=1).max())
  override(run_config, args, most, gaps)
  c = request.sampler_config(run_config)
  network = load.network(run_config, params)
  if args.suppress_mask:
    network = dataclasses.replace(network, predict_mask=False)
  s = answers.Sampling(
    network,
    answers.for_gaps(c, args.steps) if gaps else c,
    tokenizer,
    context,
  )
  began = time.monotonic()
  num_tokens = num_forwards = num_positions = 0
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    write = stack.enter_context(open_out('out', args.out))
    write_page = stack.enter_context(open_out('html', args.html))
    if args.interactive:
      stack.enter_context(contextlib.suppress(KeyboardInterrupt))
      lines = prompts_lib.typed(sys.stdin)
      found = answers.converse(s, lines, args.seed, runtime_lib.say, args.steps)
    elif args.show or args.html:
      found, recording = answers.watched(s, texts, show if args.show else None)
      if write_page:
        write_page(answers.page(s, texts, recording, workdir=args.workdir))
    else:
      found = answers.in_batches(s, texts, args.batch)
    for number, answer in enumerate(found):
      num_tokens += answer['tokens']
      num_forwards += answer['forwards']
      num_positions += answer['positions']
      if write:
        write(json.dumps(answer, ensure_ascii=False) + '\n')
      elif not args.show:  # else it has been shown
        line = '---\n' if number else ''
        runtime_lib.say(line + answer['text'], file=sys.stdout)
  each = max(num_tokens, 1)
  runtime_lib.say(
    f'{num_tokens} tokens in {num_forwards} forward passes of a row, '
    f'{num_forwards / each:.2f} per token, over {num_positions} positions, '
    f'{num_positions / each:.1f} per token, and '
    f'{time.monotonic() - began:.1f} s, compilation included'
  )


def requested(args):
  """The texts to sample from with their seeds, a list of prompts.Prompt; and
  whether they have gaps."""
  if args.prompts:
    return prompts_lib.read(args.prompts, args.seed)
  texts = args.infill or args.prompt or ['']
  found = [prompts_lib.Prompt(t, args.seed + i) for i, t in enumerate(texts)]
  return found, bool(args.infill)


def show(texts):
  """Prints the texts of a step; on a terminal, in place of those before."""
  from maskdiff.distributed import runtime as runtime_lib

  clear, end = '', '\n' + '=' * 8
  if sys.stdout.isatty():
    clear, end = '\x1b[2J\x1b[H', ''
  runtime_lib.say(clear + '\n---\n'.join(texts) + end, file=sys.stdout)


def override(run_config, args, most, gaps):
  """Puts what the flags say into config.sample, and checks it.

  Args:
    run_config: the config of the run, changed in place.
    args: the flags.
    most: slots of the longest text.
    gaps: whether texts have gaps; their steps are not those of config.sample.

  Raises:
    UserError: a value is not possible, or would not be read.
  """
  s = run_config.sample
  s.gen_length = most
  length = s.block_length if args.block_length is None else args.block_length
  s.block_length = min(length, most)
  blocks = -(-most // s.block_length)
  one_a_token = gaps or args.steps is None
  s.steps = blocks * s.block_length if one_a_token else args.steps
  if args.open_length:
    s.stop_at_eos, s.lookahead = True, 0
  for key in OVERRIDES:
    if getattr(args, key) is not None:
      s[key] = getattr(args, key)
  for key in ('threshold', 'factor'):
    if getattr(args, key) is not None and s.remasking != key:
      raise UserError(f'--{key} is for --remasking {key} alone')
  if gaps:
    if args.stop_at_eos or args.open_length:
      raise UserError(
        '--stop_at_eos and --open_length are for prompts: text follows a gap'
      )
    if args.lookahead not in (None, -1):
      raise UserError('--lookahead is for prompts: text follows a gap')
  config.validate(run_config)


@contextlib.contextmanager
def open_out(flag, path):
  """The function that writes to the file of a flag, or None if there is none;
  on the main process alone, and a line of text is safe when it is written."""
  import jax

  if not path or jax.process_index():
    yield path and (lambda text: None)
    return
  with writing(flag, path):
    f = open(path, 'w', encoding='utf-8', buffering=1)
  with f:
    yield f.write


if __name__ == '__main__':
  config.run_script(main)
