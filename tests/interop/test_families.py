"""Tables of published families: configs in and out, shapes, refusals."""

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
def test_a_written_config_says_the_model_again(case):
  family, model = published_folders.model_of(case)
  config = json.loads(json.dumps(config_of(case)))
  assert families.detect(config, 'config.json') == family
  found = families.model_of(family, config, 'config.json')
  assert found == {**model, 'length': 64, 'dtype': 'bfloat16'}


@pytest.mark.parametrize('case', published_folders.MODELS)
def test_a_config_that_says_the_same_is_kept_as_it_was(case):
  """Whatever else stands there, and however it is put."""
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


def test_what_early_configs_leave_out():
  config = config_of('llama')
  for key in ('num_key_value_heads', 'rope_theta', 'head_dim', 'torch_dtype'):
    del config[key]
  found = families.model_of(BY_NAME['llama'], config, 'config.json')
  assert found['kv_heads'] == 4 and found['head_dim'] == 4
  assert found['rope_theta'] == 1e4 and found['dtype'] == 'float32'


UNSUPPORTED = {
  'biases in llada': ('llada', {'include_bias': True}, 'include_bias=True'),
  'a window': (
    'qwen2',
    {'use_sliding_window': True},
    'use_sliding_window=True is not supported, only False',
  ),
  'another activation': ('llama', {'hidden_act': 'gelu'}, "hidden_act='gelu'"),
  'yarn': (
    'qwen3',
    {'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}},
    "rope_scaling of type 'yarn'",
  ),
  'half of llama 3': (
    'llama',
    {'rope_scaling': {'rope_type': 'llama3', 'factor': 4.0}},
    "rope_scaling lacks 'low_freq_factor'",
  ),
  'no size': ('llama', {'hidden_size': None}, "has no 'hidden_size'"),
  'words': ('llama', {'hidden_size': 'many'}, "hidden_size='many'"),
  'eight bits': ('llama', {'torch_dtype': 'int8'}, "torch_dtype='int8'"),
}


@pytest.mark.parametrize(
  'case, changes, message', UNSUPPORTED.values(), ids=UNSUPPORTED
)
def test_what_is_not_computed_here_is_refused_by_key(case, changes, message):
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
def test_an_unknown_architecture_is_refused_by_name(name):
  message = f'X/config.json: unknown architecture {name}; known are LLaDA'
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
def test_from_published_is_a_view_and_undoes_to_published(path, shape):
  array = np.random.default_rng(0).normal(size=shape)
  published = np.ascontiguousarray(families.to_published(path, array))
  assert published.shape == families.published_shape(path, shape)
  back = families.from_published(path, published, shape)
  np.testing.assert_array_equal(back, array)
  assert np.shares_memory(back, published)
