"""Conversions: golden logits, byte-identical round trips, exported runs."""

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
import tiny

from maskdiff.checkpoints import checkpoint, manifest
from maskdiff.checkpoints.checkpoint import Checkpointer
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import InUse, UserError
from maskdiff.files import lock, new_folder
from maskdiff.interop import convert, hf, load, reference
from maskdiff.interop import safetensors as ours
from maskdiff.model import masks, ntk, transformer
from maskdiff.training import step as step_lib

GOLDEN = golden_models.GOLDEN


def tensors_of(folder):
  """Returns the tensors of a folder by name, read by package safetensors."""
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
def test_golden_logits_before_and_after_conversion(name, tmp_path):
  """Runs on 8 devices. The recorded logits come from the published code."""
  folder, workdir = GOLDEN / name, tmp_path / 'run'
  convert.from_hf(folder, workdir)
  with np.load(GOLDEN / 'forward.npz') as arrays:
    of = name.removesuffix('_sharded')
    ids, expected = (arrays[f'{of}.plain_{k}'] for k in ('ids', 'logits'))
  mesh = mesh_lib.make_mesh()
  for source in (folder, workdir):
    config, params = load.load_params(source, mesh)
    model_config = step_lib.step_config(config).model
    assert model_config.dtype == 'float32'
    with jax.set_mesh(mesh):
      found = logits(model_config, params, ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
  published = hf.open_folder(folder)
  for row, of_row in zip(ids, expected, strict=True):
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
def test_family_logits_match_reference_and_round_trip_is_exact(case, tmp_path):
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


def test_logits_and_weights_of_fast_dllm(tmp_path):
  """Block-causal attention, and outputs that predict the next token."""
  folder = published_folders.make(tmp_path / 'in', 'fast_dllm')
  *_, last = convert.check(folder)
  assert 'largest difference of a logit' in last
  config, params = load.load_params(folder, mesh_lib.make_mesh())
  network = load.network(config, params)
  assert (network.objective, network.block_length) == ('block_diffusion', 8)
  assert network.config.predict_next and network.mask_id == 258
  opened = hf.open_folder(folder)
  (tmp_path / 'out').mkdir()
  hf.write_weights(tmp_path / 'out', opened.family, opened.leaves)
  assert_same_tensors(folder, tmp_path / 'out')


def test_family_of_block_diffusion_follows_the_shift():
  config = tiny.config(
    {
      'objective.name': 'block_diffusion',
      'model.qkv_bias': True,
      'model.predict_next': True,
    }
  )
  assert convert.choose_family(config, None, None).name == 'fast_dllm'
  config.model.update(qkv_bias=False, qk_norm=True)
  with pytest.raises(UserError, match='sdar does not fit .*predict_next=True'):
    convert.choose_family(config, None, None)
  config.model.predict_next = False
  assert convert.choose_family(config, None, None).name == 'sdar'
  config.objective.clean_attention = 'causal'
  with pytest.raises(UserError, match="sdar does not fit .*'causal'"):
    convert.choose_family(config, None, None)


def test_blocks_of_sdar_are_those_of_its_config(tmp_path):
  folder = published_folders.make(tmp_path / 'in', 'sdar')
  convert.from_hf(folder, tmp_path / 'run')
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert config['objective']['name'] == 'block_diffusion'
  assert config['objective']['block_length'] == 4
  changed = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(changed | {'block_size': 1}))
  with pytest.raises(UserError, match='block_length=4, but .* has 1'):
    convert.check(folder, tmp_path / 'run')


