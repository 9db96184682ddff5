"""Makes small Hugging Face folders, without the package transformers."""

import json

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from maskdiff.interop import config_export, families, hf
from maskdiff.interop.leaves import Leaf

BASE = {
  'vocab_size': 272,
  'embed': 16,
  'layers': 2,
  'heads': 4,
  'kv_heads': 2,
  'head_dim': 4,
  'mlp': 24,
  'tie_embeddings': False,
  'rope_theta': 1e4,
  'rope_scaling': (),
  'norm_eps': 1e-6,
  'block_length': 0,
}
# Fields in which the model of a case differs from BASE.
MODELS = {
  'llada': {'kv_heads': 4},
  'llada tied': {'tie_embeddings': True},
  'dream': {},
  'illada': {'tie_embeddings': True},
  'sdar': {'head_dim': 8, 'block_length': 4},
  'fast_dllm': {'tie_embeddings': True, 'block_length': 8},
  'sdlm': {'block_length': 4},
  'qwen2': {'tie_embeddings': True},
  'qwen3': {'head_dim': 8},
  'llama': {'head_dim': 6},
  'llama 3.1': {'rope_scaling': (8.0, 1.0, 4.0, 32.0)},
}
TOKENS = {'mask_id': 258, 'bos_id': 256, 'eos_id': 257}
SPECIAL = ['<|startoftext|>', '<|endoftext|>', '<|mdm_mask|>']


def model_of(case):
  """Returns the Family of a case of MODELS, and the fields of its model."""
  family = families.BY_NAME[case.split()[0]]
  model = {**BASE, **MODELS[case]}
  for field in ('qkv_bias', 'qk_norm', 'predict_next'):
    model[field] = getattr(family, field)
  return family, model


def random_leaves(model, dtype='float32', seed=0):
  """Returns random parameters, a dict of Leaf by name; gains are about 1."""
  random = np.random.default_rng(seed)

  def draw(name, shape):
    if 'norm' in name:
      array = random.uniform(0.7, 1.3, shape)
    else:
      array = random.normal(size=shape) * 0.4
    array = array.astype(np.dtype(dtype))
    return Leaf(shape, array.dtype, lambda index: array[index])

  return {name: draw(name, s) for name, s in hf.shapes(model).items()}


def make(folder, case='llada', dtype='float32', tokenizer=True, **kwargs):
  """Writes the Hugging Face folder of a case of MODELS, and returns its path.

  Args:
    folder: path to create.
    case: key of MODELS.
    dtype: name of the weights' dtype.
    tokenizer: whether to write a tokenizer, which has 259 ids.
    **kwargs: passed to hf.write_weights.
  """
  family, model = model_of(case)
  folder.mkdir()
  config = config_export.published_config(
    family, model, TOKENS, 64, dtype, block_length=model['block_length']
  )
  (folder / 'config.json').write_text(json.dumps(config))
  hf.write_weights(folder, family, random_leaves(model, dtype), **kwargs)
  if tokenizer and case == 'dream':  # which is published without a .json
    save_vocabulary(folder)
  elif tokenizer:
    save_tokenizer(folder)
  (folder / 'chat_template.jinja').write_text('{{ messages }}')
  (folder / 'generation_config.json').write_text('{"top_p": 0.9}')
  return folder


def save_tokenizer(folder, words=()):
  """Writes a tokenizer of bytes, the given words and three special tokens."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate([*alphabet, *words])}
  made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.add_special_tokens(SPECIAL)
  made.save(str(folder / 'tokenizer.json'))
  config = {'bos_token': SPECIAL[0], 'eos_token': SPECIAL[1]}
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))


def save_vocabulary(folder):
  """Writes the tokenizer of `save_tokenizer` as vocab.json and merges.txt."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocabulary = {token: i for i, token in enumerate(alphabet)}
  (folder / 'vocab.json').write_text(json.dumps(vocabulary))
  (folder / 'merges.txt').write_text('#version: 0.2\n')
  added = {
    str(256 + i): {'content': token, 'special': True}
    for i, token in enumerate(SPECIAL)
  }
  config = {
    'added_tokens_decoder': added,
    'bos_token': SPECIAL[0],
    'eos_token': SPECIAL[1],
    'tokenizer_class': 'DreamTokenizer',
  }
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))


def contents(folder):
  """Returns the bytes of every file below a folder, by relative path."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(folder.rglob('*'))
    if path.is_file()
  }
