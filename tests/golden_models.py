"""Reads the golden checkpoints as parameter trees of maskdiff."""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file

from maskdiff.checkpoints import manifest
from maskdiff.interop import families, hf
from maskdiff.model.network import Network
from maskdiff.model.transformer import TransformerConfig

GOLDEN = pathlib.Path(__file__).parent / 'golden'

# State-dict name of each parameter. Names in BLOCKS follow `blocks.N.`.
TOP = {'embed': 'wte', 'norm': 'ln_f', 'head': 'ff_out'}
BLOCKS = {
  'norm1': 'attn_norm',
  'q': 'q_proj',
  'k': 'k_proj',
  'v': 'v_proj',
  'o': 'attn_out',
  'norm2': 'ff_norm',
  'gate': 'ff_proj',
  'up': 'up_proj',
  'down': 'ff_out',
}


def names(path):
  """Returns the state-dict name of a parameter; for a layer, a format string.

  Args:
    path: 'embed', 'norm', 'head' or 'blocks/<weight>'.
  """
  block = path.startswith('blocks/')
  name = BLOCKS[path.removeprefix('blocks/')] if block else TOP[path]
  return f'model.transformer.{"blocks.{}." if block else ""}{name}.weight'


def load(name):
  """Returns the TransformerConfig, in float32, and parameters of a model."""
  c = json.loads((GOLDEN / name / 'config.json').read_text())
  head_dim = c['d_model'] // c['n_heads']
  config = TransformerConfig(
    vocab_size=c['embedding_size'],
    embed=c['d_model'],
    layers=c['n_layers'],
    heads=c['n_heads'],
    kv_heads=c['n_kv_heads'],
    head_dim=head_dim,
    mlp=c['mlp_hidden_size'],
    tie_embeddings=c['weight_tying'],
    rope_theta=c['rope_theta'],
    norm_eps=c['rms_norm_eps'],
    dtype='float32',
    remat='none',
    attention='xla',
  )
  tensors = load_file(GOLDEN / name / 'model.safetensors')
  top = {key: tensors[names(key)] for key in TOP}
  top['head'] = top['head'].T
  blocks = {
    key: np.stack(
      [tensors[names(f'blocks/{key}').format(n)] for n in range(c['n_layers'])]
    )
    for key in BLOCKS
  }
  return config, {**top, 'blocks': _from_torch(blocks, head_dim)}


def block_network(block_length, predict_next=False):
  """Returns `model_sdlm` as a Network that is trained on blocks, in float32.

  Args:
    block_length: tokens of a block.
    predict_next: whether an output predicts the token of the next position.
  """
  return _qwen(
    predict_next, objective='block_diffusion', block_length=block_length
  )


def window_network(window_length):
  """Returns `model_sdlm` as a Network of objective sdlm, in float32.

  Args:
    window_length: tokens of a window.
  """
  return _qwen(objective='sdlm', window_length=window_length, bos_id=-1)


def _qwen(predict_next=False, **fields):
  opened = hf.open_folder(GOLDEN / 'model_sdlm')
  config = TransformerConfig(
    **{field: opened.model[field] for field in families.FIELDS},
    predict_next=predict_next,
    dtype='float32',
    remat='none',
    attention='xla',
  )
  leaves = {
    name: np.array(leaf.read((slice(None),) * len(leaf.shape)))
    for name, leaf in opened.leaves.items()
  }
  return Network(
    config=config,
    params=manifest.nest(leaves),
    predict_mask=True,
    mask_id=opened.config['text_mask_token_id'],
    eos_id=opened.config['eos_token_id'],
    **{'bos_id': opened.config['bos_token_id'], **fields},
  )


def to_torch(params):
  """Returns a dict of parameters or gradients in state-dict form."""
  tensors = {names(key): np.asarray(params[key]) for key in TOP}
  tensors[names('head')] = tensors[names('head')].T
  for key, stacked in params['blocks'].items():
    stacked = np.asarray(stacked)
    if key == 'o':  # [N, H, K, D] -> [N, D, H K]
      stacked = stacked.reshape(len(stacked), -1, stacked.shape[-1])
    if key in ('q', 'k', 'v'):  # [N, D, H, K] -> [N, H K, D]
      stacked = stacked.reshape(*stacked.shape[:2], -1)
    if stacked.ndim == 3:
      stacked = stacked.swapaxes(1, 2)
    for n, tensor in enumerate(stacked):
      tensors[names(f'blocks/{key}').format(n)] = tensor
  return tensors


def _from_torch(blocks, head_dim):
  """Converts stacked Linear weights, [N, out, in], to parameter-tree axes."""
  out = {}
  for key, w in blocks.items():
    w = w.swapaxes(1, 2) if w.ndim == 3 else w
    if key in ('q', 'k', 'v'):
      w = w.reshape(*w.shape[:2], -1, head_dim)
    if key == 'o':
      w = w.reshape(w.shape[0], -1, head_dim, w.shape[-1])
    out[key] = w
  return out