def test_windows_of_sdlm_are_those_of_its_config(tmp_path):
  folder = published_folders.make(tmp_path / 'in', 'sdlm')
  convert.from_hf(folder, tmp_path / 'run')
  config, params = load.load_params(tmp_path / 'run', mesh_lib.make_mesh())
  network = load.network(config, params)
  assert (network.objective, network.window_length) == ('sdlm', 4)
  assert (network.mask_id, network.bos_id) == (258, -1)
  # Training on windows of another length does not start from the network.
  other = config.copy_and_resolve_references()
  other.init_from = str(tmp_path / 'run')
  other.objective.window_length = 8
  with pytest.raises(UserError, match='window_length=4, not 8; set --config'):
    load.warm_start(other, mesh_lib.make_mesh())
  changed = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(changed | {'block_size': 8}))
  with pytest.raises(UserError, match='window_length=4, but .* has 8'):
    convert.check(folder, tmp_path / 'run')
  (folder / 'config.json').write_text(
    json.dumps(changed | {'causal_attn': True})
  )
  with pytest.raises(UserError, match='causal_attn=True is not supported'):
    convert.check(folder)
  # Our runs begin documents with bos, and their exports say so.
  changed['begins_with_bos'] = 1
  (folder / 'config.json').write_text(json.dumps(changed))
  with pytest.raises(UserError, match='begins_with_bos=1: must be true'):
    load.load_params(folder, mesh_lib.make_mesh())
  changed['begins_with_bos'] = True
  (folder / 'config.json').write_text(json.dumps(changed))
  convert.from_hf(folder, tmp_path / 'with_bos')
  convert.to_hf(tmp_path / 'with_bos', tmp_path / 'out')
  config, _ = load.load_params(tmp_path / 'out', mesh_lib.make_mesh())
  assert config.tokens.bos_id >= 0
  # Without the window length, the folder is Qwen2.
  del changed['block_size']
  (folder / 'config.json').write_text(json.dumps(changed))
  assert hf.open_folder(folder).family.name == 'qwen2'


def test_bfloat16_round_trip_through_float32_is_exact(tmp_path):
  folder = published_folders.make(tmp_path / 'in', 'qwen2', 'bfloat16')
  convert.from_hf(folder, tmp_path / 'run', dtype='float32')
  convert.check(folder, tmp_path / 'run')
  convert.to_hf(tmp_path / 'run', tmp_path / 'out', dtype='bfloat16')
  assert_same_tensors(folder, tmp_path / 'out')
  convert.to_hf(tmp_path / 'run', tmp_path / 'wide')
  wide = json.loads((tmp_path / 'wide' / 'config.json').read_text())
  assert wide['torch_dtype'] == 'float32'


def test_swapped_tensors_fail_the_check(tmp_path):
  """Their shapes are equal, so that only the logits reveal the swap."""
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
  """Saves a run with random parameters at step 3; returns the parameters."""
  config = tiny.config(
    tiny.MODEL_KEYS
    | {'model.layers': 2, 'model.kv_heads': 1, 'data.tokenizer': tokenizer.path}
    | changes
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
  'SDARForCausalLM': {
    'objective.name': 'block_diffusion',
    'objective.block_length': 8,
    'model.qk_norm': True,
  },
  'LlamaForCausalLM': {'objective.name': 'autoregressive'},
  'Qwen3ForCausalLM': {
    'objective.name': 'autoregressive',
    'model.qk_norm': True,
  },
}


@pytest.mark.slow
@pytest.mark.parametrize('name', EXPORTS)
def test_exported_run_has_the_same_logits(tokenizer, tmp_path, name):
  workdir, out = tmp_path / 'run', tmp_path / 'out'
  save_run(tokenizer, workdir, **EXPORTS[name])
  lines = convert.to_hf(workdir, out)
  assert f'{name} from step 3 of' in lines[0]
  convert.check(out, workdir)
  config = json.loads((out / 'config.json').read_text())
  assert config['architectures'] == [name]
  assert config['eos_token_id'] == 2
  assert config.get('block_size') == (8 if name == 'SDARForCausalLM' else None)
  masked = name in ('LLaDAModelLM', 'DreamModel', 'SDARForCausalLM')
  assert config.get('mask_token_id') == (4 if masked else None)
  assert tokenizer_lib.load(out) == tokenizer


def test_export_of_a_scaled_run_has_its_theta_and_its_logits(
  tokenizer, tmp_path
):
  """LLaDA's config.json has no scaling of positions, only a base."""
  workdir, out = tmp_path / 'run', tmp_path / 'out'
  scaled = {
    'data.length': 64,
    'model.tie_embeddings': False,
    'model.rope_theta': 10.0,
    'model.rope_scaling': (16, 64),
  }
  save_run(tokenizer, workdir, **scaled)
  convert.to_hf(workdir, out)
  convert.check(out, workdir)
  config, *_ = load.load(str(out))
  expected = ntk.scaled_theta(10.0, 8, 16, 64)
  assert (config.model.rope_theta, config.model.rope_scaling) == (expected, ())
  assert config.data.length == 64
  other = tmp_path / 'other'
  save_run(tokenizer, other, **scaled | {'model.rope_scaling': ()})
  with pytest.raises(UserError, match='model.rope_theta=10.0, but .* has 55'):
    convert.check(out, other)


