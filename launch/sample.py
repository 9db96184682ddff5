r"""Samples from a trained model: continues prompts, or fills gaps in a text.

python launch/sample.py --workdir runs/tiny --prompt "def read_file(" \
  --gen_length 64 --steps 64 [--show] [--html replay.html]
python launch/sample.py --workdir runs/tiny --infill "for i in {{4}}: print(i)"
python launch/sample.py --workdir runs/tiny --prompts prompts.jsonl \
  --remasking threshold --block_length 32 --stop_at_eos --out answers.jsonl
python launch/sample.py --workdir runs/tiny --interactive

Flags with the name of a key of config.sample override the run's config. Without
--steps, the sampler takes one denoising step per token. For texts with gaps,
--steps is the number of denoising steps per text. A line of a *.jsonl file may
have settings of its own: {"prompt": "x = ", "settings": {"temperature": 0.7}}.
"""

import collections
import contextlib
import dataclasses
import sys
import time

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError
from maskdiff.sampling import prompts as prompts_lib

flags.DEFINE_string('workdir', None, 'Work directory or Hugging Face folder.')
flags.DEFINE_multi_string('prompt', [], 'Text to continue; may be repeated.')
flags.DEFINE_multi_string(
  'infill', [], 'Text with gaps, {{n}} for n tokens; may be repeated.'
)
flags.DEFINE_string(
  'prompts',
  None,
  'File of texts to continue, one per line; or a *.jsonl file. Its lines all '
  'have "prompt", or all have "infill"; "seed" and "settings" are optional.',
)
flags.DEFINE_bool(
  'interactive',
  False,
  'Answer each line of standard input: a text to continue, or with gaps.',
)
flags.DEFINE_string(
  'out',
  None,
  'Write the answers to this file as JSON lines; print none.',
)
flags.DEFINE_bool(
  'trajectory',
  False,
  'Add to each line of --out the token ids, the denoising step and the '
  'confidence of every slot, and the settings.',
)
flags.DEFINE_integer(
  'seed', 0, 'Seed of the first text; the next has seed + 1.', lower_bound=0
)
flags.DEFINE_integer('batch', 16, 'Texts per sampling batch.', lower_bound=1)
flags.DEFINE_bool('show', False, 'Print the text after each denoising step.')
flags.DEFINE_string(
  'html', None, 'File for an HTML page that replays the denoising steps.'
)
flags.DEFINE_bool(
  'suppress_mask',
  False,
  'Never predict the mask token. Networks trained with '
  'config.objective.predict_mask, such as LLaDA, can predict it.',
)
flags.DEFINE_bool(
  'open_length',
  False,
  'Append blocks until the model predicts eos; at most --gen_length tokens.',
)
flags.DEFINE_enum(
  'length',
  'given',
  ['given', 'predicted'],
  'Length of an answer: --gen_length, or predicted by a model that was trained '
  'to (launch/prepare.py --length_buckets). --steps are then for the largest '
  'length; shorter ones take a part of them.',
)
flags.mark_flag_as_required('workdir')
config.define_sample_flags()
config.define_load_flags()


def main(args):
  inputs = (args.prompt, args.infill, args.prompts, args.interactive)
  if sum(map(bool, inputs)) > 1:
    raise UserError('give one of --prompt, --infill, --prompts, --interactive')
  if args.show and (args.prompts or args.interactive or args.out):
    raise UserError('--show prints texts of --prompt or --infill only')
  if args.trajectory and not args.out:
    raise UserError('--trajectory adds fields to the lines of --out: set --out')
  if args.html and (args.prompts or args.interactive):
    raise UserError('--html replays texts of --prompt or --infill only')
  config.require_workdir(args.workdir)
  from maskdiff.distributed import runtime

  with runtime.started():
    sample(args)


