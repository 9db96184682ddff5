"""A training that begins with a published checkpoint, named after the colon.

python launch/pretrain.py --config configs/published.py:DIR \
  --workdir runs/warm --config.data.path=data/rows

DIR is a folder in Hugging Face's form: LLaDA and Dream are trained further,
Llama and Qwen become masked diffusion models that predict the next position,
as Dream was made of Qwen. Model, token ids, tokenizer and config.init_from are
DIR's; rates and lengths are only a beginning.
"""

from maskdiff.config import default
from maskdiff.errors import UserError
from maskdiff.interop import hf


def get_config(folder=''):
  if not folder:
    raise UserError('name the folder: --config configs/published.py:DIR')
  published = hf.open_folder(folder)
  tokenizer = hf.open_tokenizer(published)
  if tokenizer is None:
    raise UserError(f'{folder} has no tokenizer')
  c = default()
  hf.fill(c, published, tokenizer)
  c.init_from = folder
  if published.family.objective == 'autoregressive':
    c.model.predict_next = True
  c.data.length = 1024
  c.optimizer.learning_rate = 2e-5
  c.optimizer.final_learning_rate = 2e-6
  return c
