"""Adapters in the layout of peft, and merged exports.

The tests that load them with peft are skipped without torch, transformers and
peft (requirements-interop-test.txt).
"""

import contextlib
import json
import re

import jax
import numpy as np
import published_folders
import pytest
import safetensors.numpy

from maskdiff.checkpoints import manifest
from maskdiff.checkpoints.checkpoint import Checkpointer
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import convert, hf, hf_config, hf_tokenizer, load, peft
from maskdiff.model import lora, transformer
from maskdiff.model.trainable import join

TARGETS = ('query', 'attention_output', 'down')


def make_run(path, case, objective=None, rope_scaling=(), **changes):
  """Writes a folder and a run with random adapters; returns their paths.

  Args:
    path: empty directory.
    case: case of published_folders.MODELS.
    objective: name of the objective of the run; default: the folder's.
    rope_scaling: config.model.rope_scaling of the run.
    changes: keys of config.lora.
  """
  folder, workdir = path / 'base', path / 'run'
  published_folders.make(folder, case)
  published = hf.open_folder(folder)
  tokenizer = hf_tokenizer.open_tokenizer(published)
  config = hf_config.run_config(published, tokenizer)
  config.init_from = str(folder)
  config.objective.name = objective or config.objective.name
  config.model.rope_scaling = rope_scaling or config.model.rope_scaling
  config.lora.update({'rank': 3, 'alpha': 5.0} | changes)
  model = transformer.from_config(config)
  _, params = load.load_params(
    str(folder), mesh_lib.make_mesh(), config.lora.base_dtype
  )
  random = np.random.default_rng(0)
  draw = lambda x: random.normal(size=x.shape).astype(np.float32) / 4
  adapters = jax.tree.map(draw, lora.trained(transformer.shapes(model)))
  params = join(params, adapters)
  meta = manifest.Meta(config=manifest.config_json(config))
  with contextlib.closing(
    Checkpointer(workdir / 'checkpoints', keep=1)
  ) as saver:
    saver.save(1, {'params': params}, meta)
  tokenizer_lib.copy(tokenizer, str(workdir))
  hf.copy_published_files(folder, workdir / hf.PUBLISHED)
  return folder, workdir


def test_adapters_have_the_names_and_shapes_of_peft(tmp_path):
  """The last test of this file loads these names with peft."""
  folder, workdir = make_run(tmp_path, 'llada', targets=TARGETS)
  lines = peft.to_peft(str(workdir), str(tmp_path / 'out'))
  assert f'base: {folder}, as LLaDAModelLM' in lines[1]
  found = safetensors.numpy.load_file(
    tmp_path / 'out' / 'adapter_model.safetensors'
  )
  prefix = 'base_model.model.model.transformer.blocks'
  assert {name: x.shape for name, x in found.items()} == {
    f'{prefix}.{n}.{module}.lora_{side}.weight': shape
    for n in range(2)
    for module, inputs, outputs in (
      ('q_proj', 16, 16),
      ('attn_out', 16, 16),
      ('ff_out', 24, 16),
    )
    for side, shape in (('A', (3, inputs)), ('B', (outputs, 3)))
  }
  config = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
  assert (config['r'], config['lora_alpha']) == (3, 5)
  assert config['base_model_name_or_path'] == str(folder)
  matches = lambda name: re.fullmatch(config['target_modules'], name)
  assert matches('model.transformer.blocks.1.ff_out')
  assert not matches('model.transformer.ff_out')  # the head
  assert not matches('model.transformer.blocks.1.up_proj')


@pytest.mark.slow
@pytest.mark.parametrize(
  'dtype', [pytest.param('float32', marks=pytest.mark.slow), 'bfloat16']
)
def test_export_and_load_merge_the_same_matrices(dtype, tmp_path):
  _, workdir = make_run(tmp_path, 'llada', base_dtype=dtype)
  convert.to_hf(str(workdir), str(tmp_path / 'out'), dtype='float32')
  mesh = mesh_lib.make_mesh()
  _, exported = load.load_params(str(tmp_path / 'out'), mesh)
  config, merged = load.load_params(str(workdir), mesh, 'float32')
  assert config.lora.rank == 0
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
    exported,
    merged,
  )
  convert.check(str(tmp_path / 'out'), str(workdir))
  stored = load.load_params(str(workdir), mesh)[1]
  assert {x.dtype.name for x in jax.tree.leaves(stored)} == {dtype}


