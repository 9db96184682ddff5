"""What is saved comes back bit for bit, on any mesh, under plain names."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff import checkpoint, mesh, model, optimizer, step
from maskdiff.checkpoint import Checkpointer
from maskdiff.errors import UserError
from maskdiff.model import TransformerConfig
from maskdiff.optimizer import OptimizerConfig

MODEL = TransformerConfig(
  vocab_size=32,
  embed=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_dim=4,
  mlp=24,
  tie_embeddings=False,
  rope_theta=1e4,
  norm_eps=1e-5,
  dtype='float32',
  remat='none',
  attention='xla',
)
OPTIMIZER = optimizer.make_optimizer(
  OptimizerConfig(
    schedule='wsd',
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    warmup_steps=2,
    decay_steps=2,
    pieces=(),
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    moments='float32',
  ),
  10,
  model.axes(MODEL),
)
MESHES = {
  'fsdp8': dict(fsdp=8),
  'all_axes': dict(replica=2, fsdp=2, sequence=1, tensor=2),
  'one_device': dict(fsdp=1),
}
META = {'samples': 48, 'data': {'seed': 3, 'rows': 'ab'}, 'list': [1, [2.5]]}


def make_mesh(name):
  sizes = MESHES[name]
  number = int(np.prod(list(sizes.values())))
  return mesh.make_mesh(**sizes, devices=jax.devices()[:number])


def shapes():
  init = functools.partial(step.init_state, MODEL, OPTIMIZER)
  return jax.eval_shape(init, jax.random.key(0))


def targets(mesh_name):
  shardings = step.state_shardings(MODEL, OPTIMIZER, make_mesh(mesh_name))
  return checkpoint.targets(shapes(), shardings)


def make_state(mesh_name='fsdp8', seed=0):
  """A TrainState full of noise, on a mesh."""
  random = np.random.default_rng(seed)

  def noise(x):
    if x.dtype == np.int32:
      values = random.integers(1 << 30, size=x.shape)
    else:
      values = random.normal(size=x.shape) * 10.0 ** random.integers(-30, 30)
    return jax.device_put(np.asarray(values, x.dtype), x.sharding)

  return jax.tree.map(noise, targets(mesh_name))


def save(directory, state, number=3, keep=2, meta=META):
  checkpointer = Checkpointer(directory, keep)
  checkpointer.save(number, state.params, state.opt_state, meta)
  checkpointer.close()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A directory and the state that was saved in it, at step 3."""
  directory = tmp_path_factory.mktemp('run') / 'checkpoints'
  state = make_state()
  save(directory, state)
  return directory, state


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize('mesh_name', MESHES)
def test_a_state_comes_back_bit_for_bit_on_any_mesh(saved, mesh_name):
  directory, state = saved
  wanted = targets(mesh_name)
  checkpointer = Checkpointer(directory, 2)
  params, opt_state = checkpointer.restore(
    3, params=wanted.params, opt_state=wanted.opt_state
  )
  checkpointer.close()
  assert_same_bits((params, opt_state), (state.params, state.opt_state))
  jax.tree.map(
    lambda x, y: x.sharding == y.sharding or pytest.fail(str(y)),
    (params, opt_state),
    (wanted.params, wanted.opt_state),
  )


@pytest.mark.parametrize('source', ['all_axes', 'one_device'])
def test_a_state_of_any_mesh_comes_back_on_eight_devices(tmp_path, source):
  state, wanted = make_state(source, seed=1), targets('fsdp8')
  save(tmp_path, state)
  checkpointer = Checkpointer(tmp_path, 2)
  params, opt_state = checkpointer.restore(
    3, params=wanted.params, opt_state=wanted.opt_state
  )
  checkpointer.close()
  assert_same_bits((params, opt_state), (state.params, state.opt_state))


