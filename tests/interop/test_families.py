"""Families: config.json in and out, shapes, unsupported values."""

import json

import numpy as np
import published_folders
import pytest

from maskdiff.errors import UserError
from maskdiff.interop import config_export, config_json, families, tensor_layout
from maskdiff.interop.families import BY_NAME
from maskdiff.model import transformer
from maskdiff.model.transformer import TransformerConfig


def config_of(case, **changes):
  family, model = published_folders.model_of(case)
  tokens = published_folders.TOKENS
  config = config_export.published_config(
    family, model, tokens, 64, 'bfloat16', None, model['block_length']
  )
  return {**config, **changes}


@pytest.mark.parametrize('case', published_folders.MODELS)
def test_config_round_trip(case):
  family, model = published_folders.model_of(case)
  config = json.loads(json.dumps(config_of(case)))
  assert config_json.detect(config, 'config.json') == family
  found = config_json.model_of(family, config, 'config.json')
  assert found == {**model, 'length': 64, 'dtype': 'bfloat16'}


@pytest.mark.parametrize('case', published_folders.MODELS)
def test_unchanged_config_is_kept(case):
  """Unknown keys and the spelling of rope_scaling and dtype are kept."""
  family, model = published_folders.model_of(case)
  original = config_of(case, torch_dtype=None, dtype='bfloat16', extra=[1])
  if family.scales_rope:
    scaling = original.pop('rope_scaling') or {'rope_type': 'default'}
    theta = original.pop('rope_theta')
    original['rope_parameters'] = {**scaling, 'rope_theta': theta}
  block_length = model['block_length']
  written = config_export.published_config(
    family, model, {}, 64, 'bfloat16', original, block_length
  )
  assert written == original
  changed = config_export.published_config(
    family,
    {**model, 'vocab_size': 300},
    {},
    64,
    'float32',
    original,
    block_length,
  )
  assert changed['vocab_size'] == 300
  assert changed['torch_dtype'] == 'float32' and 'dtype' not in changed
  found = config_json.model_of(family, changed, 'config.json')
  assert found == {**model, 'vocab_size': 300, 'length': 64, 'dtype': 'float32'}


def test_published_sizes_of_block_and_masked_diffusion_networks():
  """As in config.json of SDAR-1.7B-Chat, and the model card of iLLaDA-8B."""
  sdar = {
    **{'architectures': ['SDARForCausalLM'], 'model_type': 'sdar'},
    **{'attention_bias': False, 'block_size': 4, 'mask_token_id': 151669},
    **{'head_dim': 128, 'hidden_act': 'silu', 'hidden_size': 2048},
    **{'intermediate_size': 6144, 'max_position_embeddings': 32768},
    **{'max_window_layers': 28, 'num_attention_heads': 16},
    **{'num_hidden_layers': 28, 'num_key_value_heads': 8},
    **{'rms_norm_eps': 1e-6, 'rope_scaling': None, 'rope_theta': 1000000},
    **{'sliding_window': None, 'tie_word_embeddings': False},
    **{'torch_dtype': 'bfloat16', 'use_sliding_window': False},
    **{'vocab_size': 151936},
  }
  illada = {
    **{'architectures': ['ILLaDAForCausalLM'], 'model_type': 'illada'},
    **{'hidden_size': 4096, 'intermediate_size': 14336},
    **{'num_hidden_layers': 32, 'num_attention_heads': 32},
    **{'num_key_value_heads': 8, 'vocab_size': 155136, 'hidden_act': 'silu'},
    **{'max_position_embeddings': 8192, 'tie_word_embeddings': True},
    **{'rms_norm_eps': 1e-5, 'rope_theta': 1e6, 'layer_norm_eps': None},
  }
  found = []
  for published in (sdar, illada):
    family = config_json.detect(published, 'c')
    model = config_json.model_of(family, published, 'c')
    fields = {field: model[field] for field in families.FIELDS}
    network = TransformerConfig(
      **fields, dtype='float32', remat='none', attention='xla'
    )
    found.append((model['block_length'], *transformer.num_params(network)))
  (block, total, inner), (none, total_8b, inner_8b) = found
  assert (block, none) == (4, 0)
  assert round(total / 1e9, 2) == 2.03 and round(inner / 1e9, 2) == 1.41
  assert round(total_8b / 1e9, 2) == 7.62 and round(inner_8b / 1e9, 2) == 6.98