def test_run_without_adapters_is_refused(tmp_path):
  _, workdir = make_run(tmp_path, 'llada', rank=0)
  with pytest.raises(UserError, match='has no adapters.*with --to hf'):
    peft.to_peft(str(workdir), str(tmp_path / 'out'))


def test_adapters_of_a_scaled_run_are_refused(tmp_path):
  with pytest.raises(UserError, match='which the base of adapters lacks'):
    _, workdir = make_run(tmp_path, 'llada', rope_scaling=(16, 64))
    peft.to_peft(str(workdir), str(tmp_path / 'out'))


@pytest.fixture
def package():
  for name in ('torch', 'transformers'):
    pytest.importorskip(name)
  return pytest.importorskip('peft')


@pytest.mark.parametrize('case', ['llama', 'qwen2', 'qwen3'])
def test_peft_computes_the_logits_of_the_merged_export(case, package, tmp_path):
  import torch
  import transformers

  _, workdir = make_run(tmp_path, case)
  peft.to_peft(str(workdir), str(tmp_path / 'adapters'), case)
  convert.to_hf(str(workdir), str(tmp_path / 'merged'), family=case)
  ids = torch.tensor([[5, 7, 11, 250, 80, 2]])
  read = lambda path: transformers.AutoModelForCausalLM.from_pretrained(path)
  with torch.no_grad():
    base = read(tmp_path / 'base')
    before = base(ids).logits
    loaded = package.PeftModel.from_pretrained(base, tmp_path / 'adapters')
    found = loaded(ids).logits
    expected = read(tmp_path / 'merged')(ids).logits
  largest = float(expected.abs().max())
  assert float((found - expected).abs().max()) < 1e-5 * largest
  assert float((before - expected).abs().max()) > 1e-2 * largest


def test_peft_merges_llada_as_the_export_does(package, tmp_path):
  """LLaDA has no class in transformers: modules with its names stand for it."""
  import torch

  folder, workdir = make_run(tmp_path, 'llada')
  peft.to_peft(str(workdir), str(tmp_path / 'adapters'))
  convert.to_hf(str(workdir), str(tmp_path / 'merged'))
  read = lambda path: safetensors.numpy.load_file(path / 'model.safetensors')
  before, expected = read(folder), read(tmp_path / 'merged')
  root = torch.nn.Module()
  for name, tensor in before.items():
    *parents, last = name.removesuffix('.weight').split('.')
    module = root
    for parent in parents:
      if parent not in dict(module.named_children()):
        module.add_module(parent, torch.nn.Module())
      module = module.get_submodule(parent)
    child = torch.nn.Module()
    if tensor.ndim == 2 and last != 'wte':
      child = torch.nn.Linear(*tensor.shape[::-1], bias=False)
    child.weight = torch.nn.Parameter(torch.tensor(tensor))
    module.add_module(last, child)
  loaded = package.PeftModel.from_pretrained(root, tmp_path / 'adapters')
  merged = loaded.merge_and_unload().state_dict()
  assert merged.keys() == expected.keys()
  changed = 0
  for name, tensor in expected.items():
    np.testing.assert_allclose(merged[name], tensor, rtol=1e-5, atol=1e-6)
    changed += bool((tensor != before[name]).any())
  assert changed == 7 * 2


@pytest.mark.slow
def test_added_mask_token_is_noted(tmp_path):
  """A base that was autoregressive has no embedding of the mask token."""
  for objective, noted in (('autoregressive', 0), ('masked_diffusion', 1)):
    path = tmp_path / objective
    path.mkdir()
    _, workdir = make_run(path, 'qwen2', objective)
    file = workdir / 'tokenizer.json'
    text = file.read_text().replace(published_folders.SPECIAL[2], '<|other|>')
    file.write_text(text)
    lines = peft.to_peft(str(workdir), str(path / 'out'), 'qwen2')
    assert sum(line.startswith('note: ') for line in lines) == noted
