"""Hugging Face folders: tensors, config.json and tokenizer are checked."""

import json
import pathlib

import numpy as np
import published_folders
import pytest
import safetensors.numpy as original

from maskdiff.errors import UserError
from maskdiff.interop import hf, hf_tokenizer, safetensors

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
  change_config(folder, n_heads=3)
  with pytest.raises(
    UserError, match='config.json: 3 heads are not a multiple'
  ):
    hf.open_folder(folder)
  change_config(folder, n_heads=0)
  with pytest.raises(
    UserError, match='config.json: n_heads=0 must be 1 or more'
  ):
    hf.open_folder(folder)
  (folder / 'config.json').write_text('[')
  with pytest.raises(UserError, match='cannot read .*config.json'):
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
  config = hf.run_config(hf.open_folder(folder), tokenizer)
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
  config = hf.run_config(published, None)
  assert dict(config.tokens) == published_folders.TOKENS


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