def test_early_configs_get_defaults():
  config = config_of('llama')
  for key in ('num_key_value_heads', 'rope_theta', 'head_dim', 'torch_dtype'):
    del config[key]
  found = config_json.model_of(BY_NAME['llama'], config, 'config.json')
  assert found['kv_heads'] == 4 and found['head_dim'] == 4
  assert found['rope_theta'] == 1e4 and found['dtype'] == 'float32'


DEFAULTS = {
  'llada': {
    **{'norm_eps': 1e-5, 'tie_embeddings': True, 'length': 1024},
    **{'vocab_size': 50304, 'embed': 768, 'layers': 12, 'heads': 12},
    **{'kv_heads': 12, 'mlp': 3072, 'head_dim': 64},
  },
  'dream': {'norm_eps': 1e-6, 'length': 32768, 'kv_heads': 32, 'mlp': 22016},
  'sdar': {'norm_eps': 1e-6, 'head_dim': 128, 'block_length': 4},
  'fast_dllm': {'norm_eps': 1e-6, 'length': 32768, 'block_length': 32},
  'qwen2': {'norm_eps': 1e-6, 'length': 32768, 'kv_heads': 32, 'mlp': 22016},
  'qwen3': {'norm_eps': 1e-6, 'length': 32768, 'kv_heads': 32, 'head_dim': 128},
  'llama': {
    **{'norm_eps': 1e-6, 'length': 2048, 'vocab_size': 32000, 'kv_heads': 32},
    **{'mlp': 11008, 'head_dim': 128},
  },
}


@pytest.mark.parametrize('name', DEFAULTS)
def test_absent_keys_have_the_defaults_of_the_published_class(name):
  family = BY_NAME[name]
  config = {'architectures': [family.architectures[0]]}
  # LLaDA's class has a computation by default that its networks do not use.
  config |= {key: allowed[0] for key, allowed in family.required.items()}
  found = config_json.model_of(family, config, 'config.json')
  expected = {'tie_embeddings': False, 'rope_theta': 1e4, **DEFAULTS[name]}
  assert {key: found[key] for key in expected} == expected
  assert found['rope_scaling'] == () and found['dtype'] == 'float32'


@pytest.mark.parametrize('key', ['rope', 'block_type', 'layer_norm_type'])
def test_absent_key_whose_default_is_not_supported_is_named(key):
  config = config_of('llada')
  del config[key]
  with pytest.raises(UserError, match=f"has no '{key}': its default, "):
    config_json.model_of(BY_NAME['llada'], config, 'config.json')


def test_null_is_not_an_absent_key():
  config = config_of('llada', n_kv_heads=None, mlp_hidden_size=None)
  config |= {'embedding_size': None, 'vocab_size': 300, 'mlp_ratio': 3}
  found = config_json.model_of(BY_NAME['llada'], config, 'config.json')
  assert (found['kv_heads'], found['mlp'], found['vocab_size']) == (4, 48, 300)
  config = config_of('qwen2', num_key_value_heads=None)
  found = config_json.model_of(BY_NAME['qwen2'], config, 'config.json')
  assert found['kv_heads'] == 4
  del config['num_key_value_heads']
  with pytest.raises(UserError, match='4 heads are not a multiple of 32'):
    config_json.model_of(BY_NAME['qwen2'], config, 'config.json')


COMPUTATIONS = {
  'sliding_window': 4096,
  'layer_types': ['full_attention', 'sliding_attention'],
  'final_logit_softcapping': 30.0,
  'attn_logit_soft_cap': 50.0,
  'alibi': True,
  'clip_qkv': 8.0,
  'quantization_config': {'quant_method': 'fp8'},
  'num_experts': 8,
  'num_local_experts': 8,
  'logit_scale': 0.0625,
  'embedding_multiplier': 12.0,
  'partial_rotary_factor': 0.5,
  'no_rope_layers': [1, 0],
  'layer_scale_init_value': 1e-5,
  'use_qk_norm': True,
  'use_parallel_residual': True,
  'position_embedding_type': 'alibi',
  'norm_type': 'layernorm',
  'block_type': 'sequential',
  'query_pre_attn_scalar': 144,
  'lm_head_bias': True,
}


@pytest.mark.parametrize('key', COMPUTATIONS)
@pytest.mark.parametrize('case', ['llada', 'llama'])
def test_key_of_another_computation_is_named(case, key):
  config = config_of(case, **{key: COMPUTATIONS[key]})
  with pytest.raises(UserError, match=f'{key}=.* is not supported'):
    config_json.model_of(BY_NAME[case], config, 'config.json')


