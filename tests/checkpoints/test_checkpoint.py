"""What is saved comes back bit for bit, on any mesh, or not at all."""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import re
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maskdiff.checkpoints import checkpoint, manifest
from maskdiff.checkpoints import restore as restore_lib
from maskdiff.checkpoints.checkpoint import Checkpointer, SaveError
from maskdiff.checkpoints.manifest import Damaged, Meta
from maskdiff.distributed import mesh
from maskdiff.errors import UserError
from maskdiff.model import transformer
from maskdiff.model.transformer import TransformerConfig
from maskdiff.training import optimizer, step
from maskdiff.training.optimizer import OptimizerConfig

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
  transformer.axes(MODEL),
)
MESHES = {
  'fsdp8': dict(fsdp=8),
  'all_axes': dict(replica=2, fsdp=2, sequence=1, tensor=2),
  'one_device': dict(fsdp=1),
}
ITEMS = ('params', 'opt_state', 'guard')
META = Meta(samples=48, data={'seed': 3, 'rows': 'ab', 'list': [1, [2.5]]})


def make_mesh(name):
  sizes = MESHES[name]
  number = int(np.prod(list(sizes.values())))
  return mesh.make_mesh(**sizes, devices=jax.devices()[:number])


def shapes():
  init = functools.partial(step.init_state, MODEL, OPTIMIZER)
  return jax.eval_shape(init, jax.random.key(0))


def targets(mesh_name):
  shardings = step.state_shardings(MODEL, OPTIMIZER, make_mesh(mesh_name))
  return restore_lib.targets(shapes(), shardings)


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


def items_of(state):
  """The parts of a TrainState, or of targets, that are saved."""
  return {name: getattr(state, name) for name in ITEMS}


def save(directory, state, *numbers, keep=2, keep_every=0, meta=META):
  checkpointer = Checkpointer(directory, keep, keep_every)
  for number in numbers or (3,):
    checkpointer.save(number, items_of(state), meta)
  checkpointer.close()


def restore(directory, wanted, number=3):
  """The items of a step by name."""
  checkpointer = Checkpointer(directory, keep=None, read_only=True)
  meta = checkpointer.read_meta(number)
  trees = checkpointer.restore(number, meta, **wanted)
  checkpointer.close()
  return dict(zip(wanted, trees, strict=True))


def restore_newest(directory, wanted, **kwargs):
  """The newest whole step, its meta, its items by name; or None."""
  checkpointer = Checkpointer(directory, keep=2, **kwargs)
  with contextlib.closing(checkpointer):
    found = restore_lib.newest(checkpointer, lambda step, meta: wanted)
  return found and (*found[:2], dict(zip(wanted, found[2], strict=True)))


