"""Published architectures as data: config keys and tensor names.

A `Family` maps fields of the model to keys of its config.json, lists the values
of other keys that this package supports, and maps parameters to tensor names.
To add a family, add a `Family` to FAMILIES.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from maskdiff.interop import tensor_layout

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
      tensor_layout.LLAMA_NAMES.
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
  derived: tuple[str, ...] = tensor_layout.DERIVED
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
    names=tensor_layout.LLADA_NAMES,
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
    names=tensor_layout.LLAMA_NAMES,
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
    names=tensor_layout.LLAMA_NAMES,
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
    names=tensor_layout.LLAMA_NAMES,
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
    names=tensor_layout.LLAMA_NAMES,
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
    names=tensor_layout.LLAMA_NAMES,
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
    names=tensor_layout.LLAMA_NAMES,
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
    names=tensor_layout.LLAMA_NAMES,
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
    names=tensor_layout.LLAMA_NAMES,
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
