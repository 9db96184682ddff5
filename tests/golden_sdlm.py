"""Reads the golden Qwen2-like network `model_sdlm` as a parameter tree."""

import json

import numpy as np
from golden_models import GOLDEN
from safetensors.numpy import load_file

from maskdiff.model.transformer import TransformerConfig

# State-dict name of each weight. Names in BLOCKS follow `model.layers.N.`.
TOP = {
  'embed': 'model.embed_tokens.weight',
  'norm': 'model.norm.weight',
  'head': 'lm_head.weight',
}
BLOCKS = {
  'norm1': 'input_layernorm.weight',
  'q': 'self_attn.q_proj.weight',
  'q_bias': 'self_attn.q_proj.bias',
  'k': 'self_attn.k_proj.weight',
  'k_bias': 'self_attn.k_proj.bias',
  'v': 'self_attn.v_proj.weight',
  'v_bias': 'self_attn.v_proj.bias',
  'o': 'self_attn.o_proj.weight',
  'norm2': 'post_attention_layernorm.weight',
  'gate': 'mlp.gate_proj.weight',
  'up': 'mlp.up_proj.weight',
  'down': 'mlp.down_proj.weight',
}


def load_sdlm():
  """Returns the TransformerConfig, in float32, and the parameters."""
  folder = GOLDEN / 'model_sdlm'
  c = json.loads((folder / 'config.json').read_text())
  heads, layers = c['num_attention_heads'], c['num_hidden_layers']
  head_dim = c['hidden_size'] // heads
  config = TransformerConfig(
    vocab_size=c['vocab_size'],
    embed=c['hidden_size'],
    layers=layers,
    heads=heads,
    kv_heads=c['num_key_value_heads'],
    head_dim=head_dim,
    mlp=c['intermediate_size'],
    tie_embeddings=c['tie_word_embeddings'],
    rope_theta=c['rope_theta'],
    norm_eps=c['rms_norm_eps'],
    dtype='float32',
    remat='none',
    attention='xla',
    qkv_bias=True,
  )
  tensors = load_file(folder / 'model.safetensors')
  top = {key: tensors[name] for key, name in TOP.items()}
  blocks = {}
  for key, name in BLOCKS.items():
    w = np.stack([tensors[f'model.layers.{n}.{name}'] for n in range(layers)])
    w = w.swapaxes(1, 2) if w.ndim == 3 else w  # Linear: [out, in]
    if key in 'qkv':
      w = w.reshape(*w.shape[:2], -1, head_dim)
    blocks[key] = w.reshape(layers, heads, head_dim, -1) if key == 'o' else w
  return config, {**top, 'head': top['head'].T, 'blocks': blocks}


def gradient_norms(gradients):
  """Returns the L2 norm of each array of a gradient tree, by its name."""
  norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64).ravel()))
  norms = {name: norm(gradients[key]) for key, name in TOP.items()}
  for key, name in BLOCKS.items():
    for n, x in enumerate(gradients['blocks'][key]):
      norms[f'model.layers.{n}.{name}'] = norm(x)
  return norms
