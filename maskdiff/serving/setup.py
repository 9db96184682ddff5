"""Loads the model of launch/serve.py and launch/chat.py, as their flags say."""

import dataclasses

from maskdiff import config as config_lib
from maskdiff.interop import load
from maskdiff.sampling.settings import of_request
from maskdiff.serving.asked import Model
from maskdiff.serving.chat_prompts import open_chat


def open_model(args, name):
  """Loads a model with the sampler settings of the flags.

  Args:
    args: FLAGS, with those of command_line.
    name: name of the model.

  Returns:
    asked.Model, Network, and the mesh of the parameters.

  Raises:
    UserError: the model cannot be loaded, or a flag is not valid.
  """
  config, tokenizer, params, mesh = load.load(
    args.workdir, args.tensor, args.dtype, args.ema, args.rope_scaling
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
