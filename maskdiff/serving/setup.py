"""Loads the model of launch/serve.py and launch/chat.py, as their flags say."""

import dataclasses

from absl import flags

from maskdiff import config as config_lib
from maskdiff.interop import load
from maskdiff.sampling.settings import of_request
from maskdiff.serving.asked import Model
from maskdiff.serving.chat_prompts import open_chat


def define_flags():
  """Defines the flags that `open_model` reads."""
  flags.DEFINE_string('workdir', None, 'Work directory or Hugging Face folder.')
  flags.DEFINE_string(
    'chat_template',
    None,
    'Name of a chat template, such as plain; or a folder or *.jinja file with '
    'one. Default: that of the model.',
  )
  flags.DEFINE_string(
    'chat_arguments',
    None,
    'Variables of the chat template, as JSON: {"enable_thinking": false}.',
  )
  flags.DEFINE_bool('suppress_mask', False, 'Never predict the mask token.')
  flags.DEFINE_bool(
    'open_length',
    False,
    'Append blocks until the model predicts eos; at most --gen_length tokens.',
  )
  flags.mark_flag_as_required('workdir')
  config_lib.define_sample_flags()
  config_lib.define_load_flags()


def open_model(args, name):
  """Loads a model with the sampler settings of the flags.

  Args:
    args: FLAGS, with those of `define_flags`.
    name: name of the model.

  Returns:
    asked.Model, Network, and the mesh of the parameters.

  Raises:
    UserError: the model cannot be loaded, or a flag is not valid.
  """
  config, tokenizer, params, mesh = load.load(
    args.workdir, args.tensor, args.dtype, args.ema
  )
  context = config.data.length
  default = context if args.open_length else config.sample.gen_length
  gen_length = min(args.gen_length or default, context)
  values = config_lib.sample_settings(args, config, gen_length, gaps=False)
  network = load.network(config, params)
  if network.eos_id >= 0:
    values = {'stop_at_eos': True} | values
  if args.suppress_mask:
    network = dataclasses.replace(network, predict_mask=False)
  c, _ = of_request(config, values)
  chat = open_chat(
    args.chat_template, args.chat_arguments, args.workdir, tokenizer
  )
  return Model(name, config, c, values, tokenizer, context, chat), network, mesh
