"""Runs that train adapters: frozen base, resuming, loading."""

import shutil

import jax
import made_answers
import numpy as np
import pytest
import saved
from test_finetuning import small

from maskdiff import config as config_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import load
from maskdiff.model import lora, masks, transformer
from maskdiff.posttraining import finetuning
from maskdiff.training import loop

KEYS = {
  'lora.rank': 2,
  'lora.alpha': 8.0,
  'lora.base_dtype': 'bfloat16',
  'checkpoint.every_steps': 3,
  'checkpoint.keep': 4,
  'train.microbatches': 2,
}


@pytest.fixture(scope='module')
def config(tmp_path_factory, tokenizer):
  path = tmp_path_factory.mktemp('inputs')
  (path / 'model').mkdir()
  made_answers.save_model(path / 'model', tokenizer)
  rows = made_answers.write_rows(path / 'rows', tokenizer)
  return small(path / 'model', rows, **KEYS)


@pytest.fixture(scope='module')
def workdir(config, tmp_path_factory):
  """Returns the work directory of six steps, with a checkpoint of step 3."""
  path = tmp_path_factory.mktemp('run') / 'run'
  loop.run(config, str(path), finetuning.make_stage)
  return path


@pytest.mark.slow
def test_checkpoint_holds_the_base_and_trained_adapters(config, workdir):
  step, meta, arrays = saved.newest(workdir)
  assert step == config.train.steps == 6
  mesh = mesh_lib.make_mesh()
  _, base = load.load_params(config.init_from, mesh, 'bfloat16')
  found = {
    jax.tree_util.keystr(path): np.asarray(x)
    for path, x in jax.tree_util.tree_leaves_with_path({'params': base})
  }
  for name, expected in found.items():
    np.testing.assert_array_equal(arrays[name], expected, err_msg=name)
  adapters = {
    name: x
    for name, x in arrays.items()
    if name.startswith("['params']") and name not in found
  }
  assert len(adapters) == 14
  assert all(x.dtype == np.float32 and x.any() for x in adapters.values())


@pytest.mark.slow
def test_resumed_run_has_the_same_bits(config, workdir, tmp_path):
  again = tmp_path / 'run'
  shutil.copytree(workdir, again)
  shutil.rmtree(again / 'checkpoints' / '6')
  loop.run(config, str(again), finetuning.make_stage)
  step, meta, expected = saved.newest(workdir)
  step_again, meta_again, found = saved.newest(again)
  assert step == step_again == 6
  assert meta['leaves'] == meta_again['leaves']  # with fingerprints
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(x, found[name], err_msg=name)


@pytest.mark.slow
def test_loaded_model_computes_what_was_trained(config, workdir):
  """Adapters are merged when a run is loaded."""
  _, _, arrays = saved.newest(workdir)
  model = transformer.from_config(config)
  shapes = {'params': transformer.shapes(model)}
  params = jax.tree_util.tree_map_with_path(
    lambda path, _: arrays[jax.tree_util.keystr(path)], shapes
  )['params']
  loaded, _, merged, _ = load.load(str(workdir), dtype='float32')
  assert loaded.lora.rank == 0
  tokens = np.arange(8)[None] + 5

  def logits(network, params):
    labels = masks.bidirectional(tokens >= 0)
    bound = transformer.bind(network, params)
    return bound.logits(bound(tokens, labels))

  with jax.set_mesh(mesh_lib.make_mesh()):
    found = logits(load.network(loaded, None).config, merged)
  expected = logits(model, params)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  base = logits(transformer.from_config(loaded), lora.base(params))
  assert np.abs(expected - base).max() > 1e-2


def test_new_run_with_adapters_needs_a_trained_model(config, tmp_path):
  other = config.copy_and_resolve_references()
  other.init_from = ''
  with pytest.raises(UserError, match='lora.rank=2 trains adapters of a trai'):
    loop.run(other, str(tmp_path / 'run'))


@pytest.mark.slow
def test_run_refuses_to_resume_with_other_adapters(config, workdir):
  other = config.copy_and_resolve_references()
  other.lora.rank = 4
  with pytest.raises(UserError, match='was trained with config.lora.rank=2'):
    loop.run(other, str(workdir), finetuning.make_stage)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'lora.targets': ('q_proj',)}, "'q_proj' matches no matrix; choose from"),
    ({'lora.targets': ()}, 'name a matrix'),
    ({'optimizer.name': 'muon'}, 'set --config.optimizer.name=adamw'),
    ({'train.ema_decay': 0.9}, 'set --config.train.ema_decay=0'),
  ],
)
def test_settings_without_effect_are_refused(config, changes, message):
  other = config.copy_and_resolve_references()
  other.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    config_lib.validate(other)
