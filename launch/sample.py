"""Samples from a trained model: continues prompts, or fills gaps in a text.

python launch/sample.py --workdir runs/tiny --prompt "def read_file(" \
  --gen_length 64 --steps 64 [--show]
python launch/sample.py --workdir runs/tiny --infill "for i in {{4}}: print(i)"
python launch/sample.py --workdir runs/tiny --prompts prompts.jsonl \
  --remasking threshold --block_length 32 --stop_at_eos --out answers.jsonl
"""

import contextlib
import json
import sys
import time

from absl import flags, logging

from maskdiff import config
from maskdiff import prompts as prompts_lib
from maskdiff.errors import UserError

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
  '*.jsonl, with "prompt" and perhaps "seed".',
)
flags.DEFINE_string(
  'out', None, 'File for JSON lines with the texts, instead of printing them.'
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
flags.DEFINE_integer(
  'seed', 0, 'Of the first sample; the next has seed + 1.', lower_bound=0
)
flags.DEFINE_integer('batch', 16, 'Texts sampled at once.', lower_bound=1)
flags.DEFINE_bool('show', False, 'Show the text after each denoising step.')
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
flags.DEFINE_bool('logits_eos_inf', None, 'Never predict eos.')
flags.DEFINE_bool(
  'confidence_eos_eot_inf', None, 'Commit eos and end of turn last.'
)
flags.DEFINE_integer('eot_id', None, 'Id of the end of turn.')


def main(args):
  from maskdiff import run, runtime  # after the flags: bad ones are told first

  if sum(map(bool, (args.prompt, args.infill, args.prompts))) > 1:
    raise UserError('give one of --prompt, --infill and --prompts')
  if args.show and (args.prompts or args.out):
    raise UserError('--show prints texts of --prompt or --infill alone')
  with runtime.started(run.own_directory(args.workdir)):
    sample(args)


def sample(args):
  import jax

  from maskdiff import run, sampler

  # Orbax warns that the checkpoint is opened to be read only: it is meant so.
  logging.set_verbosity(logging.ERROR)

  asked = requested(args)
  texts, seeds = [p.text for p in asked], [p.seed for p in asked]
  run_config, tokenizer, params, mesh = run.load(args.workdir)
  if args.infill:
    canvas, fill, valid = sampler.fill_gaps(texts, tokenizer.encode)
  else:
    added = run_config.sample.gen_length
    added = added if args.gen_length is None else args.gen_length
    encoded = [tokenizer.encode(text) for text in texts]
    canvas, fill, valid = sampler.continue_prompts(encoded, added)
  run.check_context(run_config, valid)
  override(run_config, args, int(fill.sum(axis=1).max()))
  model, c = run.sampler_model(run_config), run.sampler_config(run_config)

  def record(row, tokens, forwards):
    """What is said of a text, given its row of the canvas."""
    answer = fill[row]
    if c.stop_at_eos:
      answer = answer & sampler.cut(tokens[None], fill[row][None], c.eos_id)[0]
    kept = (valid[row] & ~fill[row]) | answer
    found = {
      'infill' if args.infill else 'prompt': texts[row],
      'seed': seeds[row],
      'text': tokenizer.decode(tokens[kept]),
      'tokens': int(answer.sum()),
      'forwards': int(forwards),
    }
    if not args.infill:
      found['answer'] = tokenizer.decode(tokens[answer])
    return found

  def say(text, **kwargs):
    if jax.process_index() == 0:
      print(text, flush=True, **kwargs)

  if args.show:
    with jax.set_mesh(mesh):
      for shown in sampler.trace(model, c, params, canvas, fill, valid, seeds):
        if sys.stdout.isatty():
          say('\x1b[2J\x1b[H', end='')
        found = [record(row, tokens, 0) for row, tokens in enumerate(shown)]
        say('\n---\n'.join(f['text'] for f in found))
        if not sys.stdout.isatty():
          say('=' * 8)
    return

  def complete(rows):
    # The last batch is filled up, so that all have one shape.
    rows = rows + rows[-1:] * (min(args.batch, len(texts)) - len(rows))
    batch = (x[rows] for x in (canvas, fill, valid))
    carry = sampler.complete(
      model, c, params, *batch, [seeds[row] for row in rows]
    )
    sampler.check(carry)
    return jax.device_get((carry.canvas, carry.forwards))

  began = time.monotonic()
  num_tokens = num_forwards = 0
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    write = stack.enter_context(open_out(args.out)) if args.out else None
    for start in range(0, len(texts), args.batch):
      rows = list(range(len(texts)))[start : start + args.batch]
      for row, *filled in zip(rows, *complete(rows), strict=False):
        found = record(row, *filled)
        num_tokens += found['tokens']
        num_forwards += found['forwards']
        if write:
          write(json.dumps(found, ensure_ascii=False) + '\n')
        else:
          say(('---\n' if row else '') + found['text'])
  say(
    f'{num_tokens} tokens in {num_forwards} forward passes of a row, '
    f'{num_forwards / max(num_tokens, 1):.2f} per token, and '
    f'{time.monotonic() - began:.1f} s, compilation included',
    file=sys.stderr,
  )


def requested(args):
  """The texts to sample from with their seeds, a list of prompts.Prompt."""
  if args.prompts:
    return prompts_lib.read(args.prompts, args.seed)
  texts = args.infill or args.prompt or ['']
  return [prompts_lib.Prompt(t, args.seed + i) for i, t in enumerate(texts)]


def override(run_config, args, most):
  """Puts what the flags say into config.sample, and checks it.

  Args:
    run_config: the config of the run, changed in place.
    args: the flags.
    most: slots of the longest text.

  Raises:
    UserError: a value is not possible, or would not be read.
  """
  s = run_config.sample
  s.gen_length = most
  length = s.block_length if args.block_length is None else args.block_length
  s.block_length = min(length, most)
  blocks = -(-most // s.block_length)
  s.steps = blocks * s.block_length if args.steps is None else args.steps
  for key in OVERRIDES:
    if getattr(args, key) is not None:
      s[key] = getattr(args, key)
  for key in ('threshold', 'factor'):
    if getattr(args, key) is not None and s.remasking != key:
      raise UserError(f'--{key} is for --remasking {key} alone')
  if args.infill:
    if args.stop_at_eos:
      raise UserError('--stop_at_eos is for prompts: text follows a gap')
    s.stop_at_eos = False
  config.validate(run_config)


@contextlib.contextmanager
def open_out(path):
  """The function that writes to the file, on the main process alone."""
  import jax

  if jax.process_index():
    yield lambda text: None
    return
  try:
    f = open(path, 'w', encoding='utf-8')
  except OSError as error:
    raise UserError(f'--out: cannot write {path!r} ({error})') from error
  with f:
    yield f.write


if __name__ == '__main__':
  config.run_script(main)