@pytest.fixture(autouse=True)
def no_second_try(monkeypatch):
  monkeypatch.setattr(checkpoint, '_RETRY_S', 0)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A directory and the state that was saved in it, at step 3."""
  directory = tmp_path_factory.mktemp('run') / 'checkpoints'
  state = make_state()
  save(directory, state)
  return directory, state


def small(value):
  """Items that are saved in no time."""
  x = jnp.arange(2000, dtype=jnp.float32) + value
  return {'params': {'w': x, 'b': x[:3]}, 'guard': {'seen': jnp.int32(value)}}


def small_targets():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    small(0),
  )


@pytest.fixture(scope='module')
def three_steps(tmp_path_factory):
  directory = tmp_path_factory.mktemp('three') / 'checkpoints'
  checkpointer = Checkpointer(directory, keep=None)
  for number in (10, 20, 30):
    checkpointer.save(number, small(number), Meta(samples=number))
  checkpointer.close()
  return directory


@pytest.fixture
def steps(three_steps, tmp_path):
  """A directory with steps 10, 20 and 30, to be damaged."""
  return shutil.copytree(three_steps, tmp_path / 'checkpoints')


def names(directory):
  return {path.name for path in pathlib.Path(directory).iterdir()}


def tree_of_files(directory):
  """All files below with their contents."""
  return {
    path.relative_to(directory): path.is_file() and path.read_bytes()
    for path in pathlib.Path(directory).rglob('*')
  }


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# There and back


@pytest.mark.parametrize('mesh_name', MESHES)
def test_a_state_comes_back_bit_for_bit_on_any_mesh(saved, mesh_name):
  directory, state = saved
  wanted = items_of(targets(mesh_name))
  trees = restore(directory, wanted)
  assert_same_bits(trees, items_of(state))
  for x, y in zip(jax.tree.leaves(trees), jax.tree.leaves(wanted), strict=True):
    assert x.sharding == y.sharding


@pytest.mark.parametrize('source', ['all_axes', 'one_device'])
def test_a_state_of_any_mesh_comes_back_on_eight_devices(tmp_path, source):
  state = make_state(source, seed=1)
  save(tmp_path, state)
  trees = restore(tmp_path, items_of(targets('fsdp8')))
  assert_same_bits(trees, items_of(state))


def test_parameters_are_restored_without_the_optimizer_state(saved):
  directory, state = saved
  checkpointer = restore_lib.open_run(directory.parent)
  wanted = {'params': targets('all_axes').params}
  number, meta, (params,) = restore_lib.newest(
    checkpointer, lambda step, meta: wanted
  )
  checkpointer.close()
  assert number == checkpointer.durable_step == 3
  assert_same_bits(params, state.params)
  assert dataclasses.replace(meta, leaves=None) == META


def test_what_is_saved_is_what_the_state_was(tmp_path):
  """Saving goes on in the background while the next step reuses the memory."""
  state = make_state()
  kept = jax.tree.map(np.array, items_of(state))
  checkpointer = Checkpointer(tmp_path, 2)
  checkpointer.save(3, items_of(state), META)
  overwrite = jax.jit(
    lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0
  )
  overwrite(items_of(state))
  checkpointer.close()
  trees = restore(tmp_path, items_of(targets('fsdp8')))
  assert_same_bits(trees, kept)


def test_names_on_disk_are_plain(saved):
  directory, state = saved
  metadata = json.loads((directory / '3' / 'params' / '_METADATA').read_text())
  on_disk = {
    '/'.join(key['key'] for key in entry['key_metadata'])
    for entry in metadata['tree_metadata'].values()
  }
  assert on_disk == set(manifest.flat(state.params))
  assert {'embed', 'norm', 'blocks/q', 'blocks/down'} < on_disk


def test_plain_orbax_reads_the_parameters(saved):
  directory, state = saved
  with ocp.StandardCheckpointer() as reader:
    params = reader.restore(directory / '3' / 'params')
  assert_same_bits(params, state.params)


def test_the_manifest_names_every_array(saved):
  directory, state = saved
  meta = json.loads((directory / '3' / 'meta' / 'metadata').read_text())
  leaves = manifest.flat(items_of(state))
  assert set(meta['leaves']) == set(leaves)
  assert 'opt_state/1/mu/blocks/q' in leaves
  for name, leaf in leaves.items():
    assert meta['leaves'][name]['shape'] == list(leaf.shape)
    assert meta['leaves'][name]['dtype'] == leaf.dtype
  numbers = {leaf['fingerprint'] for leaf in meta['leaves'].values()}
  assert len(numbers) == len(leaves)


# What is on disk, and what only seems to be


def test_a_step_is_durable_when_it_is_on_disk_and_not_before(
  tmp_path, monkeypatch
):
  checkpointer = Checkpointer(tmp_path, keep=2)
  assert checkpointer.durable_step is None
  assert checkpointer.finish() is None and checkpointer.poll() is None
  checkpointer.save(5, small(5), Meta())
  assert checkpointer.durable_step is None
  with monkeypatch.context() as m:
    m.setattr(checkpointer._manager, 'is_saving_in_progress', lambda: True)
    assert checkpointer.poll() is None
    assert checkpointer.durable_step is None
  assert checkpointer.finish() == 5
  assert checkpointer.durable_step == 5
  assert checkpointer.finish() is None
  checkpointer.save(6, small(6), Meta())
  while (step := checkpointer.poll()) is None:
    assert checkpointer.durable_step == 5
  assert step == checkpointer.durable_step == 6
  checkpointer.close()


def test_the_latest_and_every_so_many_steps_are_kept(tmp_path):
  checkpointer = Checkpointer(tmp_path, keep=2, keep_every=4)
  for number in range(1, 12):
    checkpointer.save(number, small(number), Meta())
  checkpointer.close()
  assert names(tmp_path) == {'4', '8', '10', '11'}
  assert checkpointer.steps() == [4, 8, 10, 11]


def test_steps_are_in_the_order_of_numbers(tmp_path):
  for name in ('9', '10', '100', 'x', '12.orbax-checkpoint-tmp'):
    (tmp_path / name).mkdir()
  checkpointer = Checkpointer(tmp_path, keep=2, read_only=True)
  assert checkpointer.steps() == [9, 10, 100]
  checkpointer.close()


def test_the_half_step_of_a_killed_run_is_cleared_away(tmp_path):
  """It is no step, and never was: there is nothing to fall back from."""
  half = tmp_path / '3.orbax-checkpoint-tmp'
  (half / 'params').mkdir(parents=True)
  checkpointer = Checkpointer(tmp_path, keep=2)
  found = restore_lib.newest(checkpointer, lambda step, meta: {})
  assert found is None
  checkpointer.save(2, small(2), Meta())
  assert checkpointer.finish() == 2
  checkpointer.close()
  assert names(tmp_path) == {'2'}


def test_nothing_is_saved_silently_beside_a_later_step(steps):
  checkpointer = Checkpointer(steps, keep=None)
  before = tree_of_files(steps)
  with pytest.raises(RuntimeError, match=r'step 15 was not saved.*10, 20, 30'):
    checkpointer.save(15, small(15), Meta())
  with pytest.raises((RuntimeError, SaveError)):
    checkpointer.save(30, small(15), Meta())
  assert checkpointer.finish() is None
  checkpointer.close()
  assert tree_of_files(steps) == before


@pytest.fixture
def file_limit():
  """A function after which no file may become larger; as on a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def whole(directory):
  """Names of steps; after an error some writers may not have ended yet."""
  return {n for n in names(directory) if 'orbax-checkpoint-tmp' not in n}


