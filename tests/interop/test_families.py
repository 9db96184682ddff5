"""Families: config.json in and out, shapes, unsupported values."""

import json

import numpy as np
import published_folders
import pytest

from maskdiff.errors import UserError
from maskdiff.interop import families
from maskdiff.interop.families import BY_NAME


def config_of(case, **changes):
  family, model = published_folders.model_of(case)
  tokens = published_folders.TOKENS
  config = families.published_config(family, model, tokens, 64, 'bfloat16')
  return {**config, **changes}


@pytest.mark.parametrize('case', published_folders.MODELS)
def test_config_round_trip(case):
  family, model = published_folders.model_of(case)
  config = json.loads(json.dumps(config_of(case)))
  assert families.detect(config, 'config.json') == family
  found = families.model_of(family, config, 'config.json')
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
  written = families.published_config(
    family, model, {}, 64, 'bfloat16', original
  )
  assert written == original
  changed = families.published_config(
    family, {**model, 'vocab_size': 300}, {}, 64, 'float32', original
  )
  assert changed['vocab_size'] == 300
  assert changed['torch_dtype'] == 'float32' and 'dtype' not in changed
  found = families.model_of(family, changed, 'config.json')
  assert found == {**model, 'vocab_size': 300, 'length': 64, 'dtype': 'float32'}


def test_early_configs_get_defaults():
  config = config_of('llama')
  for key in ('num_key_value_heads', 'rope_theta', 'head_dim', 'torch_dtype'):
    del config[key]
  found = families.model_of(BY_NAME['llama'], config, 'config.json')
  assert found['kv_heads'] == 4 and found['head_dim'] == 4
  assert found['rope_theta'] == 1e4 and found['dtype'] == 'float32'


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
}


@pytest.mark.parametrize(
  'case, changes, message', UNSUPPORTED.values(), ids=UNSUPPORTED
)
def test_unsupported_key_is_named(case, changes, message):
  config = config_of(case, **changes)
  family = families.detect(config, 'X/config.json')
  with pytest.raises(UserError, match=message) as raised:
    families.model_of(family, config, 'X/config.json')
  assert 'X/config.json' in str(raised.value)


UNKNOWN = {
  'LLaDAMoEModelLM': {'architectures': ['LLaDAMoEModelLM']},
  'mamba': {'model_type': 'mamba'},
  'None': {},
}


@pytest.mark.parametrize('name', UNKNOWN)
def test_unknown_architecture_is_named(name):
  message = (
    f'X/config.json: architecture {name} is not supported; supported .*: LLaDA'
  )
  with pytest.raises(UserError, match=message):
    families.detect(UNKNOWN[name], 'X/config.json')


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
  published = np.ascontiguousarray(families.to_published(path, array))
  assert published.shape == families.published_shape(path, shape)
  back = families.from_published(path, published, shape)
  np.testing.assert_array_equal(back, array)
  assert np.shares_memory(back, published)
