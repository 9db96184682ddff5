"""Conversion of autoregressive networks: the mask token, and the shift."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import runpy

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import published_folders
import pytest
import tiny

from maskdiff.checkpoints import manifest
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import convert, hf, hf_tokenizer, load, mask_token
from maskdiff.interop import leaves as leaves_lib
from maskdiff.model import masks, transformer
from maskdiff.model.layers import shift_right
from maskdiff.model.transformer import TransformerConfig
from maskdiff.objectives import autoregressive
from maskdiff.training import step as step_lib

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = golden_models.GOLDEN


def without_mask(folder, words=()):
  """Renames the mask token of a folder's tokenizer; adds words before it."""
  published_folders.save_tokenizer(folder, words)
  path = folder / 'tokenizer.json'
  path.write_text(path.read_text().replace('<|mdm_mask|>', '<|fim|>'))
  return folder


def published(folder, **changes):
  """Returns configs/published.py of a folder."""
  path = ROOT / 'configs' / 'published.py'
  c = runpy.run_path(str(path))['get_config'](str(folder))
  c.update_from_flattened_dict(changes)
  return c


def full(tmp_path, case):
  """Returns a folder whose embedding has one row per id of the tokenizer."""
  folder = without_mask(published_folders.make(tmp_path / 'in', case))
  words = [f'word{i}' for i in range(272 - 259)]
  without_mask(folder, words)
  config = json.loads((folder / 'config.json').read_text())
  config |= {'bos_token_id': 269, 'eos_token_id': 270}
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


# The embedding


@pytest.mark.parametrize('case', ['qwen2', 'llama'])
def test_free_row_becomes_the_mean_of_the_output_embeddings(tmp_path, case):
  """qwen2 is tied, llama is not. No other parameter changes."""
  folder = without_mask(published_folders.make(tmp_path / 'in', case))
  c = published(folder)
  assert c.tokens.mask_id == 259 and c.model.vocab_size == 272
  mesh = mesh_lib.make_mesh(fsdp=-1)
  _, before = load.load_params(str(folder), mesh, 'float32')
  after = load.warm_start(c, mesh)
  output = 'embed' if case == 'qwen2' else 'head'
  old = np.asarray(before[output])
  old = old if output == 'embed' else old.T
  mean = np.delete(old, 259, axis=0).mean(axis=0)
  for name in {'embed', output}:
    new, was = np.asarray(after[name]), np.asarray(before[name])
    new, was = (x if name == 'embed' else x.T for x in (new, was))
    np.testing.assert_allclose(new[259], mean, atol=1e-6)
    np.testing.assert_array_equal(
      np.delete(new, 259, axis=0), np.delete(was, 259, axis=0)
    )
  np.testing.assert_array_equal(after['blocks']['q'], before['blocks']['q'])


def test_vocabulary_grows_if_every_row_is_used(tmp_path):
  folder = full(tmp_path, 'llama')
  c = published(folder)
  assert c.tokens.mask_id == 272 and c.model.vocab_size == 384
  mesh = mesh_lib.make_mesh(fsdp=-1)
  _, before = load.load_params(str(folder), mesh, 'float32')
  after = load.warm_start(c, mesh)
  assert after['embed'].shape[0] == 384
  np.testing.assert_array_equal(after['embed'][:272], before['embed'])
  tokens = jnp.arange(8)[None]
  first, second = (
    TransformerConfig(**{**c.model, 'vocab_size': size}) for size in (272, 384)
  )
  with jax.set_mesh(mesh):
    small, large = (
      np.asarray(causal_logits(config, params, tokens), np.float64)
      for config, params in ((first, before), (second, after))
    )
  np.testing.assert_allclose(large[..., :272], small, atol=1e-5)
  # Each of the 112 new rows adds at most 1 / 272 to the sum of the softmax.
  total = np.exp(small).sum(axis=-1)
  assert np.all(np.exp(large).sum(axis=-1) <= total * (1 + 112 / 272))
  c.model.vocab_size = 512  # neither that of the folder nor the next multiple
  with pytest.raises(UserError, match='vocab_size=272, not 512'):
    load.warm_start(c, mesh)


def test_reserved_special_token_is_used_before_the_vocabulary_grows(tmp_path):
  folder = full(tmp_path, 'llama')
  path = folder / 'tokenizer.json'
  path.write_text(path.read_text().replace('<|fim|>', '<|reserved_7|>'))
  c = published(folder)
  assert c.tokens.mask_id == 271 and c.model.vocab_size == 272


def test_known_mask_token_and_other_objectives_keep_the_embedding(
  tmp_path, capfd
):
  folder = without_mask(published_folders.make(tmp_path / 'in', 'qwen2'))
  mesh = mesh_lib.make_mesh()
  c = published(folder)
  c.objective.name, c.model.predict_next = 'autoregressive', False
  _, before = load.load_params(str(folder), mesh, 'float32')
  kept = lambda: np.testing.assert_array_equal(
    load.warm_start(c, mesh)['embed'], before['embed']
  )
  kept()
  assert capfd.readouterr().err == ''
  c.objective.name = 'block_diffusion'
  with pytest.raises(AssertionError):
    kept()
  assert 'mask token gets the id 259' in capfd.readouterr().err
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(
    json.dumps(config | {'mask_token_id': 259})
  )
  kept()
  convert.from_hf(folder, tmp_path / 'run')
  c.init_from = str(tmp_path / 'run')
  kept()
  (folder / 'config.json').write_text(json.dumps(config))
  published_folders.save_tokenizer(folder)  # its mask token has the id 258
  c = published(folder)
  assert c.tokens.mask_id == 258
  kept()