def test_lengths_of_answers_are_exported(tokenizer, tmp_path):
  """Their tokens have no text in a loaded model."""
  named, out = ((4, 212), (8, 213)), tmp_path / 'out'
  save_run(tokenizer, tmp_path / 'run', **{'data.length_tokens': named})
  convert.to_hf(tmp_path / 'run', out)
  config, loaded, params, _ = load.load(str(out))
  assert config.data.length_tokens == named
  assert load.network(config, params).length_ids == (212, 213)
  assert loaded.decode([212, 214, 213]) == tokenizer.decode([214])
  path = out / 'config.json'
  text = json.loads(path.read_text())
  for bad in (7, [[4]], [[8, 212], [4, 213]], [[4, 1 << 20]], [[4, 'x']]):
    path.write_text(json.dumps(text | {'length_tokens': bad}))
    with pytest.raises(UserError, match='length_tokens'):
      load.load(str(out))


def test_damaged_array_is_not_exported(tokenizer, tmp_path):
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
  'masked diffusion with qk_norm': (
    {'model.qk_norm': True},
    None,
    'no published .*: llada does not fit config.model.qk_norm=True; ',
  ),
  'llada with wide heads': (
    {'model.head_dim': 16},
    'llada',
    '--family llada does not support config.model.head_dim=16, which is not',
  ),
  'qwen2 without biases': (
    {},
    'qwen2',
    '--family qwen2 does not support config.model.qkv_bias=False',
  ),
}


@pytest.mark.parametrize(
  'changes, family, message', NO_FAMILY.values(), ids=NO_FAMILY
)
def test_model_without_a_published_architecture_is_refused(
  changes, family, message
):
  config = tiny.config(changes)
  with pytest.raises(UserError, match=message):
    convert.choose_family(config, None, family)


def test_export_with_another_objective_prints_a_note(tokenizer, tmp_path):
  save_run(tokenizer, tmp_path / 'run', **{'model.predict_next': False})
  lines = convert.to_hf(tmp_path / 'run', tmp_path / 'out', family='llama')
  assert 'LlamaForCausalLM applies autoregressive' in lines[1]
  convert.check(tmp_path / 'out', tmp_path / 'run')  # with causal attention


# Incomplete results


def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
  folder = published_folders.make(tmp_path / 'in')
  write, calls = ours.write, []

  def full(path, tensors):
    calls.append(path)
    if len(calls) == 4:
      raise UserError(f'cannot write {path} (No space left on device)')
    write(path, tensors)

  convert.from_hf(folder, tmp_path / 'run')
  monkeypatch.setattr(ours, 'write', full)
  with pytest.raises(UserError, match='No space left'):
    convert.from_hf(folder, tmp_path / 'again')
  assert len(calls) == 4
  calls[:] = []
  with pytest.raises(UserError, match='No space left'):
    convert.to_hf(tmp_path / 'run', tmp_path / 'out', max_bytes=4000)
  assert sorted(os.listdir(tmp_path)) == ['in', 'run']


def test_existing_files_are_not_overwritten(tmp_path):
  folder = published_folders.make(tmp_path / 'in')
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'thesis.tex').write_text('x')
  with pytest.raises(UserError, match='full exists already'):
    convert.from_hf(folder, tmp_path / 'full')
  assert os.listdir(tmp_path / 'full') == ['thesis.tex']
  (tmp_path / 'empty').mkdir()
  convert.from_hf(folder, tmp_path / 'empty')
  assert (tmp_path / 'empty' / 'config.json').exists()


def test_a_directory_has_one_writer(tmp_path):
  out = tmp_path / 'out'
  with new_folder.new_folder(out) as new:
    (pathlib.Path(new) / 'a').touch()
    with pytest.raises(InUse, match=f'process {os.getpid()} on '):
      with lock.locked(out):  # a training
        pass
    with pytest.raises(InUse), new_folder.new_folder(out):
      pass
  assert os.listdir(out) == ['a'] and os.listdir(tmp_path) == ['out']
  (tmp_path / 'killed').mkdir()
  (tmp_path / 'killed' / lock.NAME).touch()  # of a process that was killed
  with new_folder.new_folder(tmp_path / 'killed'):
    pass
  assert os.listdir(tmp_path / 'killed') == []
