"""Names of the gradients of the golden Qwen2-like network `model_sdlm`."""

import numpy as np

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


def gradient_norms(gradients):
  """Returns the L2 norm of each array of a gradient tree, by its name."""
  norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64).ravel()))
  norms = {name: norm(gradients[key]) for key, name in TOP.items()}
  for key, name in BLOCKS.items():
    for n, x in enumerate(gradients['blocks'][key]):
      norms[f'model.layers.{n}.{name}'] = norm(x)
  return norms
