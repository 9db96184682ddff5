"""Published architectures as data: config keys, tensor names and shapes.

A `Family` maps fields of the model to keys of its config.json, lists the values
of other keys that this package supports, and maps parameters to tensor names.
LLaDA's names come from its published modelling code (ML-GSAI/LLaDA), the names
of other families from transformers. To add a family, add a `Family` to
FAMILIES.

A matrix is published as [out, in]. In the parameter tree it is [in, out], and
heads have an axis of their own. LINEAR gives the number of input axes of each
matrix; all other parameters have the same axes in both forms.
"""

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from maskdiff.errors import UserError, inline
from maskdiff.files import folder as folder_lib
from maskdiff.interop import config_keys
from maskdiff.model import ntk

CONFIG = 'config.json'
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
# Keys of config.model that the weights determine.
FIELDS = (
  'vocab_size',
  'embed',
  'layers',
  'heads',
  'kv_heads',
  'head_dim',
  'mlp',
  'tie_embeddings',
  'rope_theta',
  'rope_scaling',
  'norm_eps',
  'qkv_bias',
  'qk_norm',
)
# {n} is the index of the layer.
_LLAMA_NAMES = {
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
_LLADA_NAMES = {
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
_DERIVED = ('model.layers.{n}.self_attn.rotary_emb.inv_freq',)

_LLAMA_KEYS = {
  'vocab_size': 'vocab_size',
  'embed': 'hidden_size',
  'layers': 'num_hidden_layers',
  'heads': 'num_attention_heads',
  'kv_heads': 'num_key_value_heads',
  'mlp': 'intermediate_size',
  'tie_embeddings': 'tie_word_embeddings',
  'norm_eps': 'rms_norm_eps',
  'length': 'max_position_embeddings',
}
_LLADA_KEYS = {
  'vocab_size': 'embedding_size',
  'embed': 'd_model',
  'layers': 'n_layers',
  'heads': 'n_heads',
  'kv_heads': 'n_kv_heads',
  'mlp': 'mlp_hidden_size',
  'tie_embeddings': 'weight_tying',
  'norm_eps': 'rms_norm_eps',
  'length': 'max_sequence_length',
}
_QWEN_REQUIRED = {
  'hidden_act': ('silu', 'swish'),  # two names of one function
  'use_sliding_window': (False,),
}
_QWEN_IGNORED = ('sliding_window', 'max_window_layers')
_LLADA_REQUIRED = {
  'block_type': ('llama',),
  'block_group_size': (1,),
  'activation_type': ('silu',),
  'layer_norm_type': ('rms',),
  'layer_norm_with_affine': (True,),
  'bias_for_layer_norm': (False, None),
  'rope': (True,),
  'alibi': (False,),
  'include_bias': (False,),
  'include_qkv_bias': (False, None),
  'attention_layer_norm': (False,),
  'input_emb_norm': (False,),
  'scale_logits': (False,),
  'multi_query_attention': (False, None),
}
_LLADA_TEMPLATE = {
  'activation_type': 'silu',
  'alibi': False,
  'alibi_bias_max': 8.0,
  'attention_dropout': 0.0,
  'attention_layer_norm': False,
  'attention_layer_norm_with_affine': True,
  'auto_map': {
    'AutoConfig': 'configuration_llada.LLaDAConfig',
    'AutoModelForCausalLM': 'modeling_llada.LLaDAModelLM',
    'AutoModel': 'modeling_llada.LLaDAModelLM',
  },
  'bias_for_layer_norm': False,
  'block_group_size': 1,
  'block_type': 'llama',
  'embedding_dropout': 0.0,
  'flash_attention': False,
  'include_bias': False,
  'include_qkv_bias': False,
  'init_cutoff_factor': None,
  'init_device': 'meta',
  'init_fn': 'mitchell',
  'init_std': 0.02,
  'input_emb_norm': False,
  'layer_norm_type': 'rms',
  'layer_norm_with_affine': True,
  'mlp_ratio': 4,
  'multi_query_attention': None,
  'precision': None,
  'residual_dropout': 0.0,
  'rope': True,
  'rope_full_precision': True,
  'scale_logits': False,
  'use_cache': False,
}
_QWEN_TEMPLATE = {
  'attention_dropout': 0.0,
  'hidden_act': 'silu',
  'initializer_range': 0.02,
  'use_cache': True,
  'use_sliding_window': False,
}


@dataclasses.dataclass(frozen=True)
class Family:
  """One family of published architectures.

  Attributes:
    name: value of `--family`, also used in messages.
    model_type: `model_type` in config.json.
    architectures: accepted `architectures` in config.json; the first is
      written.
    keys: map from a field of the model to its key in config.json.
    required: map from a key of config.json to its supported values. An absent
      key has the default of config_keys.DEFAULTS.
    ignored: keys that the published code does not read, or reads only if a
      required key had another value.
    end_of_turn: the token that ends a turn of a chat, in the tokenizers of
      this family; '' if it is not known.
    names: map from a parameter to the published name of its tensor, see
      _LLAMA_NAMES.
    template: other entries of a new config.json.
    objective: training objective of the published networks.
    derived: names of tensors that are ignored.
    qkv_bias: value of config.model.qkv_bias.
    qk_norm: value of config.model.qk_norm.
    predict_next: value of config.model.predict_next.
    block_key: key of the block length of block diffusion, or of the window
      length of SDLM; '' if config.json has none.
    marker: key of config.json that tells the family from another one with the
      same architecture; '' without one.
    mask_key: key of the id of the mask token.
    has_bos: whether a document of the training begins with bos.
    has_head_dim: whether config.json may have `head_dim`.
    head_dim: head size if config.json has none; 0: embed / heads.
    scales_rope: whether config.json may have `rope_scaling`.
  """

  name: str
  model_type: str
  architectures: tuple[str, ...]
  keys: Mapping[str, str]
  required: Mapping[str, tuple]
  names: Mapping[str, str]
  template: Mapping[str, Any]
  end_of_turn: str
  ignored: tuple[str, ...] = ()
  objective: str = 'autoregressive'
  derived: tuple[str, ...] = _DERIVED
  qkv_bias: bool = False
  qk_norm: bool = False
  predict_next: bool = False
  block_key: str = ''
  marker: str = ''
  mask_key: str = 'mask_token_id'
  has_bos: bool = True
  has_head_dim: bool = False
  head_dim: int = 0
  scales_rope: bool = True

  @property
  def has_mask_token(self):
    """Whether the published networks were trained with a mask token."""
    return self.objective != 'autoregressive'


FAMILIES = (
  Family(
    name='llada',
    model_type='llada',
    architectures=('LLaDAModelLM', 'LLaDAModel'),
    keys=_LLADA_KEYS,
    required=_LLADA_REQUIRED,
    names=_LLADA_NAMES,
    template=_LLADA_TEMPLATE,
    end_of_turn='<|eot_id|>',
    ignored=('alibi_bias_max',),
    objective='masked_diffusion',
    derived=(),
    scales_rope=False,
  ),
  Family(
    name='dream',
    model_type='Dream',
    architectures=('DreamModel',),
    keys=_LLAMA_KEYS,
    required=_QWEN_REQUIRED,
    names=_LLAMA_NAMES,
    template={
      **_QWEN_TEMPLATE,
      'auto_map': {
        'AutoConfig': 'configuration_dream.DreamConfig',
        'AutoModel': 'modeling_dream.DreamModel',
      },
    },
    end_of_turn='<|im_end|>',
    ignored=(*_QWEN_IGNORED, 'attention_bias', 'mlp_bias'),
    objective='masked_diffusion',
    qkv_bias=True,
    predict_next=True,
  ),
  # Its modelling code has LayerNorm instead of RMSNorm if layer_norm_eps is
  # set (modeling_illada.py of GSAI-ML/iLLaDA-8B-Base).
  Family(
    name='illada',
    model_type='illada',
    architectures=('ILLaDAForCausalLM',),
    keys=_LLAMA_KEYS,
    required={
      'hidden_act': ('silu', 'swish'),
      'attention_bias': (False,),
      'mlp_bias': (False,),
      'layer_norm_eps': (None,),
    },
    names=_LLAMA_NAMES,
    template={
      'attention_bias': False,
      'attention_dropout': 0.0,
      'auto_map': {
        'AutoConfig': 'configuration_illada.ILLaDAConfig',
        'AutoModel': 'modeling_illada.ILLaDAForCausalLM',
        'AutoModelForCausalLM': 'modeling_illada.ILLaDAForCausalLM',
      },
      'hidden_act': 'silu',
      'initializer_range': 0.02,
      'layer_norm_eps': None,
      'mlp_bias': False,
      'resid_pdrop': 0.0,
    },
    end_of_turn='',
    objective='masked_diffusion',
    derived=(),
    scales_rope=False,
  ),
  Family(
    name='sdar',
    model_type='sdar',
    architectures=('SDARForCausalLM',),
    keys=_LLAMA_KEYS,
    required={**_QWEN_REQUIRED, 'attention_bias': (False,)},
    names=_LLAMA_NAMES,
    template={
      **_QWEN_TEMPLATE,
      'attention_bias': False,
      'auto_map': {
        'AutoConfig': 'configuration_sdar.SDARConfig',
        'AutoModel': 'modeling_sdar.SDARModel',
        'AutoModelForCausalLM': 'modeling_sdar.SDARForCausalLM',
      },
      'fuse_cross_entropy': False,
    },
    end_of_turn='<|im_end|>',
    ignored=_QWEN_IGNORED,
    objective='block_diffusion',
    qk_norm=True,
    block_key='block_size',
    has_head_dim=True,
    head_dim=128,
  ),
  Family(
    name='fast_dllm',
    model_type='Fast_dLLM_Qwen',
    architectures=('Fast_dLLM_QwenForCausalLM',),
    keys=_LLAMA_KEYS,
    required=_QWEN_REQUIRED,
    names=_LLAMA_NAMES,
    template={
      **_QWEN_TEMPLATE,
      'auto_map': {
        'AutoConfig': 'configuration.Fast_dLLM_QwenConfig',
        'AutoModel': 'modeling.Fast_dLLM_QwenModel',
        'AutoModelForCausalLM': 'modeling.Fast_dLLM_QwenForCausalLM',
      },
    },
    end_of_turn='<|im_end|>',
    ignored=(*_QWEN_IGNORED, 'attention_bias'),
    objective='block_diffusion',
    qkv_bias=True,
    predict_next=True,
    block_key='bd_size',
  ),
  # Qwen2 whose config.json has the window length (OpenGVLab/SDLM-3B-D4).
  Family(
    name='sdlm',
    model_type='qwen2',
    architectures=('Qwen2ForCausalLM',),
    keys=_LLAMA_KEYS,
    required={**_QWEN_REQUIRED, 'causal_attn': (False,)},
    names=_LLAMA_NAMES,
    template={
      **_QWEN_TEMPLATE,
      'auto_map': {
        'AutoConfig': 'configuration_qwen2.Qwen2Config',
        'AutoModel': 'modeling_qwen2.Qwen2Model',
        'AutoModelForCausalLM': 'modeling_qwen2.Qwen2ForCausalLM',
      },
      'causal_attn': False,
    },
    end_of_turn='<|im_end|>',
    ignored=(*_QWEN_IGNORED, 'attention_bias'),
    objective='sdlm',
    qkv_bias=True,
    block_key='block_size',
    marker='block_size',
    mask_key='text_mask_token_id',
    has_bos=False,
  ),
  Family(
    name='qwen2',
    model_type='qwen2',
    architectures=('Qwen2ForCausalLM',),
    keys=_LLAMA_KEYS,
    required=_QWEN_REQUIRED,
    names=_LLAMA_NAMES,
    template=_QWEN_TEMPLATE,
    end_of_turn='<|im_end|>',
    ignored=(*_QWEN_IGNORED, 'attention_bias'),
    qkv_bias=True,
  ),
  Family(
    name='qwen3',
    model_type='qwen3',
    architectures=('Qwen3ForCausalLM',),
    keys=_LLAMA_KEYS,
    required={**_QWEN_REQUIRED, 'attention_bias': (False,)},
    names=_LLAMA_NAMES,
    template={**_QWEN_TEMPLATE, 'attention_bias': False},
    end_of_turn='<|im_end|>',
    ignored=_QWEN_IGNORED,
    qk_norm=True,
    has_head_dim=True,
    head_dim=128,
  ),
  Family(
    name='llama',
    model_type='llama',
    architectures=('LlamaForCausalLM',),
    keys=_LLAMA_KEYS,
    required={
      'hidden_act': ('silu', 'swish'),
      'attention_bias': (False,),
      'mlp_bias': (False,),
    },
    names=_LLAMA_NAMES,
    template={
      'attention_bias': False,
      'attention_dropout': 0.0,
      'hidden_act': 'silu',
      'initializer_range': 0.02,
      'mlp_bias': False,
      'pretraining_tp': 1,
      'use_cache': True,
    },
    end_of_turn='<|eot_id|>',
    has_head_dim=True,
  ),
)
BY_NAME = {family.name: family for family in FAMILIES}
_DTYPES = ('float32', 'bfloat16', 'float16')
_MAX_CONFIG_BYTES = 4 << 20


def read_config(folder, subfolder=''):
  """Returns the config.json of a folder, a dict.

  Args:
    folder: path of the folder.
    subfolder: the folder within it that has the file; it must not be a link.

  Raises:
    UserError: the file cannot be read, is a link to a file outside the folder,
      or is not a JSON object.
  """
  name = os.path.join(subfolder, CONFIG)
  found = folder_lib.read_json(folder, name, _MAX_CONFIG_BYTES)
  if not isinstance(found, dict):
    raise UserError(f'{os.path.join(folder, name)!r} is not a JSON object')
  return found


def is_published(folder):
  """Returns whether a folder has the config.json of a Hugging Face model.

  Raises:
    UserError: config.json is a link to a file outside the folder.
  """
  try:
    found = read_config(folder)
  except UserError:
    if os.path.islink(os.path.join(folder, CONFIG)):
      raise
    return False
  return 'model_type' in found or 'architectures' in found


def detect(published, path):
  """Returns the Family of a config.json.

  Args:
    published: contents of config.json, a dict.
    path: path of config.json, for error messages.

  Raises:
    UserError: the architecture is not in FAMILIES.
  """
  names = published.get('architectures') or []
  if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
    raise UserError(
      f'{path}: architectures={config_keys.shown(names)} must be a list of '
      'names'
    )
  for family in FAMILIES:
    if family.marker and family.marker not in published:
      continue
    if set(names) & set(family.architectures) or (
      not names and published.get('model_type') == family.model_type
    ):
      return family
  architecture = ', '.join(names) or published.get('model_type')
  if 'moe' in str(architecture).lower():
    raise UserError(
      f'{path}: architecture {inline(architecture, 200)} is a mixture of '
      'experts, which is not supported: use a dense model'
    )
  known = ', '.join(family.architectures[0] for family in FAMILIES)
  raise UserError(
    f'{path}: architecture {inline(architecture, 200)} is not supported; '
    f'supported architectures: {known}'
  )


def model_of(family, published, path):
  """Reads the fields of the model from a config.json.

  Absent keys have the defaults of the published class, see config_keys.py.

  Args:
    family: Family.
    published: contents of config.json, a dict.
    path: path of config.json, for error messages.

  Returns:
    dict with the keys FIELDS, `predict_next`, `length` (the longest context,
    in tokens), `block_length` (0 if the family has none) and `dtype` (of the
    weights).

  Raises:
    UserError: a value is not supported, or of the wrong type.
  """
  defaults = config_keys.DEFAULTS[family.name]
  value_of = lambda key: published.get(key, defaults.get(key))
  for key, allowed in family.required.items():
    config_keys.check_allowed(published, key, defaults, allowed, path)
  known = (*family.keys.values(), *family.required, *family.ignored)
  config_keys.check_others(published, known, path)
  found = {}
  for field in ('embed', 'heads', 'layers', 'length', *_AFTER):
    key = family.keys[field]
    value = value_of(key)
    if value is None and field in _IF_NULL:
      value = _IF_NULL[field](found, value_of)
    found[field] = config_keys.size(value, field, key, path)
  tied = value_of(family.keys['tie_embeddings'])
  if not isinstance(tied, bool):
    raise UserError(
      f'{path}: {family.keys["tie_embeddings"]}={config_keys.shown(tied)} must '
      'be true or false'
    )
  eps = family.keys['norm_eps']
  found['norm_eps'] = config_keys.number(value_of(eps), eps, path, below=1)
  found['head_dim'] = _head_dim(family, published, found, path)
  found['rope_theta'], found['rope_scaling'] = _rope(family, published, path)
  config_keys.check_token_ids(published, found['vocab_size'], path)
  dtype = published.get('torch_dtype') or published.get('dtype') or 'float32'
  dtype = str(dtype).removeprefix('torch.')
  if dtype not in _DTYPES:
    raise UserError(
      f'{path}: torch_dtype={config_keys.shown(dtype)} is not supported, only '
      f'{", ".join(_DTYPES)}'
    )
  return {
    **found,
    'tie_embeddings': tied,
    'qkv_bias': family.qkv_bias,
    'qk_norm': family.qk_norm,
    'predict_next': family.predict_next,
    'block_length': _block_length(family, value_of, found['length'], path),
    'dtype': dtype,
  }


# Fields whose value may follow from those before them, if it is null.
_AFTER = ('kv_heads', 'mlp', 'vocab_size')
_IF_NULL = {
  'kv_heads': lambda found, value_of: found['heads'],
  'mlp': lambda found, value_of: _product(value_of('mlp_ratio'), found),
  'vocab_size': lambda found, value_of: value_of('vocab_size'),
}


def _block_length(family, value_of, length, path):
  """Returns the tokens of a block, a divisor of the context; 0 without one."""
  key = family.block_key
  if not key:
    return 0
  found = config_keys.size(value_of(key), 'length', key, path)
  if length % found:
    raise UserError(
      f'{path}: {key}={found} does not divide {family.keys["length"]}={length}'
    )
  return found


def _product(ratio, found):
  """Returns the hidden size of LLaDA's MLP; None for other families."""
  return ratio * found['embed'] if type(ratio) is int else ratio


def _head_dim(family, published, found, path):
  """Returns the size of a head, after checking it and the numbers of heads."""
  embed, heads = found['embed'], found['heads']
  given = published.get('head_dim')
  given = family.head_dim or None if given is None else given
  if given is None and embed % heads:
    raise UserError(
      f'{path}: {family.keys["embed"]}={embed} is not a multiple of {heads} '
      'heads'
    )
  head_dim = embed // heads if given is None else given
  config_keys.size(head_dim, 'head_dim', 'head_dim', path)
  if not family.has_head_dim and head_dim * heads != embed:
    raise UserError(
      f'{path}: head_dim={head_dim} is not supported, only '
      f'{family.keys["embed"]} / {family.keys["heads"]} = {embed / heads:g}'
    )
  if heads % found['kv_heads'] or head_dim % 2:
    raise UserError(
      f'{path}: {heads} heads are not a multiple of {found["kv_heads"]} '
      f'key-value heads, or the head size {head_dim} is odd'
    )
  return head_dim


def _rope(family, published, path):
  """Returns rope_theta and rope_scaling of the TransformerConfig."""
  # transformers 5 and later store both under one key.
  entry = published.get('rope_parameters') or {}
  scaling = published.get('rope_scaling') or {}
  for key, value in (('rope_parameters', entry), ('rope_scaling', scaling)):
    if not isinstance(value, dict):
      raise UserError(
        f'{path}: {key}={config_keys.shown(value)} must be an object'
      )
  if entry and scaling and entry != scaling:
    raise UserError(
      f'{path} has both rope_parameters and rope_scaling: remove one of them'
    )
  default = config_keys.DEFAULTS[family.name].get('rope_theta')
  theta = entry.get('rope_theta', published.get('rope_theta'))
  theta = config_keys.number(
    default if theta is None else theta, 'rope_theta', path
  )
  scaling = {
    key: value
    for key, value in (entry or scaling).items()
    if key != 'rope_theta' and value is not None
  }
  key = 'rope_parameters' if entry else 'rope_scaling'
  rotated = scaling.pop('partial_rotary_factor', 1)
  kind = scaling.pop('rope_type', None) or scaling.pop('type', None)
  if not config_keys.equal(rotated, 1) or (kind is None and scaling):
    raise UserError(
      f'{path}: {key}={config_keys.shown(published[key])} is not supported, '
      "only rope_type 'llama3' or 'default'"
    )
  if kind in (None, 'default'):
    return theta, ()
  if kind != 'llama3' or not family.scales_rope:
    raise UserError(
      f'{path}: rope_scaling of type {config_keys.shown(kind)} is not '
      'supported, only ' + ('llama3' if family.scales_rope else 'null')
    )
  keys = (
    'factor',
    'low_freq_factor',
    'high_freq_factor',
    'original_max_position_embeddings',
  )
  for key in keys:
    if key not in scaling:
      raise UserError(f'{path}: rope_scaling lacks {key!r}')
  numbers = tuple(
    config_keys.number(scaling[key], f'rope_scaling.{key}', path)
    for key in keys
  )
  if not numbers[1] < numbers[2]:
    raise UserError(
      f'{path}: rope_scaling needs low_freq_factor below high_freq_factor'
    )
  return theta, numbers


def exported(model):
  """Returns the keys FIELDS of a model as config.json can express them.

  NTK scaling is another rope_theta.

  Args:
    model: mapping with the keys FIELDS.
  """
  fields = {field: model[field] for field in FIELDS}
  scaling = fields['rope_scaling'] = tuple(fields['rope_scaling'])
  if len(scaling) == 2:
    fields['rope_theta'] = ntk.scaled_theta(
      fields['rope_theta'], fields['head_dim'], *scaling
    )
    fields['rope_scaling'] = ()
  return fields


def misfit(family, model):
  """Returns the first config value that a family does not support, or None.

  Args:
    family: Family.
    model: mapping with the keys FIELDS.

  Returns:
    str such as 'config.model.qk_norm=True'; None if the family fits.
  """
  model = exported(model)
  for field in ('qkv_bias', 'qk_norm'):
    if model[field] != getattr(family, field):
      return f'config.model.{field}={model[field]}'
  if model['rope_scaling'] and not family.scales_rope:
    return f'config.model.rope_scaling={model["rope_scaling"]}'
  if (
    not family.has_head_dim
    and model['head_dim'] * model['heads'] != model['embed']
  ):
    return (
      f'config.model.head_dim={model["head_dim"]}, which is not embed / heads'
    )
  return None


def published_config(
  family, model, tokens, length, dtype, original=None, block_length=0
):
  """Returns the contents of config.json for a model, a dict.

  Args:
    family: Family that supports the model.
    model: mapping with the keys FIELDS.
    tokens: mapping with mask_id, bos_id and eos_id.
    length: longest context, in tokens.
    dtype: name of the weights' dtype.
    original: contents of the config.json of the folder that the model was
      converted from, or None. Entries that still describe the model are kept.
    block_length: tokens of a block or window, for a family with a block_key.
  """
  known = None
  if original is not None:
    try:
      known = model_of(family, original, CONFIG)
    except UserError:
      original = None
  base = dict(original or family.template)
  fields = {
    **exported(model),
    'length': length,
    'block_length': block_length,
    'dtype': dtype,
  }
  changed = {f for f in fields if known is None or known[f] != fields[f]}
  if not original:
    base |= {
      'architectures': [family.architectures[0]],
      'model_type': family.model_type,
      'bos_token_id': (
        tokens['bos_id'] if tokens['bos_id'] >= 0 else tokens['eos_id']
      ),
      'eos_token_id': tokens['eos_id'],
      'pad_token_id': tokens['eos_id'],
    }
    if family.has_mask_token:
      base[family.mask_key] = tokens['mask_id']
  base |= {family.keys[f]: fields[f] for f in family.keys if f in changed}
  if family.block_key and 'block_length' in changed:
    base[family.block_key] = block_length
  if 'vocab_size' in changed:
    base['vocab_size'] = fields['vocab_size']
  if 'head_dim' in changed and family.has_head_dim:
    base['head_dim'] = fields['head_dim']
  if changed & {'rope_theta', 'rope_scaling'}:
    base.pop('rope_parameters', None)
    base['rope_theta'] = fields['rope_theta']
    if fields['rope_scaling']:
      factor, low, high, context = fields['rope_scaling']
      base['rope_scaling'] = {
        'factor': factor,
        'high_freq_factor': high,
        'low_freq_factor': low,
        'original_max_position_embeddings': int(context),
        'rope_type': 'llama3',
      }
    elif family.scales_rope:
      base['rope_scaling'] = None
  if 'dtype' in changed:
    base.pop('dtype', None)
    base['torch_dtype'] = dtype
  return base


def names(family, path, layers):
  """Returns the tensor names of a parameter: one, or one per layer.

  Args:
    family: Family.
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