# As in config.json of Qwen2.5, Dream, Llama 3 and LLaDA.
HARMLESS = {
  'qwen2': {
    **{'sliding_window': 131072, 'max_window_layers': 28, 'use_mrope': False},
    **{'use_sliding_window': False, 'attention_dropout': 0.1},
    'layer_types': ['full_attention', 'full_attention'],
  },
  # SDAR-1.7B-Chat
  'sdar': {
    **{'attn_implementation': 'flex_attention', 'debug': False, 'ep_size': 1},
    **{'fuse_cross_entropy': True, 'max_window_layers': 28},
    **{'micro_forward': False, 'skip_checkpoint': False},
    **{'sliding_window': None, 'use_deepep': False},
  },
  'dream': {'sliding_window': None, 'max_window_layers': 28, 'use_cache': True},
  'qwen3': {'sliding_window': None, 'max_window_layers': 36},
  'llama': {
    **{'pretraining_tp': 2, 'pad_token_id': -1, 'eos_token_id': [5, 6]},
    **{'mlp_bias': False, 'sliding_window': None, 'quantization_config': None},
    **{'rope_scaling': {'type': 'default'}, '_name_or_path': 'x'},
  },
  'llada': {
    **{
      'residual_dropout': 0.1,
      'embedding_dropout': 0.1,
      'alibi_bias_max': 9.0,
    },
    **{'rope_full_precision': False, 'flash_attention': True, 'note': [None]},
    **{'bias_for_layer_norm': None, 'init_fn': 'normal'},
  },
}


@pytest.mark.parametrize('case', HARMLESS)
def test_key_that_does_not_change_the_computation_passes(case):
  config = config_of(case, **HARMLESS[case])
  family, model = published_folders.model_of(case)
  found = config_json.model_of(family, config, 'config.json')
  assert found == {**model, 'length': 64, 'dtype': 'bfloat16'}


UNSUPPORTED = {
  'llada with biases': ('llada', {'include_bias': True}, 'include_bias=True'),
  'sliding window': (
    'qwen2',
    {'use_sliding_window': True},
    'use_sliding_window=True is not supported, only False',
  ),
  'activation': ('llama', {'hidden_act': 'gelu'}, "hidden_act='gelu'"),
  'yarn': (
    'qwen3',
    {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}},
    "rope_scaling of type 'yarn'",
  ),
  'incomplete llama3': (
    'llama',
    {'rope_scaling': {'rope_type': 'llama3', 'factor': 4.0}},
    "rope_scaling lacks 'low_freq_factor'",
  ),
  'missing size': ('llama', {'hidden_size': None}, "has no 'hidden_size'"),
  'type': ('llama', {'hidden_size': 'many'}, "hidden_size='many'"),
  'dtype': ('llama', {'torch_dtype': 'int8'}, "torch_dtype='int8'"),
  'a head size of another kind': (
    'qwen2',
    {'head_dim': 8},
    'head_dim=8 is not supported, only hidden_size / num_attention_heads = 4',
  ),
  'no whole head size': (
    'qwen2',
    {'hidden_size': 18},
    'hidden_size=18 is not a multiple of 4 heads',
  ),
  'untyped scaling': (
    'llama',
    {'rope_scaling': {'factor': 8.0}},
    "rope_scaling={'factor': 8.0} is not supported",
  ),
  'scaling of LLaDA': (
    'llada',
    {'rope_scaling': {'rope_type': 'llama3'}},
    "rope_scaling of type 'llama3' is not supported, only null",
  ),
  'two scalings': (
    'llama',
    {'rope_scaling': {'type': 'default'}, 'rope_parameters': {'rope_theta': 1}},
    'has both rope_parameters and rope_scaling',
  ),
  'rotary factor': (
    'llama',
    {'rope_parameters': {'rope_theta': 1e4, 'partial_rotary_factor': 0.5}},
    'rope_parameters=.*partial_rotary_factor.* is not supported',
  ),
  'scaling per kind of layer': (
    'qwen3',
    {'rope_parameters': {'full_attention': {'rope_theta': 1e4}}},
    'rope_parameters=.*full_attention.* is not supported',
  ),
  'block of no divisor': (
    'sdar',
    {'block_size': 5},
    'block_size=5 does not divide max_position_embeddings=64',
  ),
  'block of no tokens': (
    'fast_dllm',
    {'bd_size': 0},
    'bd_size=0 must be a whole number',
  ),
  'LayerNorm': ('illada', {'layer_norm_eps': 1e-5}, 'layer_norm_eps=1e-05'),
  'escape': (
    'llama',
    {'hidden_act': '\x1b[2J\n'},
    r"hidden_act='.x1b\[2J.n' is not supported",
  ),
}


