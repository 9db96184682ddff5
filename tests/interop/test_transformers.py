"""Logits of models that transformers builds, before and after conversion.

The tests are skipped without torch and transformers
(requirements-interop-test.txt).
"""

import pathlib

import numpy as np
import published_folders
import pytest

from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.interop import (
  config_export,
  config_keys,
  convert,
  hf,
  hf_config,
  load,
  reference,
  sentencepiece_json,
)

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

COMMON = dict(
  vocab_size=272,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=256,
  bos_token_id=256,
  eos_token_id=257,
  initializer_range=0.3,
)
LLAMA_3 = {
  'rope_type': 'llama3',
  'rope_theta': 1e4,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
MODELS = {
  'qwen2': lambda t: t.Qwen2Config(**COMMON, tie_word_embeddings=True),
  'llama': lambda t: t.LlamaConfig(**COMMON, rms_norm_eps=1e-5),
  'llama 3.1': lambda t: t.LlamaConfig(**COMMON, rope_parameters=LLAMA_3),
  'qwen3': lambda t: t.Qwen3Config(**COMMON, head_dim=16),
}
IDS = np.array([[5, 7, 11, 250, 80, 2, 9, 256], list(range(40, 48))])


@pytest.mark.parametrize('name', ['qwen2', 'qwen3', 'llama'])
def test_defaults_are_those_of_the_published_class(name):
  found = getattr(transformers, f'{name.capitalize()}Config')().to_dict()
  found |= {'rope_theta': found['rope_parameters']['rope_theta']}
  for key, value in config_keys.DEFAULTS[name].items():
    assert value is None or found[key] == value, key


@pytest.fixture(scope='module', params=MODELS)
def saved(request, tmp_path_factory):
  """Returns a transformers model with random weights, and its folder."""
  torch.manual_seed(0)
  config = MODELS[request.param](transformers)
  model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if 'norm' in name:
        parameter.uniform_(0.5, 1.5)
      if 'bias' in name:
        parameter.normal_(0, 0.5)
  folder = tmp_path_factory.mktemp('saved') / 'in'
  model.save_pretrained(folder, max_shard_size='40KB')
  published_folders.save_tokenizer(folder)
  return model, folder


def logits_of(model):
  with torch.no_grad():
    return model(torch.tensor(IDS)).logits.numpy()


def test_logits_match_transformers(saved):
  model, folder = saved
  expected = logits_of(model)
  assert np.abs(expected).max() > 2
  config, params = load.load_params(str(folder), mesh_lib.make_mesh())
  assert config.objective.name == 'autoregressive'
  assert config.model.dtype == 'float32'
  for row, of_row in zip(IDS, expected, strict=True):
    args = (config, params, mesh_lib.make_mesh(), row, 1)
    found = convert.logits(*args)
    np.testing.assert_allclose(found, of_row, rtol=0, atol=2e-4)
    found = reference.logits(hf.open_folder(folder), row)
    np.testing.assert_allclose(found, of_row, rtol=0, atol=2e-4)


def test_round_trip_keeps_logits_in_transformers(saved, tmp_path):
  model, folder = saved
  convert.from_hf(str(folder), tmp_path / 'run')
  convert.to_hf(tmp_path / 'run', tmp_path / 'out', max_bytes=50_000)
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'out')
  assert type(again) is type(model)
  np.testing.assert_array_equal(logits_of(again.float()), logits_of(model))
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  assert tokenizer('ab').input_ids == [64, 65]
  assert tokenizer.eos_token_id == 257


def test_transformers_reads_a_new_config(saved, tmp_path):
  """A run that was trained from scratch has no original config.json."""
  model, folder = saved
  published = hf.open_folder(folder)
  config = hf_config.run_config(published, None, mask_id=0)
  written = config_export.published_config(
    published.family, config.model, config.tokens, 256, 'float32'
  )
  out = tmp_path / 'out'
  out.mkdir()
  (out / 'config.json').write_text(convert.as_text(written))
  hf.write_weights(out, published.family, published.leaves)
  again = transformers.AutoModelForCausalLM.from_pretrained(out).float()
  np.testing.assert_array_equal(logits_of(again), logits_of(model))


def test_tokenizer_of_this_package_loads_by_its_folder(tmp_path):
  root = pathlib.Path(__file__).parents[2]
  tokenizer = tokenizer_lib.load(root / 'tokenizer' / 'stdlib_4k.model')
  sentencepiece_json.write(tmp_path, tokenizer, 128)
  found = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text = 'def f(x):\n    return x  # Größe 漢字\n\n\n  y'
  assert found.encode(text) == tokenizer.encode(text)
  assert found.decode(found.encode(text)) == text
  assert found.model_max_length == 128
  for kind in ('bos', 'eos', 'pad', 'mask'):
    expected = getattr(tokenizer, f'{kind}_id')
    assert getattr(found, f'{kind}_token_id') == expected