def test_work_directory_of_an_autoregressive_network_gets_a_mask_row(
  tmp_path, capfd
):
  folder = without_mask(published_folders.make(tmp_path / 'in', 'qwen2'))
  convert.from_hf(folder, tmp_path / 'run')
  c = published(folder, init_from=str(tmp_path / 'run'))
  params = load.warm_start(c, mesh_lib.make_mesh())
  expected = load.warm_start(published(folder), mesh_lib.make_mesh())
  np.testing.assert_array_equal(params['embed'], expected['embed'])
  assert 'predict' not in capfd.readouterr().err  # model.predict_next is set
  c.model.predict_next = False
  load.warm_start(c, mesh_lib.make_mesh())
  assert 'predicts the next token, and this run' in capfd.readouterr().err


# The tokenizer


def save(workdir, config, params, tokenizer):
  """Writes a work directory as launch/convert.py does."""
  (workdir / 'params').mkdir(parents=True)
  leaves_lib.write(
    str(workdir / 'params'),
    {
      name: leaves_lib.Leaf(x.shape, x.dtype, np.asarray(x).__getitem__)
      for name, x in manifest.flat(params).items()
    },
    manifest.Meta(config=manifest.config_json(config)),
    None,
  )
  tokenizer_lib.copy(tokenizer, workdir)


def trained(tmp_path, folder):
  """Returns a work directory of a masked diffusion run from a folder."""
  c, workdir = published(folder), tmp_path / 'run'
  params = load.warm_start(c, mesh_lib.make_mesh())
  save(workdir, c, params, tokenizer_lib.load(folder))
  hf.copy_published_files(folder, str(workdir / hf.PUBLISHED))
  return workdir


def assert_names_mask(folder, mask_id, name):
  """Checks an exported tokenizer, also in transformers if it is installed."""
  tokenizer = tokenizer_lib.load(folder)
  assert tokenizer.mask_id == mask_id
  assert tokenizer.decode([65, mask_id], '#').endswith('#')
  assert mask_id not in tokenizer.encode(f'a{name}b')  # text stays text
  found = hf_tokenizer.open_tokenizer(hf.open_folder(folder))
  assert found.mask_id == mask_id
  if importlib.util.find_spec('transformers'):
    transformers = pytest.importorskip('transformers')
    other = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert (other.mask_token, other.mask_token_id) == (name, mask_id)
    assert other(f'a{name}').input_ids == [*tokenizer.encode('a'), mask_id]
    assert other.decode([mask_id]) == name


@pytest.mark.parametrize('case', ['tokenizer.json', 'vocab.json', 'ADDED'])
def test_export_has_the_mask_token_in_its_tokenizer(tmp_path, case):
  folder = without_mask(published_folders.make(tmp_path / 'in', 'qwen2'))
  if case != 'tokenizer.json':
    (folder / 'tokenizer.json').unlink()
    published_folders.save_vocabulary(folder)
    path = folder / 'tokenizer_config.json'
    config = json.loads(
      path.read_text()
      .replace('<|mdm_mask|>', '<|fim|>')
      .replace('Dream', 'Qwen2')
    )
    if case == 'ADDED':
      added = config.pop('added_tokens_decoder')
      added = {token['content']: int(i) for i, token in added.items()}
      (folder / 'added_tokens.json').write_text(json.dumps(added))
      config['additional_special_tokens'] = ['<|fim|>']
    path.write_text(json.dumps(config))
  workdir = trained(tmp_path, folder)
  before = published_folders.contents(folder)
  lines = convert.to_hf(str(workdir), str(tmp_path / 'out'))
  assert "the mask token: '<|mask|>', id 259" in ' '.join(lines)
  assert_names_mask(tmp_path / 'out', 259, '<|mask|>')
  assert published_folders.contents(folder) == before
  written = json.loads((tmp_path / 'out' / 'config.json').read_text())
  assert written['architectures'] == ['DreamModel']
  assert written['mask_token_id'] == 259
  # The export of the export has the same tokenizer.
  convert.from_hf(tmp_path / 'out', tmp_path / 'again')
  lines = convert.to_hf(tmp_path / 'again', tmp_path / 'out2')
  assert 'names the mask token' not in ' '.join(lines)
  files = published_folders.contents(tmp_path / 'out')
  assert published_folders.contents(tmp_path / 'out2') == files


def test_export_of_a_grown_vocabulary(tmp_path):
  folder = full(tmp_path, 'qwen2')
  convert.to_hf(str(trained(tmp_path, folder)), str(tmp_path / 'out'))
  assert_names_mask(tmp_path / 'out', 272, '<|mask|>')
  opened = hf.open_folder(tmp_path / 'out')
  assert opened.model['vocab_size'] == 384
  assert opened.leaves['embed'].shape[0] == 384