@pytest.mark.parametrize('limit', [0, 2000])
def test_a_full_disk_is_an_error_and_the_old_step_stays(
  tmp_path, file_limit, limit
):
  checkpointer = Checkpointer(tmp_path, keep=1)
  checkpointer.save(1, small(1), Meta())
  assert checkpointer.finish() == 1
  unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
  for number in (2, 3):
    file_limit(limit)
    with pytest.raises(SaveError, match=f'step {number} is not saved') as error:
      checkpointer.save(number, small(number), Meta())
      checkpointer.finish()
    assert error.value.step == number
    assert '\n' not in str(error.value) and len(str(error.value)) < 400
    file_limit(unlimited)
    assert checkpointer.durable_step == 1
    assert whole(tmp_path) == {'1'}
    assert_same_bits(restore(tmp_path, small_targets(), 1), small(1))
  checkpointer.save(4, small(4), Meta())
  assert checkpointer.finish() == 4
  checkpointer.close()
  assert whole(tmp_path) == {'4'}


def test_an_error_in_the_background_names_its_step(tmp_path, monkeypatch):
  """Also if the next save finds it."""
  checkpointer = Checkpointer(tmp_path, keep=2)
  full = OSError(28, 'No space left on device')
  with monkeypatch.context() as m:
    m.setattr(manifest, 'make', lambda *args: (_ for _ in ()).throw(full))
    with pytest.raises(SaveError, match='make room') as error:
      checkpointer.save(1, small(1), Meta())  # may be quick enough to know
      checkpointer.save(2, small(2), Meta())
  assert error.value.step == 1
  checkpointer.save(2, small(2), Meta())
  assert checkpointer.finish() == 2
  checkpointer.close()
  assert whole(tmp_path) == {'2'}


