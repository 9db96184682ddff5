"""Conversions: golden logits, byte-identical round trips, exports of runs."""

import contextlib
import functools
import json
import os
import pathlib

import golden_models
import jax
import numpy as np
import published_folders
import pytest
import safetensors.numpy

from maskdiff import config as config_lib
from maskdiff.checkpoints import checkpoint, manifest
from maskdiff.checkpoints.checkpoint import Checkpointer
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import convert, hf, load, reference
from maskdiff.interop import safetensors as ours
from maskdiff.model import masks, transformer
from maskdiff.training import step as step_lib

GOLDEN = golden_models.GOLDEN


def tensors_of(folder):
  """Every tensor by name, read by the package safetensors."""
  found = {}
  for path in sorted(pathlib.Path(folder).glob('*.safetensors')):
    found |= safetensors.numpy.load_file(path)
  return found


def assert_same_tensors(a, b):
  a, b = tensors_of(a), tensors_of(b)
  assert a.keys() == b.keys()
  for name, tensor in a.items():
    assert tensor.dtype == b[name].dtype and tensor.shape == b[name].shape
    assert tensor.tobytes() == b[name].tobytes(), name


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens):
  network = transformer.bind(config, params)
  hidden = network(tokens, masks.bidirectional(tokens >= 0))
  return network.logits(hidden)


# Golden checkpoints


@pytest.mark.parametrize('name', ['model_a', 'model_b', 'model_b_sharded'])
def test_golden_logits_directly_and_converted_and_a_round_trip(name, tmp_path):
  """On 8 devices; the recorded logits are those of the published code."""
  folder, workdir = GOLDEN / name, tmp_path / 'run'
  convert.from_hf(folder, workdir)
  with np.load(GOLDEN / 'forward.npz') as arrays:
    of = name.removesuffix('_sharded')
    ids, wanted = (arrays[f'{of}.plain_{k}'] for k in ('ids', 'logits'))
  mesh = mesh_lib.make_mesh()
  for source in (folder, workdir):
    config, params = load.load_params(source, mesh)
    model_config = step_lib.step_config(config).model
    assert model_config.dtype == 'float32'
    with jax.set_mesh(mesh):
      found = logits(model_config, params, ids)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)
  published = hf.open_folder(folder)
  for row, of_row in zip(ids, wanted, strict=True):
    np.testing.assert_allclose(
      reference.logits(published, row), of_row, rtol=0, atol=2e-4
    )
  convert.to_hf(workdir, tmp_path / 'out', max_bytes=100_000)
  assert_same_tensors(folder, tmp_path / 'out')
  assert (tmp_path / 'out' / 'config.json').read_bytes() == (
    folder / 'config.json'
  ).read_bytes()


# Families


@pytest.mark.parametrize('case', published_folders.MODELS)
def test_a_family_computes_what_its_formulas_say_and_comes_back(case, tmp_path):
  folder = published_folders.make(tmp_path / 'in', case)
  convert.from_hf(folder, tmp_path / 'run')
  *_, last = convert.check(folder, tmp_path / 'run')
  assert 'largest difference of a logit' in last
  convert.to_hf(tmp_path / 'run', tmp_path / 'out')
  assert_same_tensors(folder, tmp_path / 'out')
  before, after = map(published_folders.contents, (folder, tmp_path / 'out'))
  assert before.keys() == after.keys()
  for name, content in before.items():
    assert name.endswith('.safetensors') or after[name] == content, name


def test_bfloat16_stays_or_becomes_float32_without_loss(tmp_path):
  folder = published_folders.make(tmp_path / 'in', 'qwen2', 'bfloat16')
  convert.from_hf(folder, tmp_path / 'run', dtype='float32')
  convert.check(folder, tmp_path / 'run')
  convert.to_hf(tmp_path / 'run', tmp_path / 'out', dtype='bfloat16')
  assert_same_tensors(folder, tmp_path / 'out')
  convert.to_hf(tmp_path / 'run', tmp_path / 'wide')
  wide = json.loads((tmp_path / 'wide' / 'config.json').read_text())
  assert wide['torch_dtype'] == 'float32'


def test_tensors_that_are_exchanged_fail_the_check(tmp_path):
  """All shapes are right: only what is computed tells."""
  folder = published_folders.make(tmp_path / 'in')
  convert.from_hf(folder, tmp_path / 'run')
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  one, other = (
    f'model.transformer.blocks.1.{name}.weight'
    for name in ('attn_norm', 'ff_norm')
  )
  tensors[one], tensors[other] = tensors[other], tensors[one]
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(UserError, match='differs from .* difference of a logit'):
    convert.check(folder, tmp_path / 'run')


# Runs


