"""A sampler for masked diffusion models in PyTorch.

This is the baseline of benchmarks/sampler.py: the same network with the same
weights, and low-confidence remasking at temperature 0, in eager mode, in
float32 and on all cores. As in the published code, each denoising step computes
logits at all positions.
"""

import numpy as np
import torch
from torch.nn import functional as F


def load(c, params):
  """Converts parameters to torch tensors.

  Args:
    c: transformer.TransformerConfig.
    params: parameter tree, float32.

  Returns:
    Dict of tensors: embed [V, D], head [V, D], norm [D], and layers, a list of
    dicts of norms and matrices [outputs, inputs].
  """

  def tensor(x):
    return torch.from_numpy(np.array(x, np.float32, order='C', copy=True))

  def layer(i):
    w = {name: np.asarray(x[i]) for name, x in params['blocks'].items()}
    qkv = np.concatenate([w[n].reshape(c.embed, -1) for n in 'qkv'], axis=1)
    return {
      'norm1': tensor(w['norm1']),
      'qkv': tensor(qkv.T),
      'o': tensor(w['o'].reshape(-1, c.embed).T),
      'norm2': tensor(w['norm2']),
      'gate_up': tensor(np.concatenate([w['gate'], w['up']], axis=1).T),
      'down': tensor(w['down'].T),
    }

  embed = tensor(params['embed'])
  return {
    'embed': embed,
    'head': embed if c.tie_embeddings else tensor(params['head'].T),
    'norm': tensor(params['norm']),
    'layers': [layer(i) for i in range(c.layers)],
  }


def forward(c, weights, tokens):
  """Returns logits of all positions, [B, L, V], for tokens [B, L]."""
  return F.linear(hidden_states(c, weights, tokens), weights['head'])


def hidden_states(c, weights, tokens):
  """Returns the final hidden states, [B, L, D], for tokens [B, L]."""
  batch, length = tokens.shape
  rotation = _rope(length, c.head_dim, c.rope_theta)
  sizes = [c.heads, c.kv_heads, c.kv_heads]
  x = F.embedding(tokens, weights['embed'])
  for w in weights['layers']:
    h = F.rms_norm(x, (c.embed,), w['norm1'], c.norm_eps)
    heads = F.linear(h, w['qkv']).view(batch, length, -1, c.head_dim)
    q, k, v = heads.transpose(1, 2).split(sizes, dim=1)
    attended = F.scaled_dot_product_attention(
      _rotate(q, rotation),
      _rotate(k, rotation),
      v,
      enable_gqa=c.heads != c.kv_heads,
    )
    x = x + F.linear(attended.transpose(1, 2).flatten(2), w['o'])
    h = F.rms_norm(x, (c.embed,), w['norm2'], c.norm_eps)
    gate, up = F.linear(h, w['gate_up']).chunk(2, dim=-1)
    x = x + F.linear(F.silu(gate) * up, w['down'])
  return F.rms_norm(x, (c.embed,), weights['norm'], c.norm_eps)


def _rope(length, head_dim, theta):
  frequency = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
  angle = torch.arange(length)[:, None] * frequency
  angle = torch.cat([angle, angle], dim=-1)
  return angle.cos(), angle.sin()


def _rotate(x, rotation):
  cos, sin = rotation
  first, second = x.chunk(2, dim=-1)
  return x * cos + torch.cat([-second, first], dim=-1) * sin


@torch.inference_mode()
def generate(c, weights, canvas, prompt, block_length, steps, mask_id):
  """Fills all positions after the prompt.

  Args:
    c: transformer.TransformerConfig.
    weights: from `load`.
    canvas: [B, L] int; values after the prompt are ignored.
    prompt: number of prompt tokens.
    block_length: int, divides the number of other tokens.
    steps: int, denoising steps of all blocks together.
    mask_id: int.

  Returns:
    [B, L] int64 array.
  """
  canvas = torch.tensor(np.asarray(canvas), dtype=torch.int64)
  canvas[:, prompt:] = mask_id
  blocks = (canvas.shape[1] - prompt) // block_length
  per_step = steps // blocks
  for block in range(blocks):
    end = prompt + (block + 1) * block_length
    for step in range(per_step):
      masked = canvas == mask_id
      logits = forward(c, weights, canvas)
      logits[..., mask_id] = -torch.inf
      token = logits.argmax(dim=-1)
      probability = torch.softmax(logits, dim=-1)
      confidence = probability.gather(-1, token[..., None])[..., 0]
      confidence[:, end:] = -torch.inf
      confidence = torch.where(masked, confidence, -torch.inf)
      budget = block_length // per_step + (step < block_length % per_step)
      for row in range(len(canvas)):
        best = confidence[row].topk(budget).indices
        canvas[row, best] = token[row, best]
  return canvas.numpy()