def sample(args):
  import jax

  from maskdiff.distributed import runtime
  from maskdiff.interop import load
  from maskdiff.sampling import answers, output

  # Orbax warns that the checkpoint is opened read-only, which is intended.
  logging.set_verbosity(logging.ERROR)
  if args.interactive and jax.process_count() > 1:
    raise UserError('--interactive needs a single process')
  output.check_files(out=args.out, html=args.html)
  prompts, gaps = ([], False) if args.interactive else read_prompts(args)
  run_config, tokenizer, params, mesh = load.load(
    args.workdir, args.tensor, args.dtype, args.ema, args.rope_scaling
  )
  network = load.network(run_config, params)
  if args.suppress_mask:
    network = dataclasses.replace(network, predict_mask=False)
  with jax.set_mesh(mesh):
    c, settings, texts = encode(
      args, run_config, network, tokenizer, prompts, gaps
    )
  context = run_config.data.length
  s = answers.Sampling(network, c, tokenizer, context, args.trajectory)
  began = time.monotonic()
  totals = collections.Counter()  # kept if Ctrl-C ends --interactive
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    write = stack.enter_context(output.open_lines('out', args.out))
    page = None
    if args.interactive:
      stack.enter_context(contextlib.suppress(KeyboardInterrupt))
      lines = prompts_lib.typed(sys.stdin, runtime.print_once)
      found = answers.converse(
        s, settings, lines, args.seed, runtime.print_once, args.steps
      )
    elif args.show or args.html:
      print_step = output.print_step if args.show else None
      found, recordings = answers.record(s, texts, args.batch, print_step)
      if args.html:
        page = answers.page(s, texts, recordings, workdir=args.workdir)
    else:
      found = answers.in_batches(s, texts, args.batch)
    output.write_answers(found, write, args.show, totals)
    if page:  # after the answers, which a full disk must not lose
      output.write_page('html', args.html, page)
  tokens, forwards, positions = (
    totals[key] for key in ('tokens', 'forwards', 'positions')
  )
  runtime.print_once(
    f'{tokens} tokens, {forwards} forward passes of a row '
    f'({forwards / max(tokens, 1):.2f} per token), {positions} positions '
    f'({positions / max(tokens, 1):.1f} per token), '
    f'{time.monotonic() - began:.1f} s including compilation'
  )


def encode(args, run_config, network, tokenizer, prompts, gaps):
  """Returns the SamplerConfig, the Settings and the Texts of prompts.

  Args:
    args: FLAGS.
    run_config: ConfigDict of the run.
    network: Network, which may predict the lengths of answers.
    tokenizer: Tokenizer.
    prompts: list of prompts.Prompt.
    gaps: whether they have gaps.
  """
  from maskdiff.sampling import answers, lengths
  from maskdiff.sampling.settings import of_request

  predicted, known = args.length == 'predicted', run_config.data.length_tokens
  if predicted:
    lengths.check(known, args.gen_length)
    if gaps or args.interactive or args.open_length:
      raise UserError(
        '--length=predicted is for --prompt and --prompts, without gaps and '
        'without --open_length'
      )
  context = run_config.data.length
  default_length = context if args.open_length else run_config.sample.gen_length
  if predicted:  # --steps are for the longest answer
    default_length = min(known[-1][0], context)
  gen_length = args.gen_length or default_length
  values = config.sample_settings(args, run_config, gen_length, gaps)
  c, settings = of_request(run_config, values, {}, gaps, args.steps)

  def with_slots(prompt, slots):
    lengths.check(known, prompt.settings.get('gen_length'))
    return lengths.settings_of(run_config, c, values, slots, prompt.settings)

  def encoded(prompt):
    own = with_slots(prompt, 1) if predicted else settings
    if (changes := prompt.settings) and not predicted:
      _, own = of_request(run_config, values, changes, gaps, args.steps)
    return answers.encode_text(
      prompt, gaps, own, tokenizer.encode, context, args.open_length
    )

  texts = [prompts_lib.located(encoded, prompt) for prompt in prompts]
  if predicted:
    own = lambda i, slots: with_slots(prompts[i], slots)
    texts = lengths.with_lengths(network, c, known, texts, own, args.batch)
  return answers.fit(network, c, texts, settings), settings, texts


def read_prompts(args):
  """Returns a list of prompts.Prompt, and whether they have gaps."""
  if args.prompts:
    found, gaps = prompts_lib.read(args.prompts, args.seed)
  else:
    texts, gaps = args.infill or args.prompt or [''], bool(args.infill)
    found = [prompts_lib.Prompt(t, args.seed + i) for i, t in enumerate(texts)]
  for prompt in found:
    prompts_lib.located(prompts_lib.check_seed, prompt)
  return found, gaps


if __name__ == '__main__':
  config.run_script(main)
