r"""Chats with a trained model in a terminal.

python launch/chat.py --workdir runs/chat [--system "You are brief."] \
  [--gen_length 128] [--temperature 0.7] [--show_masks]
python launch/chat.py --workdir models/LLaDA-8B-Instruct --block_length 32

Reads messages from standard input until Ctrl-D; /help lists the commands, and
Ctrl-C stops an answer. An answer is printed as far as all tokens from its
beginning are committed. With --show_masks the whole answer is drawn after every
denoising step, with its masks. Flags with the name of a key of config.sample
override the run's config.
"""

import contextlib
import dataclasses
import sys

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError
from maskdiff.serving import command_line

command_line.define_flags()
flags.DEFINE_string('system', '', 'System message.')
flags.DEFINE_integer(
  'seed', 0, 'Seed of the first answer; the next has seed + 1.', lower_bound=0
)
flags.DEFINE_bool(
  'show_masks', False, 'Draw every denoising step; needs a terminal.'
)
flags.DEFINE_enum(
  'length',
  None,
  ['given', 'predicted'],
  'Length of an answer: --gen_length, or predicted by the model. Default: '
  'predicted, if the model was trained to (launch/prepare.py '
  '--length_buckets) and neither --gen_length nor --open_length is set.',
)


def main(args):
  if args.show_masks and not sys.stdout.isatty():
    raise UserError('--show_masks redraws a terminal: remove it')
  config.require_workdir(args.workdir)
  from maskdiff.distributed import runtime

  with runtime.started():
    chat(args)


def chat(args):
  import jax

  from maskdiff.distributed import runtime
  from maskdiff.sampling import lengths
  from maskdiff.sampling.prompts import typed
  from maskdiff.serving import screen, setup
  from maskdiff.serving.conversation import Conversation

  # Orbax warns that the checkpoint is opened read-only, which is intended.
  logging.set_verbosity(logging.ERROR)
  if jax.process_count() > 1:
    raise UserError('launch/chat.py needs a single process')
  model, network, mesh = setup.open_model(args, args.workdir)
  if not model.chat:
    raise UserError(
      f'{args.workdir} has no chat template: choose one with --chat_template'
    )
  predicts = lengths.chosen(
    args.length,
    model.config.data.length_tokens,
    args.gen_length,
    args.open_length,
  )
  model = dataclasses.replace(model, predict_length=predicts)
  conversation = Conversation(args.system, args.seed)
  show = screen.print_with_masks if args.show_masks else screen.print_committed
  lines = typed(sys.stdin, runtime.print_once)
  with jax.set_mesh(mesh), contextlib.suppress(KeyboardInterrupt):
    for line in lines:
      try:
        if line.startswith('/') and not line.startswith('//'):
          print(conversation.command(line))
        elif line.strip():
          text = line.removeprefix('/')
          show(conversation.answer(model, network, text))
      except KeyboardInterrupt:  # during an answer, which is then dropped
        print('stopped; Ctrl-D ends the conversation')
      except UserError as error:
        runtime.print_once(f'error: {error}')
      if conversation.ended:
        break


if __name__ == '__main__':
  config.run_script(main)
