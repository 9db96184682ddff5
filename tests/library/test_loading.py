"""Loading of models, parameters under published names, cheap import."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import published_folders
import pytest
import safetensors.numpy
import untrained_run

import maskdiff

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_import_is_cheap_and_names_load_lazily():
  program = (
    'import sys, maskdiff\n'
    'assert {"load", "sample", "loss"} <= set(dir(maskdiff))\n'
    'assert not {"jax", "numpy", "absl"} & sys.modules.keys()\n'
    'try: maskdiff.lode\n'
    'except AttributeError as error: print(error)\n'
    'from maskdiff import UserError, config\n'
    'assert "jax" not in sys.modules\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True
  )
  expected = "module 'maskdiff' has no attribute 'lode'"
  assert (done.stdout.strip(), done.stderr) == (expected, '')


def test_every_name_of_the_package_exists():
  for name in maskdiff._MODULES:
    assert getattr(maskdiff, name).__name__ == name


def test_a_run_has_its_config_tokenizer_and_parameters(run):
  assert run.config.data.length == 32
  assert run.tokenizer.decode(run.tokenizer.encode('x = 1')) == 'x = 1'
  assert run.dtype == 'float32'
  assert str(run).startswith('Model(masked_diffusion, ')
  assert run.network.mask_id == run.tokenizer.mask_id == 4
  assert jax.tree.leaves(run.params)[0].sharding.mesh == run.mesh


def test_rows_longer_than_those_of_the_training(run, tokenizer, tmp_path):
  untrained_run.save(tmp_path, tokenizer)
  prompt, answer = [7] * 60, tokenizer.encode('x = 1')
  score = lambda model: maskdiff.log_likelihood(model, [prompt], [answer])
  with pytest.raises(maskdiff.UserError, match='training rows had 32'):
    score(run)
  for with_tokenizer in (True, False):
    model = maskdiff.load(
      tmp_path, with_tokenizer=with_tokenizer, rope_scaling=(32, 128)
    )
    assert model.network.context == 128
    assert model.network.config.rope_scaling == (32, 128)
  assert score(model).log_likelihood < 0


def test_a_run_without_a_tokenizer_has_the_ids_of_its_config(
  tokenizer, tmp_path, monkeypatch
):
  untrained_run.save(tmp_path, tokenizer)
  without = maskdiff.load(str(tmp_path), with_tokenizer=False)
  (tmp_path / 'tokenizer.model').unlink()
  monkeypatch.setenv('HOME', str(tmp_path.parent))
  for model in (without, maskdiff.load(f'~/{tmp_path.name}')):
    assert model.tokenizer is None
    assert (model.network.mask_id, model.network.eos_id) == (4, 2)
    assert maskdiff.logits(model, [[9, 4]]).shape == (1, 2, 4096)


def test_a_published_folder_loads_with_and_without_its_tokenizer(tmp_path):
  folder = published_folders.make(tmp_path / 'in', 'llama')
  model = maskdiff.load(folder)
  assert model.tokenizer.encode('a') and model.network.eos_id == 257
  model = maskdiff.load(folder, with_tokenizer=False, dtype='bfloat16')
  assert (model.tokenizer, model.dtype) == (None, 'bfloat16')


def test_a_missing_mask_id_can_be_set(tmp_path):
  folder = published_folders.make(tmp_path / 'in', tokenizer=False)
  config = json.loads((folder / 'config.json').read_text())
  del config['mask_token_id']
  (folder / 'config.json').write_text(json.dumps(config))
  model = maskdiff.load(folder)
  with pytest.raises(maskdiff.UserError, match='mask token is not known'):
    maskdiff.logits(model, [[9]])
  model.config.tokens.mask_id = 258
  (answer,) = maskdiff.sample(model, [[9]], gen_length=2)
  assert len(answer['ids']) == 2


def test_bad_folders_are_one_line(tmp_path):
  with pytest.raises(maskdiff.UserError, match='there is no folder'):
    maskdiff.load(tmp_path / 'missing')
  with pytest.raises(maskdiff.UserError, match='holds no checkpoint'):
    maskdiff.load(tmp_path)
  with pytest.raises(maskdiff.UserError, match="did you mean 'float32'"):
    maskdiff.load(tmp_path, dtype='float3')


# Published names


@pytest.mark.parametrize('case', ['llada tied', 'dream', 'qwen3', 'llama'])
def test_published_tensors_equal_those_of_the_folder(case, tmp_path):
  folder = published_folders.make(tmp_path / 'in', case, tokenizer=False)
  model = maskdiff.load(folder)
  stored = safetensors.numpy.load_file(folder / 'model.safetensors')
  found = maskdiff.to_published(model)
  assert found.keys() == stored.keys()
  for name, tensor in stored.items():
    np.testing.assert_array_equal(found[name], tensor)
  # Parameters from other weights under these names.
  shutil.rmtree(folder)
  zeros = jax.tree.map(jnp.zeros_like, model.params)
  empty = dataclasses.replace(model, params=zeros)
  filled = maskdiff.from_published(empty, stored)
  for ours, expected in zip(
    jax.tree.leaves(filled.params), jax.tree.leaves(model.params), strict=True
  ):
    np.testing.assert_array_equal(ours, expected)
    assert (ours.dtype, ours.sharding) == (expected.dtype, expected.sharding)


def test_parameters_of_a_run_have_the_names_of_a_named_family(run):
  assert 'model.transformer.wte.weight' in maskdiff.to_published(run)
  tensors = maskdiff.to_published(run, 'llama')
  assert 'model.embed_tokens.weight' in tensors
  again = maskdiff.from_published(run, tensors, 'llama')
  found = maskdiff.logits(again, [[9, 10]])
  np.testing.assert_array_equal(found, maskdiff.logits(run, [[9, 10]]))


def test_golden_parameters_under_published_names(golden):
  _, params = golden_models.load('model_a')
  expected = golden_models.to_torch(params)
  found = maskdiff.to_published(golden)
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    np.testing.assert_array_equal(found[name], tensor)


def test_wrong_tensors_are_named(golden):
  tensors = maskdiff.to_published(golden)
  norm = 'model.transformer.ln_f.weight'
  cases = [
    ({norm: None}, f'{norm} is missing'),
    (
      {norm: np.zeros(3)},
      rf'{norm} has shape \[3\], but the model needs \[64\]',
    ),
    ({'more': np.zeros(3)}, 'more is not a parameter of this model as LLaDA'),
  ]
  for changes, message in cases:
    changed = {k: v for k, v in (tensors | changes).items() if v is not None}
    with pytest.raises(maskdiff.UserError, match=message):
      maskdiff.from_published(golden, changed)
  with pytest.raises(maskdiff.UserError, match='give a dict from published'):
    maskdiff.from_published(golden, [])
  with pytest.raises(maskdiff.UserError, match="did you mean 'llada'"):
    maskdiff.to_published(golden, 'lada')
  with pytest.raises(maskdiff.UserError, match='dream does not support'):
    maskdiff.to_published(golden, 'dream')
