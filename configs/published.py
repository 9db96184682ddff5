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
from maskdiff.interop import hf, hf_config, hf_tokenizer, mask_token


def get_config(folder=''):
  if not folder:
    raise UserError('name the folder: --config configs/published.py:DIR')
  published = hf.open_folder(str(local_path(folder)))
  tokenizer = hf_tokenizer.open_tokenizer(published, may_grow=True)
  if tokenizer is None:
    raise UserError(f'{folder} has no tokenizer')
  c = default()
  hf_config.fill(c, published, tokenizer)
  c.model.vocab_size = mask_token.grown_rows(
    c.model.vocab_size, c.tokens.mask_id
  )
  c.init_from = folder
  if published.family.has_mask_token:
    hf_config.set_objective(c, published)
  else:
    c.model.predict_next = True
  c.data.length = 1024
  c.optimizer.learning_rate = 2e-5
  c.optimizer.final_learning_rate = 2e-6
  return c