def test_parameters_are_restored_without_the_optimizer_state(saved):
  directory, state = saved
  checkpointer, number, meta = checkpoint.open_latest(directory.parent)
  (params,) = checkpointer.restore(number, params=targets('all_axes').params)
  checkpointer.close()
  assert number == 3
  assert_same_bits(params, state.params)
  assert {key: meta[key] for key in META} == META


def test_what_is_saved_is_what_the_state_was(tmp_path):
  """Saving goes on in the background while the next step reuses the memory."""
  state = make_state()
  kept = jax.tree.map(np.array, state)
  checkpointer = Checkpointer(tmp_path, 2)
  checkpointer.save(1, state.params, state.opt_state, META)
  overwrite = jax.jit(
    lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0
  )
  overwrite((state.params, state.opt_state))
  checkpointer.close()
  checkpointer = Checkpointer(tmp_path, 2)
  (params,) = checkpointer.restore(1, params=targets('fsdp8').params)
  checkpointer.close()
  assert_same_bits(params, kept.params)


def test_names_on_disk_are_plain(saved):
  directory, state = saved
  metadata = json.loads((directory / '3' / 'params' / '_METADATA').read_text())
  names = {
    '/'.join(key['key'] for key in entry['key_metadata'])
    for entry in metadata['tree_metadata'].values()
  }
  paths = jax.tree_util.tree_leaves_with_path(state.params)
  assert names == {
    jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in paths
  }
  assert {'embed', 'norm', 'blocks/q', 'blocks/down'} < names


def test_the_latest_steps_are_kept(tmp_path):
  state = make_state()
  checkpointer = Checkpointer(tmp_path, keep=2)
  for number in (2, 4, 6, 8):
    checkpointer.save(number, state.params, state.opt_state, META)
  checkpointer.close()
  steps = {path.name for path in pathlib.Path(tmp_path).iterdir()}
  assert steps == {'6', '8'}
  checkpointer = Checkpointer(tmp_path, keep=2)
  assert checkpointer.latest_step() == 8
  checkpointer.close()


def test_a_step_is_saved_once_and_none_before_the_latest(tmp_path):
  first, other = make_state(), make_state(seed=1)
  checkpointer = Checkpointer(tmp_path, keep=2)
  checkpointer.save(4, first.params, first.opt_state, META)
  checkpointer.save(4, other.params, other.opt_state, META)
  with pytest.raises(RuntimeError, match='step 2 was not saved'):
    checkpointer.save(2, first.params, first.opt_state, META)
  (params,) = checkpointer.restore(4, params=targets('fsdp8').params)
  checkpointer.close()
  assert_same_bits(params, first.params)


def wider(x):
  return jax.ShapeDtypeStruct((*x.shape[:-1], 64), x.dtype, sharding=x.sharding)


MISFITS = {
  'another shape': lambda p: {**p, 'embed': wider(p['embed'])},
  'a parameter more': lambda p: {**p, 'bias': p['norm']},
  'a parameter less': lambda p: {k: v for k, v in p.items() if k != 'head'},
}


@pytest.mark.parametrize('misfit', MISFITS)
def test_another_model_is_refused_by_the_name_of_the_step(saved, misfit):
  directory, _ = saved
  wanted = MISFITS[misfit](targets('fsdp8').params)
  checkpointer = Checkpointer(directory, 2)
  with pytest.raises(UserError, match=f'{directory}/3 does not fit') as error:
    checkpointer.restore(3, params=wanted)
  checkpointer.close()
  assert '\n' not in str(error.value)


def test_another_format_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, 'FORMAT_VERSION', 99)
  save(tmp_path / 'checkpoints', make_state())
  monkeypatch.undo()
  with pytest.raises(UserError, match='checkpoints/3 has checkpoint format 99'):
    checkpoint.open_latest(tmp_path)


def test_no_checkpoint_names_the_command_that_makes_one(tmp_path):
  with pytest.raises(
    UserError, match=f'launch/pretrain.py.* --workdir {tmp_path}'
  ):
    checkpoint.open_latest(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(UserError, match='saved no checkpoint yet'):
    checkpoint.open_latest(tmp_path)
