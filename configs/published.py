"""Warm start from a Hugging Face folder, named after the colon.

python launch/pretrain.py --config configs/published.py:DIR \
  --workdir runs/warm --config.data.path=data/rows

LLaDA, Dream, SDAR and others are trained further. Llama and Qwen become masked
diffusion models with config.model.predict_next, as Dream was made from Qwen, or
block diffusion models with --config.objective.name=block_diffusion. The folder
sets config.model, config.tokens, the tokenizer and config.init_from. A network
without a mask token gets one. Tune the learning rates and the row length for
your data.
"""

from maskdiff.config import default
from maskdiff.errors import UserError
from maskdiff.files.paths import local_path
from maskdiff.interop import hf, hf_config


def get_config(folder=''):
  if not folder:
    raise UserError('name the folder: --config configs/published.py:DIR')
  c = default()
  hf_config.start(c, hf.open_folder(str(local_path(folder))))
  c.init_from = folder
  c.data.length = 1024
  c.optimizer.learning_rate = 2e-5
  c.optimizer.final_learning_rate = 2e-6
  return c
