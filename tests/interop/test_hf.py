"""Hugging Face folders: tensors, config.json and tokenizer are checked."""

import json
import os
import pathlib
import shutil

import numpy as np
import published_folders
import pytest
import safetensors.numpy as original

from maskdiff import config as config_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import (
  config_json,
  config_keys,
  convert,
  hf,
  hf_config,
  hf_tokenizer,
  load,
  safetensors,
)
from maskdiff.training import workdir

Q1 = 'model.transformer.blocks.1.q_proj.weight'


@pytest.fixture
def folder(tmp_path):
  return published_folders.make(tmp_path / 'in')


def change_tensors(folder, change):
  path = folder / 'model.safetensors'
  tensors = original.load_file(path)
  change(tensors)
  original.save_file(tensors, path)


def change_config(folder, **changes):
  path = folder / 'config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize('case', published_folders.MODELS)
def test_leaves_equal_written_arrays_whole_and_sliced(case, tmp_path):
  folder = published_folders.make(tmp_path / 'in', case, max_bytes=4000)
  assert (folder / safetensors.INDEX).exists()
  found = hf.open_folder(folder)
  family, model = published_folders.model_of(case)
  written = published_folders.random_leaves(model)
  assert found.family == family and found.leaves.keys() == written.keys()
  for name, leaf in found.leaves.items():
    whole = written[name].read(())
    assert leaf.shape == whole.shape
    everything = tuple(slice(None) for _ in leaf.shape)
    np.testing.assert_array_equal(leaf.read(everything), whole)
    part = tuple(slice(n // 2, None) for n in leaf.shape)
    np.testing.assert_array_equal(leaf.read(part), whole[part])


def drop(name):
  return lambda tensors: tensors.pop(name)


def put(name, *shape, dtype=np.float32):
  return lambda tensors: tensors.update({name: np.zeros(shape, dtype)})


WRONG_TENSORS = {
  'missing': (
    drop(Q1),
    f'{Q1} is missing: .* it is not in .*model.safetensors',
  ),
  'missing head': (
    drop('model.transformer.ff_out.weight'),
    'model.transformer.ff_out.weight is missing',
  ),
  'extra': (
    put('model.transformer.blocks.0.q_proj.bias', 16),
    r'blocks.0.q_proj.bias in .*model.safetensors is not a parameter of a LL',
  ),
  'extra layer': (
    put('model.transformer.blocks.2.attn_norm.weight', 16),
    'blocks.2.attn_norm.weight in .* is not a parameter .* of 2 layers',
  ),
  'shape': (
    put(Q1, 16, 15),
    rf'{Q1} in .*model.safetensors has shape \[16, 15\], but .*config.json '
    r'implies \[16, 16\]',
  ),
  'dtype': (
    put(Q1, 16, 16, dtype=np.float16),
    f'{Q1} in .* is float16, but .*blocks.0.* is float32',
  ),
}


@pytest.mark.parametrize(
  'change, message', WRONG_TENSORS.values(), ids=WRONG_TENSORS
)
def test_wrong_tensor_is_named(folder, change, message):
  change_tensors(folder, change)
  with pytest.raises(UserError, match=message):
    hf.open_folder(folder)


def test_invalid_model_config_is_refused(folder):
  change_config(folder, n_kv_heads=3)
  with pytest.raises(
    UserError, match='config.json: 4 heads are not a multiple'
  ):
    hf.open_folder(folder)
  change_config(folder, n_heads=0)
  with pytest.raises(
    UserError, match='config.json: n_heads=0 must be a whole number from 1'
  ):
    hf.open_folder(folder)
  for text, message in (
    ('[', 'config.json.* is not valid JSON'),
    ('[' * 10**5, 'nested more than 100'),
    ('[]', 'is not a JSON object'),
    ('{"n_heads": 4, "n_heads": 2}', "the key 'n_heads' is there twice"),
    (' ' * (5 << 20), 'has more than 4,194,304 bytes'),
  ):
    (folder / 'config.json').write_text(text)
    with pytest.raises(UserError, match=message):
      hf.open_folder(folder)
    assert not config_json.is_published(folder)
  (folder / 'config.json').unlink()
  os.mkfifo(folder / 'config.json')
  with pytest.raises(UserError, match='config.json.* .not a regular file'):
    hf.open_folder(folder)


def test_path_cannot_control_the_terminal(tmp_path):
  folder = published_folders.make(tmp_path / 'in\x1b[31m\n')
  for changes in ({'n_layers': 0}, {'n_layers': 3}, {'d_model': 32}):
    change_config(folder, **{'n_layers': 2, **changes})
    with pytest.raises(UserError) as raised:
      hf.open_folder(folder)
    assert str(raised.value).isprintable()


def test_layers_of_config_cost_no_memory(folder):
  change_config(folder, n_layers=4096)
  with pytest.raises(UserError, match='blocks.2.* is missing'):
    hf.open_folder(folder)


def test_head_equal_to_tied_embedding_is_left_out(tmp_path):
  """The published Qwen3 0.6B has such a head."""
  folder = published_folders.make(tmp_path / 'in', 'qwen2')
  same = lambda t: t.update({'lm_head.weight': t['model.embed_tokens.weight']})
  change_tensors(folder, same)
  found = hf.open_folder(folder)
  assert 'head' not in found.leaves
  (note,) = found.notes
  assert 'lm_head.weight' in note and 'is left out' in note
  change_tensors(folder, put('lm_head.weight', 272, 16))
  with pytest.raises(UserError, match='lm_head.weight in .* differs from'):
    hf.open_folder(folder)


def test_constant_tensors_are_ignored(tmp_path):
  folder = published_folders.make(tmp_path / 'in', 'llama')
  name = 'model.layers.1.self_attn.rotary_emb.inv_freq'
  change_tensors(folder, put(name, 3))
  assert hf.open_folder(folder).leaves


# Tokenizers


def test_token_ids_match_config_and_tokenizer(folder):
  tokenizer = hf_tokenizer.open_tokenizer(hf.open_folder(folder))
  ids = tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id
  assert ids == (258, 256, 257)
  config = hf_config.run_config(hf.open_folder(folder), tokenizer)
  assert dict(config.tokens) == published_folders.TOKENS
  assert config.objective.name == 'masked_diffusion'
  assert config.data.length == 64


def test_missing_mask_id_becomes_an_unused_id(tmp_path):
  folder = published_folders.make(tmp_path / 'in', 'qwen2')
  path = folder / 'tokenizer.json'
  path.write_text(path.read_text().replace('<|mdm_mask|>', '<|fim|>'))
  open_ = lambda **kwargs: hf_tokenizer.open_tokenizer(
    hf.open_folder(folder), **kwargs
  )
  assert open_().mask_id == 259  # the first row after the tokenizer's ids
  assert open_(mask_id=270).mask_id == 270
  with pytest.raises(
    UserError, match='mask_id=272 is not a row of .*embed_tokens'
  ):
    open_(mask_id=272)
  with pytest.raises(UserError, match='mask_id=65 is the text'):
    open_(mask_id=65)


def test_eos_from_a_list_is_the_tokenizers(folder):
  change_config(folder, eos_token_id=[256, 257])
  assert hf_tokenizer.open_tokenizer(hf.open_folder(folder)).eos_id == 257


def test_tokenizer_of_dream_is_equal_in_both_forms(tmp_path):
  folder = published_folders.make(tmp_path / 'in', 'dream')
  assert not (folder / 'tokenizer.json').exists()
  tokenizer = hf_tokenizer.open_tokenizer(hf.open_folder(folder))
  published_folders.save_tokenizer(folder)
  other = hf_tokenizer.open_tokenizer(hf.open_folder(folder))
  assert other.path == str(folder / 'tokenizer.json')
  assert tokenizer.pieces == other.pieces
  text = " it's\n\n 12 \u4e16<|mdm_mask|>"
  assert tokenizer.encode(text) == other.encode(text)
  ids = [(t.mask_id, t.bos_id, t.eos_id) for t in (tokenizer, other)]
  assert ids == [(258, 256, 257)] * 2


@pytest.mark.parametrize('key', ['bos', 'eos', 'mask'])
@pytest.mark.parametrize(
  'value', ['7', 1.5, True, [[1]], {}, -1, -(10**6), 2**40]
)
def test_token_id_of_a_wrong_form_is_refused(folder, key, value):
  change_config(folder, **{f'{key}_token_id': value})
  with pytest.raises(UserError, match=f'{key}(_token)?_id='):
    hf_tokenizer.open_tokenizer(hf.open_folder(folder))


WRONG_TOKENIZERS = {
  'too large': (
    lambda folder: published_folders.save_tokenizer(
      folder, [f'word{i}' for i in range(20)]
    ),
    'tokenizer.json has 279 ids, but model.transformer.wte.weight in .* has '
    '272 rows: it is not the tokenizer of this model',
  ),
  'shifted': (
    lambda folder: published_folders.save_tokenizer(folder, ['ab', 'cd']),
    'config.json: bos_token_id=256 is not a special token of .*tokenizer.json',
  ),
  'too small': (
    lambda folder: change_config(folder, eos_token_id=265),
    'config.json: eos_token_id=265 is not a special token of .* 259 ids',
  ),
  'mask is text': (
    lambda folder: change_config(folder, mask_token_id=66),
    'mask_id=66 is the text .* in .*tokenizer.json',
  ),
}


@pytest.mark.parametrize(
  'change, message', WRONG_TOKENIZERS.values(), ids=WRONG_TOKENIZERS
)
def test_tokenizer_of_another_model_is_named(folder, change, message):
  change(folder)
  with pytest.raises(UserError, match=message):
    hf_tokenizer.open_tokenizer(hf.open_folder(folder))


def test_folder_without_a_tokenizer_opens(tmp_path):
  folder = published_folders.make(tmp_path / 'in', tokenizer=False)
  published = hf.open_folder(folder)
  assert hf_tokenizer.open_tokenizer(published) is None
  config = hf_config.run_config(published, None)
  assert dict(config.tokens) == published_folders.TOKENS
  config = hf_config.run_config(published, None, mask_id=3)
  assert config.tokens.mask_id == 3


@pytest.mark.parametrize('case', ['llada', 'qwen2'])
def test_unknown_mask_id_is_not_guessed(tmp_path, case):
  folder = published_folders.make(tmp_path / 'in', case, tokenizer=False)
  change_config(folder, mask_token_id=None)
  published = hf.open_folder(folder)
  with pytest.raises(UserError, match='json has no mask_token_id.*--mask_id'):
    hf_config.run_config(published, None)
  assert hf_config.run_config(published, None, 7).tokens.mask_id == 7
  config, params = load.load_params(folder, mesh_lib.make_mesh())
  assert config.tokens.mask_id == -1
  if case == 'llada':
    with pytest.raises(UserError, match='mask token is not known'):
      load.network(config, params)
  else:  # an autoregressive network needs no mask token
    assert load.network(config, params).mask_id == -1
  change_config(folder, eos_token_id=None)
  with pytest.raises(UserError, match='json has no eos_token_id'):
    hf_config.run_config(hf.open_folder(folder), None, 7)


def test_mask_of_a_masked_diffusion_network_is_not_a_spare_id(tmp_path):
  folder = published_folders.make(tmp_path / 'in')
  path = folder / 'tokenizer.json'
  path.write_text(path.read_text().replace('<|mdm_mask|>', '<|fim|>'))
  change_config(folder, mask_token_id=None)
  published = hf.open_folder(folder)
  with pytest.raises(UserError, match='json has no mask_token_id'):
    hf_tokenizer.open_tokenizer(published)
  assert hf_tokenizer.open_tokenizer(published, 258).mask_id == 258


def test_default_mask_of_the_published_class_must_be_an_id(
  tmp_path, monkeypatch
):
  folder = published_folders.make(tmp_path / 'in', 'dream', tokenizer=False)
  path = folder / 'config.json'
  config = json.loads(path.read_text())
  del config['mask_token_id']
  path.write_text(json.dumps(config))
  # Dream's 151666 is beyond this vocabulary.
  assert 'mask_token_id' not in hf.open_folder(folder).config
  monkeypatch.setitem(config_keys.DEFAULTS['dream'], 'mask_token_id', 260)
  found = hf_config.run_config(hf.open_folder(folder), None)
  assert found.tokens.mask_id == 260


@pytest.mark.parametrize(
  'case, token',
  [('llada', '<|eot_id|>'), ('dream', '<|im_end|>'), ('llama', '<|eot_id|>')],
)
def test_end_of_turn_is_that_of_the_family(tmp_path, monkeypatch, case, token):
  folder = published_folders.make(tmp_path / 'in', case)
  config = lambda: hf_config.run_config(
    published, hf_tokenizer.open_tokenizer(published)
  )
  published = hf.open_folder(folder)
  assert config().sample.eot_id == -1
  special = [*published_folders.SPECIAL, '<|other|>', token]
  monkeypatch.setattr(published_folders, 'SPECIAL', special)
  published_folders.save_tokenizer(folder)
  assert config().sample.eot_id == 260


# Copies and links


def test_small_files_except_weights_are_copied(folder, tmp_path, monkeypatch):
  (folder / 'pytorch_model.bin').write_bytes(b'weights')
  (folder / 'modeling_llada.py').write_text('code')
  (folder / 'large').write_bytes(bytes(10**5))
  (folder / '.hidden').write_text('x')
  monkeypatch.setattr(hf, 'MAX_COPIED_BYTES', 10**5 - 1)
  leave_out = ['generation_config.json']
  hf.copy_published_files(folder, tmp_path / 'out', leave_out)
  names = {path.name for path in pathlib.Path(tmp_path, 'out').iterdir()}
  assert names == {
    'config.json',
    'chat_template.jinja',
    'modeling_llada.py',
    'tokenizer.json',
    'tokenizer_config.json',
  }


def test_bytes_of_copied_files_are_bounded(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(hf, 'MAX_COPIED_TOTAL', 10)
  with pytest.raises(UserError, match='more than 10 bytes of files that are'):
    convert.from_hf(folder, tmp_path / 'run')
  assert os.listdir(tmp_path) == ['in']


def published_copy(folder, target):
  """Converts a folder, and exports it again."""
  convert.from_hf(folder, target / 'run')
  convert.to_hf(target / 'run', target / 'out')


@pytest.mark.parametrize('target', ['../private', '/proc/self/environ'])
@pytest.mark.parametrize(
  'name', ['notes.txt', 'tokenizer.json', 'config.json', 'model.safetensors']
)
def test_linked_file_is_neither_read_nor_copied(folder, tmp_path, name, target):
  (tmp_path / 'private').write_text('secret')
  if (folder / name).exists():
    (folder / name).rename(tmp_path / 'private')
  (folder / name).symlink_to(target)
  with pytest.raises(UserError, match=f'{name}.* is a link to'):
    published_copy(folder, tmp_path)
  assert sorted(os.listdir(tmp_path)) == ['in', 'private']
  if name in ('config.json', 'model.safetensors'):
    with pytest.raises(UserError, match=f'{name}.* is a link to'):
      load.load(folder)


def test_links_in_a_work_directory_are_not_exported(folder, tmp_path):
  convert.from_hf(folder, tmp_path / 'run')
  (tmp_path / 'private').write_text('secret')
  published = tmp_path / 'run' / hf.PUBLISHED
  (published / 'notes.txt').symlink_to(tmp_path / 'private')
  with pytest.raises(UserError, match='notes.txt.* is a link to'):
    convert.to_hf(tmp_path / 'run', tmp_path / 'out')
  config = config_lib.default()
  config.init_from = str(tmp_path / 'run')
  with pytest.raises(UserError, match='notes.txt.* is a link to'):
    workdir.copy_published_files(config, str(tmp_path / 'next'))
  (published / 'notes.txt').unlink()
  workdir.copy_published_files(config, str(tmp_path / 'next'))
  assert sorted(os.listdir(tmp_path / 'next' / hf.PUBLISHED)) == sorted(
    os.listdir(published)
  )
  published.rename(tmp_path / 'elsewhere')
  published.symlink_to(tmp_path / 'elsewhere')
  for copy in (
    lambda: convert.to_hf(tmp_path / 'run', tmp_path / 'out'),
    lambda: workdir.copy_published_files(config, str(tmp_path / 'last')),
  ):
    with pytest.raises(UserError, match='is a link to another folder'):
      copy()
  assert not (tmp_path / 'out').exists()


def test_parameters_in_a_linked_folder_are_refused(folder, tmp_path):
  convert.from_hf(folder, tmp_path / 'run')
  params = tmp_path / 'run' / 'params'
  params.rename(tmp_path / 'elsewhere')
  params.symlink_to(tmp_path / 'elsewhere')
  with pytest.raises(UserError, match='params.* is a link to another folder'):
    load.load_params(tmp_path / 'run', mesh_lib.make_mesh())


def test_cache_of_the_hub_converts_as_its_files(folder, tmp_path):
  repository = tmp_path / 'models--a--b'
  snapshot = repository / 'snapshots' / 'main'
  snapshot.mkdir(parents=True)
  (repository / 'blobs').mkdir()
  for i, path in enumerate(sorted(folder.iterdir())):
    blob = repository / 'blobs' / f'{i:040x}'
    shutil.copyfile(path, blob)
    (snapshot / path.name).symlink_to(f'../../blobs/{blob.name}')
  before = published_folders.contents(folder)
  published_copy(snapshot, tmp_path)
  after = published_folders.contents(tmp_path / 'out')
  del before['model.safetensors'], after['model.safetensors']
  assert before == after


def test_copies_have_at_most_the_permissions_of_their_source(folder, tmp_path):
  for path in folder.iterdir():
    path.chmod(0o600)
  (folder / 'generation_config.json').chmod(0o755)
  before = os.umask(0o022)
  try:
    published_copy(folder, tmp_path)
  finally:
    os.umask(before)
  params = (tmp_path / 'run' / 'params').glob('*.safetensors')
  assert {path.stat().st_mode & 0o777 for path in params} == {0o600}
  assert (tmp_path / 'run').stat().st_mode & 0o777 == 0o755
  for parent in (tmp_path / 'run' / hf.PUBLISHED, tmp_path / 'out'):
    modes = {p.name: p.stat().st_mode & 0o777 for p in parent.iterdir()}
    assert modes.pop('generation_config.json') == 0o644
    assert set(modes.values()) == {0o600}