def save_run(tokenizer, path, **changes):
  """A run that was saved at step 3, with random parameters."""
  config = config_lib.default()
  config.update_from_flattened_dict(
    {
      'model.embed': 16,
      'model.layers': 2,
      'model.heads': 2,
      'model.kv_heads': 1,
      'model.head_dim': 8,
      'model.mlp': 24,
      'data.tokenizer': tokenizer.path,
      **changes,
    }
  )
  shapes = transformer.shapes(step_lib.step_config(config).model)
  random = np.random.default_rng(0)
  draw = lambda x: random.normal(size=x.shape).astype(np.float32)
  params = jax.tree.map(draw, shapes)
  meta = manifest.Meta(config=manifest.config_json(config))
  with contextlib.closing(Checkpointer(path / 'checkpoints', keep=1)) as saver:
    saver.save(3, {'params': params}, meta)
  tokenizer_lib.copy(tokenizer, path)
  return params


EXPORTS = {
  'LLaDAModelLM': {'model.tie_embeddings': False},
  'DreamModel': {'model.predict_next': True, 'model.qkv_bias': True},
  'LlamaForCausalLM': {'objective.name': 'autoregressive'},
  'Qwen3ForCausalLM': {
    'objective.name': 'autoregressive',
    'model.qk_norm': True,
  },
}


@pytest.mark.parametrize('name', EXPORTS)
def test_a_run_is_exported_with_the_same_logits(tokenizer, tmp_path, name):
  workdir, out = tmp_path / 'run', tmp_path / 'out'
  save_run(tokenizer, workdir, **EXPORTS[name])
  lines = convert.to_hf(workdir, out)
  assert f'{name} from step 3 of' in lines[0]
  convert.check(out, workdir)
  config = json.loads((out / 'config.json').read_text())
  assert config['architectures'] == [name]
  assert config['eos_token_id'] == 2
  masked = name in ('LLaDAModelLM', 'DreamModel')
  assert config.get('mask_token_id') == (4 if masked else None)
  assert tokenizer_lib.load(out) == tokenizer


def test_a_damaged_array_is_not_exported(tokenizer, tmp_path):
  workdir = tmp_path / 'run'
  save_run(tokenizer, workdir)
  path = workdir / 'checkpoints' / '3' / 'meta' / 'metadata'
  real = checkpoint.Checkpointer.read_meta

  def wrong(self, step):
    meta = real(self, step)
    meta.leaves['params/blocks/q']['fingerprint'] += 1
    return meta

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(checkpoint.Checkpointer, 'read_meta', wrong)
    with pytest.raises(UserError, match='step 3 .* bits of params/blocks/q'):
      convert.to_hf(workdir, tmp_path / 'out')
  assert os.listdir(tmp_path) == ['run']
  path.write_text('{}')
  with pytest.raises(UserError, match='all checkpoints in .* are damaged'):
    convert.to_hf(workdir, tmp_path / 'out')


NO_FAMILY = {
  'a mask and normed queries': (
    {'model.qk_norm': True},
    None,
    'no published architecture fits: llada has no config.model.qk_norm=True; ',
  ),
  'llada with wide heads': (
    {'model.head_dim': 16},
    'llada',
    '--family llada has no place for config.model.head_dim=16, which is not',
  ),
  'qwen2 without biases': (
    {},
    'qwen2',
    '--family qwen2 has no place for config.model.qkv_bias=False',
  ),
}


@pytest.mark.parametrize(
  'changes, family, message', NO_FAMILY.values(), ids=NO_FAMILY
)
def test_a_model_that_no_published_code_computes(changes, family, message):
  config = config_lib.default()
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    convert.choose_family(config, None, family)


def test_another_objective_is_written_on_demand_and_said(tokenizer, tmp_path):
  save_run(tokenizer, tmp_path / 'run', **{'model.predict_next': False})
  lines = convert.to_hf(tmp_path / 'run', tmp_path / 'out', family='llama')
  assert 'LlamaForCausalLM is autoregressive' in lines[1]
  convert.check(tmp_path / 'out', tmp_path / 'run')  # attends as Llama does


# Nothing half-written


def test_nothing_is_left_of_a_conversion_that_fails(tmp_path, monkeypatch):
  folder = published_folders.make(tmp_path / 'in')
  real, calls = ours.write, []

  def full(path, tensors):
    calls.append(path)
    if len(calls) == 4:
      raise UserError(f'cannot write {path} (No space left on device)')
    real(path, tensors)

  convert.from_hf(folder, tmp_path / 'run')
  monkeypatch.setattr(ours, 'write', full)
  with pytest.raises(UserError, match='No space left'):
    convert.from_hf(folder, tmp_path / 'again')
  assert len(calls) == 4
  calls[:] = []
  with pytest.raises(UserError, match='No space left'):
    convert.to_hf(tmp_path / 'run', tmp_path / 'out', max_bytes=4000)
  assert sorted(os.listdir(tmp_path)) == ['in', 'run']


def test_what_is_there_stays(tmp_path):
  folder = published_folders.make(tmp_path / 'in')
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'thesis.tex').write_text('x')
  with pytest.raises(UserError, match='full is there already'):
    convert.from_hf(folder, tmp_path / 'full')
  assert os.listdir(tmp_path / 'full') == ['thesis.tex']
  (tmp_path / 'empty').mkdir()
  convert.from_hf(folder, tmp_path / 'empty')
  assert (tmp_path / 'empty' / 'config.json').exists()