def test_a_step_that_vanishes_is_not_durable(tmp_path):
  checkpointer = Checkpointer(tmp_path, keep=2)
  checkpointer.save(1, small(1), Meta())
  checkpointer._manager.wait_until_finished()
  shutil.rmtree(tmp_path / '1')
  with pytest.raises(SaveError, match='not in the directory'):
    checkpointer.finish()
  assert checkpointer.durable_step is None
  checkpointer.close()


def test_close_raises_if_the_last_step_is_not_saved(tmp_path, monkeypatch):
  checkpointer = Checkpointer(tmp_path, keep=2)
  full = OSError(28, 'No space left on device')
  monkeypatch.setattr(
    manifest, 'make', lambda *args: (_ for _ in ()).throw(full)
  )
  checkpointer.save(1, small(1), Meta())
  with pytest.raises(SaveError):
    checkpointer.close()


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  path = tmp_path / 'file' / 'checkpoints'
  with pytest.raises(UserError, match=f'cannot use {path} for checkpoints'):
    Checkpointer(path, keep=2)


# Damage


def biggest_file(directory):
  files = [path for path in directory.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def flip(path, at, bit=0):
  content = bytearray(path.read_bytes())
  content[int(at * (len(content) - 1))] ^= 1 << bit
  path.write_bytes(content)


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def edit_meta(step, old, new):
  path = step / 'meta' / 'metadata'
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))


def empty(step):
  shutil.rmtree(step)
  step.mkdir()


