"""Keys of a published config.json: defaults, limits, and other computations.

A config.json may leave out a key. The published model then uses the default of
its configuration class, so DEFAULTS has the defaults of each class. Sources:

    llada            ModelConfig in configuration_llada.py
                     (huggingface.co/GSAI-ML/LLaDA-8B-Base)
    dream            DreamConfig in configuration_dream.py
                     (huggingface.co/Dream-org/Dream-v0-Base-7B)
    qwen2, qwen3,    Qwen2Config, Qwen3Config and LlamaConfig in
    llama            src/transformers/models/*/configuration_*.py
                     (github.com/huggingface/transformers, 5.0)
    sdar, fast_dllm  the classes of Qwen3 and Qwen2, which SDARConfig and
                     Fast_dLLM_QwenConfig repeat (JetLM/SDAR-4B-Chat,
                     Efficient-Large-Model/Fast_dLLM_v2_7B). The mask id is an
                     argument of their samplers, as is SDAR's block length.
    sdlm             the class of Qwen2, and sdlm_generator.py of
                     OpenGVLab/SDLM, whose config.json must have the window
                     length.
    illada           the mask id of its sampler (github.com/ML-GSAI/LLaDA).
                     No other default is known, so its config.json must have
                     every key.

A null in config.json is a value, not an absent key.
"""

import math
import re

from maskdiff.errors import UserError, inline

_QWEN2 = {
  'vocab_size': 151936,
  'hidden_size': 4096,
  'intermediate_size': 22016,
  'num_hidden_layers': 32,
  'num_attention_heads': 32,
  'num_key_value_heads': 32,
  'hidden_act': 'silu',
  'max_position_embeddings': 32768,
  'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0,
  'tie_word_embeddings': False,
  'use_sliding_window': False,
}
DEFAULTS = {
  # The class also has mask_token_id=50256, which is its eos_token_id: the
  # end-of-text token of GPT-2. LLaDA's own ids are always given.
  'llada': {
    'activation_type': 'swiglu',
    'alibi': False,
    'attention_layer_norm': False,
    'bias_for_layer_norm': None,
    'block_group_size': 1,
    'block_type': 'sequential',
    'd_model': 768,
    'embedding_size': 50304,
    'include_bias': False,
    'include_qkv_bias': False,
    'input_emb_norm': False,
    'layer_norm_type': 'default',
    'layer_norm_with_affine': True,
    'max_sequence_length': 1024,
    'mlp_hidden_size': None,
    'mlp_ratio': 4,
    'multi_query_attention': None,
    'n_heads': 12,
    'n_kv_heads': None,
    'n_layers': 12,
    'rms_norm_eps': 1e-5,
    'rope': False,
    'rope_theta': 10000.0,
    'scale_logits': False,
    'vocab_size': 50257,
    'weight_tying': True,
  },
  'dream': {**_QWEN2, 'mask_token_id': 151666},
  'qwen2': _QWEN2,
  'sdlm': {**_QWEN2, 'causal_attn': False},
  'qwen3': {**_QWEN2, 'head_dim': 128, 'attention_bias': False},
  'sdar': {
    **_QWEN2,
    'head_dim': 128,
    'attention_bias': False,
    'block_size': 4,
    'mask_token_id': 151669,
  },
  'fast_dllm': {**_QWEN2, 'bd_size': 32, 'mask_token_id': 151665},
  'illada': {'mask_token_id': 5},
  'llama': {
    'vocab_size': 32000,
    'hidden_size': 4096,
    'intermediate_size': 11008,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': None,
    'hidden_act': 'silu',
    'max_position_embeddings': 2048,
    'rms_norm_eps': 1e-6,
    'rope_theta': 10000.0,
    'tie_word_embeddings': False,
    'attention_bias': False,
    'mlp_bias': False,
    'head_dim': None,
  },
}
# Largest value of a field of the model. No number of parameters that follows
# exceeds 2**63.
LIMITS = {
  'layers': 4096,
  'heads': 4096,
  'kv_heads': 4096,
  'head_dim': 4096,
  'embed': 1 << 20,
  'mlp': 1 << 24,
  'vocab_size': 1 << 24,
  'length': 1 << 24,
}
# Keys of other architectures that change the computation, with the values that
# leave it as it is.
_FLAGS = (
  *('add_bias_linear', 'add_cross_attention', 'add_qkv_bias', 'alibi'),
  *('apply_residual_connection_post_layernorm', 'attention_bias'),
  *('attention_layer_norm', 'attn_output_gate', 'bias', 'include_bias'),
  *('include_qkv_bias', 'input_emb_norm', 'is_encoder_decoder'),
  *('lm_head_bias', 'mlp_bias', 'multi_query', 'multi_query_attention'),
  *('parallel_attn', 'parallel_residual', 'qk_layernorm', 'qk_norm'),
  *('qkv_bias', 'scale_attn_by_inverse_layer_idx', 'scale_embedding'),
  *('rope_interleaved', 'scale_logits', 'use_bias', 'use_mrope'),
  *('use_parallel_residual', 'use_qk_norm', 'use_qkv_bias'),
  'use_sliding_window',
)
_NUMBERS_AND_OBJECTS = (
  *('attention_chunk_size', 'attention_multiplier', 'attention_window'),
  *('attn_config', 'block_configs', 'clip_qkv', 'compression_config'),
  *('dim_model_base', 'dual_chunk_attention_config', 'global_rope_theta'),
  *('layers_block_type', 'local_attention', 'local_rope_theta'),
  *('no_rope_layer_interval', 'no_rope_layers', 'num_kv_shared_layers'),
  *('pruned_heads', 'query_pre_attn_scalar', 'rope_local_base_freq'),
  *('rotary_dim', 'rotary_emb_base', 'window_size'),
)
_FACTORS = (
  *('embedding_multiplier', 'embedding_scale', 'lm_head_multiplier'),
  *('logit_scale', 'logits_scaling', 'partial_rotary_factor'),
  *('residual_multiplier', 'residual_scale', 'rope_ratio', 'rotary_pct'),
  *('scale_depth', 'scale_emb'),
)
# Many architectures have keys of these kinds, under many names.
_KINDS = re.compile(
  'alibi|expert|layer_?scale|logits?_cap|lora_rank|mrope|quantiz|sliding|'
  'soft_?cap|yarn|(^|_)moe(_|$)'
)
_NOTHING = (None, False, 0, [], {})
_NEUTRAL = {
  **dict.fromkeys(_FLAGS, (None, False)),
  **dict.fromkeys(_NUMBERS_AND_OBJECTS, _NOTHING),
  **dict.fromkeys(_FACTORS, (None, 1)),
  'activation_function': (None, 'silu', 'swish'),
  'block_type': (None, 'llama'),
  'hidden_activation': (None, 'silu', 'swish'),
  'layer_norm_type': (None, 'rms', 'rmsnorm'),
  'norm_type': (None, 'rms', 'rmsnorm'),
  'position_embedding_type': (None, 'rope'),
}


