"""Names, shapes and axes of published tensors.

LLaDA's names come from its published modelling code (ML-GSAI/LLaDA), the names
of other families from transformers. A matrix is published as [out, in]. In the
parameter tree it is [in, out], and heads have an axis of their own. LINEAR
gives the number of input axes of each matrix; all other parameters have the
same axes in both forms.
"""

import math

import numpy as np

# Number of input axes of each matrix.
LINEAR = {
  'head': 1,
  'blocks/q': 1,
  'blocks/k': 1,
  'blocks/v': 1,
  'blocks/o': 2,
  'blocks/gate': 1,
  'blocks/up': 1,
  'blocks/down': 1,
}
# {n} is the index of the layer.
LLAMA_NAMES = {
  'embed': 'model.embed_tokens.weight',
  'norm': 'model.norm.weight',
  'head': 'lm_head.weight',
  'blocks/norm1': 'model.layers.{n}.input_layernorm.weight',
  'blocks/q': 'model.layers.{n}.self_attn.q_proj.weight',
  'blocks/k': 'model.layers.{n}.self_attn.k_proj.weight',
  'blocks/v': 'model.layers.{n}.self_attn.v_proj.weight',
  'blocks/q_bias': 'model.layers.{n}.self_attn.q_proj.bias',
  'blocks/k_bias': 'model.layers.{n}.self_attn.k_proj.bias',
  'blocks/v_bias': 'model.layers.{n}.self_attn.v_proj.bias',
  'blocks/q_norm': 'model.layers.{n}.self_attn.q_norm.weight',
  'blocks/k_norm': 'model.layers.{n}.self_attn.k_norm.weight',
  'blocks/o': 'model.layers.{n}.self_attn.o_proj.weight',
  'blocks/norm2': 'model.layers.{n}.post_attention_layernorm.weight',
  'blocks/gate': 'model.layers.{n}.mlp.gate_proj.weight',
  'blocks/up': 'model.layers.{n}.mlp.up_proj.weight',
  'blocks/down': 'model.layers.{n}.mlp.down_proj.weight',
}
LLADA_NAMES = {
  'embed': 'model.transformer.wte.weight',
  'norm': 'model.transformer.ln_f.weight',
  'head': 'model.transformer.ff_out.weight',
  'blocks/norm1': 'model.transformer.blocks.{n}.attn_norm.weight',
  'blocks/q': 'model.transformer.blocks.{n}.q_proj.weight',
  'blocks/k': 'model.transformer.blocks.{n}.k_proj.weight',
  'blocks/v': 'model.transformer.blocks.{n}.v_proj.weight',
  'blocks/o': 'model.transformer.blocks.{n}.attn_out.weight',
  'blocks/norm2': 'model.transformer.blocks.{n}.ff_norm.weight',
  'blocks/gate': 'model.transformer.blocks.{n}.ff_proj.weight',
  'blocks/up': 'model.transformer.blocks.{n}.up_proj.weight',
  'blocks/down': 'model.transformer.blocks.{n}.ff_out.weight',
}
# Constants that early versions of transformers stored with the weights.
DERIVED = ('model.layers.{n}.self_attn.rotary_emb.inv_freq',)


def names(family, path, layers):
  """Returns the tensor names of a parameter: one, or one per layer.

  Args:
    family: families.Family.
    path: name of the parameter, such as 'blocks/q'.
    layers: number of layers.
  """
  pattern = family.names[path]
  if not path.startswith('blocks/'):
    return [pattern]
  return [pattern.format(n=n) for n in range(layers)]


def published_shape(path, shape):
  """Returns the published shape of a parameter, or of one layer of it.

  Args:
    path: name of the parameter, such as 'blocks/q'.
    shape: shape in the parameter tree, without the layer axis.
  """
  inputs = LINEAR.get(path)
  if inputs is None:
    return tuple(shape)
  return math.prod(shape[inputs:]), math.prod(shape[:inputs])


def from_published(path, tensor, shape):
  """Returns a view of a published tensor with the parameter tree's axes.

  Args:
    path: name of the parameter, such as 'blocks/q'.
    tensor: array of the published shape.
    shape: shape in the parameter tree, without the layer axis.
  """
  inputs = LINEAR.get(path)
  if inputs is None:
    return tensor.reshape(shape)
  view = tensor.reshape(*shape[inputs:], *shape[:inputs])
  outputs = len(shape) - inputs
  return view.transpose(*range(outputs, len(shape)), *range(outputs))


def to_published(path, array):
  """Returns a parameter with its published axes; inverts `from_published`."""
  inputs = LINEAR.get(path)
  if inputs is None:
    return array
  rows = math.prod(array.shape[:inputs])
  return np.reshape(array, (rows, -1)).T