BITS = 'bits of params/w have changed'
UNREADABLE = 'cannot be read'
DAMAGES = {
  **{
    f'a bit flipped at {at}': (
      lambda step, at=at: flip(biggest_file(step / 'params'), at, bit=3),
      f'{BITS}|{UNREADABLE}',
    )
    for at in (0.01, 0.2, 0.4, 0.5, 0.7, 0.8)
  },
  'a file cut short': (
    lambda step: truncate(biggest_file(step / 'params')),
    UNREADABLE,
  ),
  'no data file': (
    lambda step: biggest_file(step / 'params').unlink(),
    UNREADABLE,
  ),
  'no manifest.ocdbt': (
    lambda step: (step / 'params' / 'manifest.ocdbt').unlink(),
    UNREADABLE,
  ),
  'no params': (lambda step: shutil.rmtree(step / 'params'), UNREADABLE),
  'no guard': (lambda step: shutil.rmtree(step / 'guard'), UNREADABLE),
  'no meta': (lambda step: shutil.rmtree(step / 'meta'), 'meta cannot be read'),
  'half a meta': (
    lambda step: truncate(step / 'meta' / 'metadata'),
    'meta cannot be read',
  ),
  'meta with another position': (
    lambda step: edit_meta(step, '"samples": 30', '"samples": 31'),
    'meta differs from what was written',
  ),
  'meta with another version': (
    lambda step: edit_meta(step, '"format_version": 2', '"format_version": 3'),
    'meta differs from what was written',
  ),
  'meta without a digest': (
    lambda step: edit_meta(step, '"digest"', '"dijest"'),
    'meta differs from what was written',
  ),
  'meta that is a list': (
    lambda step: (step / 'meta' / 'metadata').write_text('[]'),
    'meta differs from what was written',
  ),
  'nothing in it': (empty, 'meta cannot be read'),
  'a mark of another process': (
    lambda step: (step / 'damaged.txt').write_text('disk of host 3\n'),
    'disk of host 3',
  ),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_step_is_set_aside_and_the_one_before_used(
  steps, capsys, damage
):
  hurt, reason = DAMAGES[damage]
  hurt(steps / '30')
  damaged = tree_of_files(steps / '30')
  number, meta, trees = restore_newest(steps, small_targets())
  assert (number, meta.samples) == (20, 20)
  assert_same_bits(trees, small(20))
  aside = steps.parent / 'checkpoints.aside' / '30'
  assert names(steps) == {'10', '20'}
  assert tree_of_files(aside) == damaged
  (line,) = capsys.readouterr().err.splitlines()
  assert str(steps / '30') in line and f'moved to {aside}' in line
  assert re.search(reason, line)


def test_two_damaged_steps_are_passed_one_after_the_other(steps, capsys):
  truncate(biggest_file(steps / '30' / 'guard'))
  flip(biggest_file(steps / '20' / 'params'), 0.5)
  number, _, trees = restore_newest(steps, small_targets())
  assert number == 10
  assert_same_bits(trees, small(10))
  assert names(steps.parent / 'checkpoints.aside') == {'20', '30'}
  assert len(capsys.readouterr().err.splitlines()) == 2


def test_any_damage_to_any_file_is_found_or_does_not_matter(steps):
  """Bit flips, cuts and losses all over a step; what comes back is right."""
  random = np.random.default_rng(0)
  files = sorted(p for p in (steps / '30').rglob('*') if p.is_file())
  checkpointer = Checkpointer(steps, keep=None, read_only=True)
  found = 0
  for path in files:
    content = path.read_bytes()
    flips = [flip] * 3 if content else []
    for hurt in (*flips, truncate, pathlib.Path.unlink):
      at = (random.random(), random.integers(8)) if hurt is flip else ()
      hurt(path, *at)
      try:
        meta = checkpointer.read_meta(30)
        wanted = small_targets()
        trees = checkpointer.restore(30, meta, **wanted)
      except Damaged:
        found += 1
      else:
        assert_same_bits(dict(zip(wanted, trees, strict=True)), small(30))
        assert meta.samples == 30
      path.write_bytes(content)
  checkpointer.close()
  assert found > len(files)


def test_a_damaged_step_is_read_a_second_time_before_it_is_given_up(
  steps, monkeypatch
):
  """Mounted buckets fail in passing."""
  checkpointer = Checkpointer(steps, keep=None)
  real, calls = checkpointer._manager.restore, []

  def flaky(*args, **kwargs):
    calls.append(args)
    if len(calls) == 1:
      raise OSError(5, 'Input/output error')
    return real(*args, **kwargs)

  monkeypatch.setattr(checkpointer._manager, 'restore', flaky)
  number, _, _ = restore_lib.newest(
    checkpointer, lambda step, meta: small_targets()
  )
  checkpointer.close()
  assert number == 30 and len(calls) == 2
  assert not (steps.parent / 'checkpoints.aside').exists()


def test_too_little_memory_is_no_damage(steps, monkeypatch):
  checkpointer = Checkpointer(steps, keep=None)

  def fail(*args, **kwargs):
    raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating')

  monkeypatch.setattr(checkpointer._manager, 'restore', fail)
  with pytest.raises(RuntimeError, match='Out of memory'):
    restore_lib.newest(checkpointer, lambda step, meta: small_targets())
  checkpointer.close()
  assert names(steps) == {'10', '20', '30'}


def test_a_run_never_starts_from_scratch_where_there_were_steps(steps):
  for number in ('10', '20', '30'):
    flip(biggest_file(steps / number / 'params'), 0.5)
  with pytest.raises(
    UserError, match='all checkpoints in .* are damaged'
  ) as error:
    restore_newest(steps, small_targets())
  for part in ('10: ', '20: ', '30: ', BITS, 'another --workdir'):
    assert part in str(error.value)
  assert '\n' not in str(error.value)
  assert names(steps) == set()
  for _ in range(2):  # nor at the next start
    with pytest.raises(UserError, match='checkpoints.aside has 10, 20, 30'):
      restore_newest(steps, small_targets())
  shutil.rmtree(steps)
  with pytest.raises(UserError, match='checkpoints.aside has 10, 20, 30'):
    restore_newest(steps, small_targets())


def test_a_new_directory_has_nothing_to_restore(tmp_path):
  path = tmp_path / 'run' / 'checkpoints'
  assert restore_newest(path, small_targets()) is None
  assert path.is_dir()


def test_what_is_set_aside_is_never_overwritten(steps):
  checkpointer = Checkpointer(steps, keep=None)
  contents = []
  for name in ('30', '30-2', '30-3'):
    contents.append(tree_of_files(steps / '30'))
    aside = steps.parent / 'checkpoints.aside'
    assert checkpointer.move_aside(30) == str(aside / name)
    checkpointer.save(30, small(len(contents)), Meta())
    assert checkpointer.finish() == 30
  checkpointer.close()
  found = [tree_of_files(aside / name) for name in ('30', '30-2', '30-3')]
  assert found == contents


def test_a_run_goes_on_after_a_damaged_step(steps):
  """Orbax forgets it too, and saves that step again."""
  empty(steps / '30')
  checkpointer = Checkpointer(steps, keep=2)
  restore_lib.newest(checkpointer, lambda step, meta: small_targets())
  assert checkpointer.durable_step == 20
  checkpointer.save(30, small(7), Meta())
  assert checkpointer.finish() == 30
  checkpointer.close()
  assert_same_bits(restore(steps, small_targets(), 30), small(7))


def test_a_directory_that_cannot_be_moved_is_named(steps):
  empty(steps / '30')
  (steps.parent / 'checkpoints.aside').write_text('in the way')
  with pytest.raises(UserError, match=f'cannot move {steps}/30'):
    restore_newest(steps, small_targets())


# Readers


def test_a_reader_passes_over_damage_and_changes_nothing(steps, capsys):
  flip(biggest_file(steps / '30' / 'params'), 0.5)
  (steps / '40').mkdir()
  (steps / '50.orbax-checkpoint-tmp').mkdir()
  before = tree_of_files(steps.parent)
  checkpointer = restore_lib.open_run(steps.parent)
  number, _, _ = restore_lib.newest(
    checkpointer, lambda step, meta: small_targets()
  )
  checkpointer.close()
  assert number == 20
  assert tree_of_files(steps.parent) == before
  first, second = capsys.readouterr().err.splitlines()
  assert f'{steps}/40 is damaged and passed over' in first
  assert f'{steps}/30 is damaged and passed over' in second


def test_a_reader_of_nothing_whole_is_told_so(steps):
  for number in ('10', '20', '30'):
    empty(steps / number)
  for _ in range(2):
    with pytest.raises(UserError, match='all checkpoints in .* are damaged'):
      restore_newest(steps, small_targets(), read_only=True)
  assert names(steps) == {'10', '20', '30'}


def test_a_reader_never_saves(steps):
  before = tree_of_files(steps)
  checkpointer = Checkpointer(steps, keep=None, read_only=True)
  with pytest.raises(RuntimeError, match='step 40 was not saved'):
    checkpointer.save(40, small(40), Meta())
  checkpointer.close()
  assert tree_of_files(steps) == before


def test_no_checkpoint_names_the_command_that_makes_one(tmp_path):
  with pytest.raises(
    UserError, match=f'launch/pretrain.py.* --workdir {tmp_path}'
  ):
    restore_lib.open_run(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(UserError, match='saved no checkpoint yet'):
    restore_lib.open_run(tmp_path)


# Misfits


def with_shape(x, *shape):
  return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)


def with_dtype(x, dtype):
  return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)


