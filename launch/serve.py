r"""Serves a trained model over HTTP, in the protocol of OpenAI's API.

python launch/serve.py --workdir runs/tiny --port 8000 \
  [--chat_template plain] [--gen_length 64] [--remasking threshold]
python launch/serve.py --workdir runs/tiny --batch 32 --lengths 256,1024

Paths: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics.
Flags with the name of a key of config.sample override the run's config. They
are the defaults of requests, which may set those that need no other program.
Needs the packages of requirements-serve.txt.
"""

import dataclasses
import os

from absl import flags, logging

from maskdiff import config
from maskdiff.errors import UserError
from maskdiff.serving import command_line

command_line.define_flags()
flags.DEFINE_string(
  'host', '127.0.0.1', 'Address to listen on. 0.0.0.0: all of this machine.'
)
flags.DEFINE_integer(
  'port', 8000, 'Port. 0: any that is free.', lower_bound=0, upper_bound=65535
)
flags.DEFINE_string(
  'model_name', None, 'Name of the model. Default: the name of its folder.'
)
flags.DEFINE_integer('batch', 16, 'Rows per batch.', lower_bound=1)
flags.DEFINE_list(
  'lengths',
  None,
  'Row lengths, each with a batch and a program that is compiled at the start. '
  'A request takes a row of the shortest length that has room for it. Default: '
  'config.data.length, and a quarter of it where that is faster.',
)
flags.DEFINE_integer(
  'max_waiting',
  1024,
  'Waiting requests at which further ones are refused with status 503.',
  lower_bound=1,
)
flags.DEFINE_float(
  'grace',
  10.0,
  'Seconds that requests may take to end after SIGTERM or Ctrl-C.',
  lower_bound=0,
)
flags.DEFINE_integer(
  'max_requests', 0, 'End after this many HTTP requests. 0: no limit.'
)


def main(args):
  config.require_workdir(args.workdir)
  from maskdiff.distributed import runtime

  with runtime.started():
    serve(args)


def serve(args):
  import jax

  from maskdiff.distributed import runtime
  from maskdiff.serving import server as server_lib  # reports missing packages
  from maskdiff.serving import setup
  from maskdiff.serving.batch import default_lengths
  from maskdiff.serving.engine import Engine

  # Orbax warns that the checkpoint is opened read-only, which is intended.
  logging.set_verbosity(logging.ERROR)
  if jax.process_count() > 1:
    raise UserError('launch/serve.py needs a single process')
  listener = server_lib.listen(args.host, args.port)
  name = args.model_name or os.path.basename(os.path.abspath(args.workdir))
  model, network, mesh = setup.open_model(args, name)
  lengths = default_lengths(network, model.c, model.length)
  if args.lengths:
    lengths = _parse_lengths(args.lengths, model.length)
  model = dataclasses.replace(model, length=lengths[-1])
  if model.config.data.length_tokens:
    runtime.print_once(
      'note: the model was trained to predict the lengths of answers, which '
      'launch/serve.py does not do; launch/chat.py does'
    )
  shown = ' and '.join(map(str, lengths))
  runtime.print_once(f'compiling for rows of {shown} tokens')
  engine = Engine(network, model.c, args.batch, lengths, mesh, args.max_waiting)
  engine.start()
  server = server_lib.Server(
    model, engine, args.grace, args.max_requests or None
  )
  host, port = listener.getsockname()[:2]
  runtime.print_once(f'serving {name} at http://{host}:{port}/v1')
  server_lib.run(server, listener)


def _parse_lengths(texts, context):
  try:
    lengths = sorted({int(text) for text in texts})
  except ValueError:
    lengths = []
  if not lengths or not 1 < lengths[0] <= lengths[-1] <= context:
    raise UserError(
      f'--lengths={",".join(texts)}: must be numbers of tokens up to '
      f'config.data.length={context}, such as {context // 2},{context}'
    )
  return lengths


if __name__ == '__main__':
  config.run_script(main)