def test_existing_special_token_is_named(tmp_path):
  folder = full(tmp_path, 'qwen2')
  path = folder / 'tokenizer.json'
  path.write_text(path.read_text().replace('<|fim|>', '<|reserved_7|>'))
  convert.to_hf(str(trained(tmp_path, folder)), str(tmp_path / 'out'))
  assert_names_mask(tmp_path / 'out', 271, '<|reserved_7|>')


def test_tokenizer_without_room_is_a_note(tmp_path):
  folder = without_mask(published_folders.make(tmp_path / 'in', 'qwen2'))
  tokenizer, c = tokenizer_lib.load(folder), published(folder)
  before = published_folders.contents(folder)
  c.tokens.mask_id = 261
  line = mask_token.extend_tokenizer(folder, tokenizer, c)
  assert (
    'id 261, cannot be added to the tokenizer: its next free id is 259'
    in (line)
  )
  without_mask(folder, ['<|mask|>'])
  before = published_folders.contents(folder)
  tokenizer, c.tokens.mask_id = tokenizer_lib.load(folder), 260
  line = mask_token.extend_tokenizer(folder, tokenizer, c)
  assert "its vocabulary has the text '<|mask|>'" in line
  assert published_folders.contents(folder) == before


def test_sentencepiece_mask_token_of_an_autoregressive_run(tokenizer, tmp_path):
  """Its mask is a control symbol, which no text is encoded to.

  The tokenizer keeps it, and its row of the embedding becomes the mean.
  """
  mask = tokenizer.mask_id
  c = tiny.config(
    {
      'objective.name': 'autoregressive',
      'model.layers': 1,
      'init_from': str(tmp_path / 'run'),
    }
  )
  model = TransformerConfig(**c.model)
  random = np.random.default_rng(0)
  draw = lambda x: random.normal(size=x.shape).astype(np.float32)
  params = jax.tree.map(draw, transformer.shapes(model))
  save(tmp_path / 'run', c, params, tokenizer)
  c.objective.name = 'block_diffusion'
  assert c.tokens.mask_id == mask
  after = load.warm_start(c, mesh_lib.make_mesh())
  mean = np.delete(params['embed'], mask, axis=0).mean(axis=0)
  np.testing.assert_allclose(after['embed'][mask], mean, atol=1e-6)
  assert mask_token.extend_tokenizer(tmp_path, tokenizer, c) is None


# The shift


@functools.partial(jax.jit, static_argnums=0)
def causal_logits(config, params, tokens):
  network = transformer.bind(config, params)
  hidden = network(tokens, masks.causal(tokens >= 0))
  return network.logits(hidden)


def golden_network():
  """Returns config and parameters of the Qwen2-like golden network."""
  mesh = mesh_lib.make_mesh()
  config, params = load.load_params(str(GOLDEN / 'model_sdlm'), mesh)
  return config, jax.tree.map(np.asarray, params)


@pytest.mark.parametrize('case', ['golden', 'llama'])
def test_shifted_causal_logits_are_the_autoregressive_logits(tmp_path, case):
  """Both predict token i + 1 from tokens 0..i, in their own convention.

  The autoregressive objective shifts the inputs, and predict_next the outputs.
  """
  if case == 'golden':
    config, params = golden_network()
  else:
    folder = published_folders.make(tmp_path / 'in', case)
    config, params = load.load_params(str(folder), mesh_lib.make_mesh())
    params = jax.tree.map(np.asarray, params)
  bos = 3
  tokens = np.random.default_rng(0).integers(4, 150, (2, 12)).astype(np.int32)
  c = dataclasses.replace(step_lib.objective_config(config), bos_id=bos)
  model = TransformerConfig(**config.model)
  model = dataclasses.replace(model, remat='none', attention='xla')
  valid = jnp.ones(tokens.shape, bool)
  inputs, _ = autoregressive.show(c, tokens, valid)
  shifted = dataclasses.replace(model, predict_next=True)
  row = np.concatenate([np.full((2, 1), bos, np.int32), tokens], axis=1)
  with jax.default_matmul_precision('highest'):
    expected = causal_logits(model, params, inputs)
    found = causal_logits(shifted, params, row)
  np.testing.assert_allclose(found[:, 1:], expected, atol=1e-5)
  assert np.abs(found[:, :-1] - expected).max() > 0.1


def test_golden_readings_of_the_shift_for_the_first_position():
  """The first position repeats its own output, as in Dream."""
  with np.load(GOLDEN / 'a2d.npz') as arrays:
    logits, repeated, constant = (
      arrays[f'shift.{k}'] for k in ('logits', 'repeat_first', 'constant_first')
    )
  labels = masks.causal(jnp.ones(logits.shape[:2], bool))
  found = shift_right(jnp.asarray(logits), labels)
  np.testing.assert_array_equal(found, repeated)
  # D2F's reading differs at the first position only.
  np.testing.assert_array_equal(found[:, 1:], constant[:, 1:])