MISFITS = {
  'another shape': (
    lambda p: {**p, 'embed': with_shape(p['embed'], 32, 64)},
    r'has float32\[32, 16\] for params/embed, '
    r'but the config needs float32\[32, 64\]',
  ),
  'another dtype': (
    lambda p: {**p, 'norm': with_dtype(p['norm'], jnp.bfloat16)},
    r'has float32\[16\] for params/norm, but the config needs bfloat16\[16\]',
  ),
  'a parameter more': (
    lambda p: {**p, 'bias': p['norm']},
    r'has none for params/bias, but the config needs float32\[16\]',
  ),
  'a parameter less': (
    lambda p: {k: v for k, v in p.items() if k != 'head'},
    r'has float32\[16, 32\] for params/head, but the config needs none',
  ),
}


@pytest.mark.parametrize('misfit', MISFITS)
def test_another_model_is_refused_by_the_name_of_the_array(
  saved, misfit, capsys
):
  """And is no damage: the step stays where it is."""
  directory, _ = saved
  change, message = MISFITS[misfit]
  wanted = {'params': change(targets('fsdp8').params)}
  with pytest.raises(
    UserError, match=f'{directory}/3 does not fit this config: it {message}'
  ) as error:
    restore_newest(directory, wanted)
  assert '\n' not in str(error.value)
  assert names(directory) == {'3'}
  assert names(directory.parent) == {'checkpoints'}