def equal(value, other):
  """Returns whether two JSON values are equal and of the same type.

  1 and 1.0 are of the same type, 1 and true are not.
  """
  same = isinstance(value, bool) == isinstance(other, bool)
  return same and value == other


def check_allowed(published, key, defaults, allowed, path):
  """Raises a UserError if the value of a key is not one of those allowed.

  Args:
    published: contents of config.json, a dict.
    key: a key, which may be absent.
    defaults: dict of the values of absent keys.
    allowed: tuple of JSON values.
    path: path of config.json, for error messages.
  """
  if key not in published and key not in defaults:
    return
  value = published.get(key, defaults.get(key))
  if any(equal(value, other) for other in allowed):
    return
  if value is None and False in allowed:  # the published code tests for true
    return
  only = ' or '.join(map(repr, allowed[:2]))
  if key in published:
    raise UserError(
      f'{path}: {key}={shown(value)} is not supported, only {only}'
    )
  raise UserError(
    f'{path} has no {key!r}: its default, {value!r}, is not supported, only '
    f'{only}'
  )


def check_others(published, known, path):
  """Raises a UserError for a key of a computation that this package lacks.

  Other keys pass: names, settings of training and of generation.

  Args:
    published: contents of config.json, a dict.
    known: keys that the family reads or ignores.
    path: path of config.json, for error messages.
  """
  for key in sorted(published.keys() - set(known)):
    kind = _NOTHING if _KINDS.search(key) else None
    allowed = _NEUTRAL.get(key, kind)
    if allowed and not any(equal(published[key], x) for x in allowed):
      raise UserError(
        f'{path}: {inline(key, 80)}={shown(published[key])} is not supported: '
        'it changes the computation of the network'
      )
  kinds = published.get('layer_types')
  if kinds is not None and (
    not isinstance(kinds, list)
    or any(kind != 'full_attention' for kind in kinds)
  ):
    raise UserError(
      f'{path}: layer_types={shown(kinds)} is not supported, only '
      "'full_attention' in every layer"
    )


def size(value, field, key, path):
  """Returns a value that must be a whole number from 1 to LIMITS[field]."""
  if value is None:
    raise UserError(f'{path} has no {key!r}')
  if type(value) is not int or not 1 <= value <= LIMITS[field]:
    raise UserError(
      f'{path}: {key}={shown(value)} must be a whole number from 1 to '
      f'{LIMITS[field]:,}'
    )
  return value


def number(value, key, path, below=math.inf):
  """Returns a float that must be above 0 and below a bound."""
  # An int may be too large for a float.
  if type(value) not in (int, float) or not 0 < value < min(below, 1e30):
    bound = '' if below == math.inf else f' and below {below}'
    raise UserError(
      f'{path}: {key}={shown(value)} must be a number above 0{bound}'
    )
  return float(value)


def check_token_ids(published, vocab_size, path):
  """Raises a UserError if a token id that is used is not an id.

  bos_token_id and eos_token_id may be lists of ids.

  Args:
    published: contents of config.json, a dict.
    vocab_size: number of rows of the embedding.
    path: path of config.json, for error messages.
  """
  masks = ('mask_token_id', 'text_mask_token_id')
  for key in (*masks, 'bos_token_id', 'eos_token_id'):
    value = published.get(key)
    is_list = isinstance(value, list) and key not in masks
    for i in value if is_list else [value]:
      if (i is not None or is_list) and (
        type(i) is not int or not 0 <= i < vocab_size
      ):
        raise UserError(
          f'{path}: {key}={shown(value)} is not the id of a token: ids are '
          f'whole numbers below {vocab_size}'
        )


def shown(value):
  """Returns a JSON value for an error message, shortened."""
  return inline(repr(value), 80)
