"""Logits of the published architectures in NumPy, to check conversions.

The forward pass is written in float32 from the papers and the formulas of the
published code. It reads the tensors under their published names and shares no
code with model/transformer.py. If both implementations give the same logits,
the conversion has the right names, shapes and transpositions. Each tensor is
read when its layer is computed.
"""

import numpy as np

from maskdiff.objectives.table import OBJECTIVES

_VOCAB_ROWS = 8192


def logits(published, tokens):
  """Returns the logits of a Hugging Face folder's model, [L, V] float32.

  Row i has the output of the published network at position i. If the network
  predicts the next token, these are the logits of token i + 1.

  Args:
    published: hf.Published.
    tokens: [L] int.
  """
  m, family = published.model, published.family
  names, tensors = family.names, published.tensors
  H, G, K = m['heads'], m['kv_heads'], m['head_dim']
  length = len(tokens)
  size = attention_block(family.objective, m['block_length'], length)
  block = np.arange(length) // size
  hidden_keys = block > block[:, None]

  def read(name, n=0):
    return tensors[names[name].format(n=n)].view().astype(np.float32)

  def linear(x, name, n):
    y = x @ read(f'blocks/{name}', n).T
    bias = tensors.get(names.get(f'blocks/{name}_bias', '').format(n=n))
    return y if bias is None else y + bias.view().astype(np.float32)

  cos, sin = _rotary_angles(m, length)
  hidden = tensors[names['embed']].view()[tokens].astype(np.float32)
  for n in range(m['layers']):
    h = _norm(hidden, read('blocks/norm1', n), m['norm_eps'])
    q = linear(h, 'q', n).reshape(length, H, K)
    k = linear(h, 'k', n).reshape(length, G, K)
    v = linear(h, 'v', n).reshape(length, G, K)
    if m['qk_norm']:
      q = _norm(q, read('blocks/q_norm', n), m['norm_eps'])
      k = _norm(k, read('blocks/k_norm', n), m['norm_eps'])
    q, k = (_rotate(x, cos, sin) for x in (q, k))
    out = np.empty((length, H, K), np.float32)
    for head in range(H):
      kv_head = head // (H // G)
      scores = q[:, head] @ k[:, kv_head].T / np.float32(np.sqrt(K))
      scores[hidden_keys] = -np.inf
      weights = np.exp(scores - scores.max(axis=1, keepdims=True))
      weights /= weights.sum(axis=1, keepdims=True)
      out[:, head] = weights @ v[:, kv_head]
    hidden = hidden + linear(out.reshape(length, H * K), 'o', n)
    h = _norm(hidden, read('blocks/norm2', n), m['norm_eps'])
    gate = linear(h, 'gate', n)
    inner = gate / (1 + np.exp(-gate)) * linear(h, 'up', n)
    hidden = hidden + linear(inner, 'down', n)
  hidden = _norm(hidden, read('norm'), m['norm_eps'])
  tied = m['tie_embeddings']
  projection = tensors[names['embed' if tied else 'head']].view()
  return np.concatenate(
    [
      hidden @ projection[i : i + _VOCAB_ROWS].astype(np.float32).T
      for i in range(0, m['vocab_size'], _VOCAB_ROWS)
    ],
    axis=1,
  )


def attention_block(name, block_length, length):
  """Returns the tokens of a block, whose positions see each other.

  A position also sees all blocks before its own.

  Args:
    name: name of an objective.
    block_length: tokens of a block, if the objective has blocks.
    length: L, tokens of a row.

  Returns:
    1 for causal attention, L for bidirectional attention.
  """
  objective = OBJECTIVES[name]
  if objective.by_blocks:
    return block_length
  return 1 if objective.left_to_right else length


def _norm(x, gain, eps):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def _rotary_angles(m, length):
  """Returns cosines and sines of the rotary embedding, [L, 1, K/2] each."""
  K = m['head_dim']
  wavelength = 2 * np.pi * m['rope_theta'] ** (np.arange(0, K, 2) / K)
  if m['rope_scaling']:
    factor, low, high, context = m['rope_scaling']
    mix = (context / wavelength - low) / (high - low)
    stretch = 1 / ((1 - mix) / factor + mix)
    wavelength = np.select(
      [wavelength > context / low, wavelength < context / high],
      [wavelength * factor, wavelength],
      wavelength * stretch,
    )
  angle = 2 * np.pi * np.arange(length)[:, None, None] / wavelength
  return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _rotate(x, cos, sin):
  """Rotates the pairs (i, i + K/2) of x, [L, H, K]."""
  first, second = np.split(x, 2, axis=-1)
  return np.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