def test_a_config_that_does_not_fit_moves_nothing(steps):
  def refuse(step, meta):
    raise UserError(f'step {step} saw {meta.samples} other samples')

  checkpointer = Checkpointer(steps, keep=None)
  with pytest.raises(UserError, match='step 30 saw 30 other samples'):
    restore_lib.newest(checkpointer, refuse)
  checkpointer.close()
  assert names(steps) == {'10', '20', '30'}


@pytest.mark.parametrize('version', [1, 99])
def test_another_format_is_refused_and_is_no_damage(
  steps, monkeypatch, version
):
  monkeypatch.setattr(manifest, 'FORMAT_VERSION', version)
  checkpointer = Checkpointer(steps, keep=None)
  checkpointer.save(40, small(40), Meta())
  checkpointer.close()
  monkeypatch.undo()
  if version == 1:  # which had no digest
    path = steps / '40' / 'meta' / 'metadata'
    path.write_text(json.dumps({'format_version': 1, 'samples': 40}))
  with pytest.raises(
    UserError,
    match=f'{steps}/40 has checkpoint format {version}; .* reads format 2',
  ):
    restore_newest(steps, small_targets())
  assert names(steps) == {'10', '20', '30', '40'}


def test_tuples_and_dicts_are_the_same_on_disk(tmp_path):
  """A step is not taken for damaged because optax renamed a class."""
  x = jnp.arange(4.0)
  checkpointer = Checkpointer(tmp_path, keep=2)
  checkpointer.save(1, {'opt_state': ((), (x, {'a': x + 1}), None)}, Meta())
  checkpointer.finish()
  meta = checkpointer.read_meta(1)
  like = jax.ShapeDtypeStruct((4,), x.dtype, sharding=x.sharding)
  for wanted in (
    {'1': {'0': like, '1': {'a': like}}},
    ((), [like, {'a': like}]),
  ):
    (tree,) = checkpointer.restore(1, meta, opt_state=wanted)
    assert jax.tree.structure(tree) == jax.tree.structure(wanted)
    assert_same_bits(jax.tree.leaves(tree), [x, x + 1])
  checkpointer.close()


# Rolled back


def test_a_run_goes_on_from_where_it_was_rolled_back_to(steps):
  checkpointer = Checkpointer(steps, keep=None)
  assert restore_lib.roll_back(checkpointer, 10) == [20, 30]
  assert names(steps) == {'10'}
  assert names(steps.parent / 'checkpoints.aside') == {'20', '30'}
  number, _, _ = restore_lib.newest(
    checkpointer, lambda step, meta: small_targets()
  )
  assert number == 10
  checkpointer.save(15, small(15), Meta())
  assert checkpointer.finish() == 15
  checkpointer.close()
  assert_same_bits(restore(steps, small_targets(), 15), small(15))
  with ocp.CheckpointManager(steps) as fresh:
    assert fresh.latest_step() == 15


def test_only_a_step_that_is_there_can_be_rolled_back_to(steps):
  checkpointer = Checkpointer(steps, keep=None)
  with pytest.raises(UserError, match='has no step 15; it has 10, 20, 30'):
    restore_lib.roll_back(checkpointer, 15)
  assert restore_lib.roll_back(checkpointer, 30) == []
  checkpointer.close()
  assert names(steps) == {'10', '20', '30'}