@pytest.mark.parametrize(
  'case, changes, message', UNSUPPORTED.values(), ids=UNSUPPORTED
)
def test_unsupported_key_is_named(case, changes, message):
  config = config_of(case, **changes)
  family = config_json.detect(config, 'X/config.json')
  with pytest.raises(UserError, match=message) as raised:
    config_json.model_of(family, config, 'X/config.json')
  assert 'X/config.json' in str(raised.value)


ODD = (
  *(10**9, 10**400, -1, 0, 0.5, 1.5, float('nan'), float('inf'), True, 'x'),
  *([], {}, [4], {'a': 1}, '\ud7ff\x1b', 'x' * 10**5),
)
# Values of ODD that a key may have.
GOOD = {
  **dict.fromkeys(('hidden_size', 'num_hidden_layers'), ()),
  **dict.fromkeys(('num_attention_heads', 'num_key_value_heads'), ()),
  **dict.fromkeys(('intermediate_size', 'max_position_embeddings'), ()),
  **{'vocab_size': (), 'head_dim': (), 'hidden_act': ()},
  **{'rms_norm_eps': (0.5,), 'rope_theta': (10**9, 0.5, 1.5)},
  **{'tie_word_embeddings': (True,), 'mask_token_id': (0,)},
  **{'eos_token_id': (0, [], [4]), 'bos_token_id': (0, [], [4])},
  **dict.fromkeys(('rope_scaling', 'rope_parameters'), (0, [], {})),
  **dict.fromkeys(('architectures', 'torch_dtype'), (0, [], {})),
}


@pytest.mark.parametrize('key', GOOD)
def test_odd_values_are_one_line_that_names_the_key(key):
  for value in ODD:
    if any(value is good or value == good for good in GOOD[key]) and not (
      value is True and True not in GOOD[key]
    ):
      continue
    config = config_of('llama', **{key: value})
    with pytest.raises(UserError, match=f'^c: {key}=') as raised:
      config_json.model_of(config_json.detect(config, 'c'), config, 'c')
    message = str(raised.value)
    assert len(message) < 300 and message.isprintable(), value


UNKNOWN = {
  'Gemma3ForCausalLM': {'architectures': ['Gemma3ForCausalLM']},
  'mamba': {'model_type': 'mamba'},
  'None': {},
}


@pytest.mark.parametrize(
  'name', ['LLaDA2MoeModelLM', 'SDARMoeForCausalLM', 'LLaDAMoEModelLM']
)
def test_experts_are_refused(name):
  with pytest.raises(UserError, match=f'{name} is a mixture of experts'):
    config_json.detect({'architectures': [name]}, 'X/config.json')


def test_absent_key_without_a_known_default_is_named():
  """The configuration class of iLLaDA is not among the sources."""
  for key in ('hidden_size', 'rms_norm_eps', 'rope_theta', 'vocab_size'):
    config = config_of('illada')
    del config[key]
    with pytest.raises(UserError, match=key):
      config_json.model_of(BY_NAME['illada'], config, 'config.json')


@pytest.mark.parametrize('name', UNKNOWN)
def test_unknown_architecture_is_named(name):
  message = (
    f'X/config.json: architecture {name} is not supported; supported .*: LLaDA'
  )
  with pytest.raises(UserError, match=message):
    config_json.detect(UNKNOWN[name], 'X/config.json')


@pytest.mark.parametrize(
  'path, shape',
  [
    ('blocks/q', (6, 4, 5)),
    ('blocks/o', (4, 5, 6)),
    ('blocks/gate', (6, 7)),
    ('blocks/q_bias', (20,)),
    ('embed', (9, 6)),
    ('norm', (6,)),
  ],
)
def test_from_published_is_a_view_and_inverts_to_published(path, shape):
  array = np.random.default_rng(0).normal(size=shape)
  published = np.ascontiguousarray(tensor_layout.to_published(path, array))
  assert published.shape == tensor_layout.published_shape(path, shape)
  back = tensor_layout.from_published(path, published, shape)
  np.testing.assert_array_equal(back, array)
  assert np.shares_memory(back, published)
