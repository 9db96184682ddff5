"""A checkpoint restores bit for bit on any mesh, or counts as damaged."""

import asyncio
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import pathlib
import re
import resource
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from maskdiff.checkpoints import checkpoint, manifest
from maskdiff.checkpoints import restore as restore_lib
from maskdiff.checkpoints.checkpoint import Checkpointer, SaveError
from maskdiff.checkpoints.manifest import Damaged, Meta
from maskdiff.distributed import mesh
from maskdiff.errors import UserError
from maskdiff.model import transformer
from maskdiff.training import optimizer, train_state
from maskdiff.training.optimizer import OptimizerConfig

MODEL = tiny.model(vocab_size=32, heads=4, kv_heads=2, head_dim=4)
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
IDENTITY = {'seed': 3, 'rows': 'ab', 'list': [1, [2.5]]}
META = Meta(stage='pretraining', position=48, identity=IDENTITY)


def make_mesh(name):
  sizes = MESHES[name]
  number = int(np.prod(list(sizes.values())))
  return mesh.make_mesh(**sizes, devices=jax.devices()[:number])


def shapes():
  init = functools.partial(train_state.init, MODEL, OPTIMIZER)
  return jax.eval_shape(init, jax.random.key(0))


def targets(mesh_name):
  shardings = train_state.shardings(MODEL, OPTIMIZER, make_mesh(mesh_name))
  return restore_lib.targets(shapes(), shardings)


def make_state(mesh_name='fsdp8', seed=0):
  """Makes a TrainState of random values on a mesh."""
  random = np.random.default_rng(seed)

  def noise(x):
    if x.dtype == np.int32:
      values = random.integers(1 << 30, size=x.shape)
    else:
      values = random.normal(size=x.shape) * 10.0 ** random.integers(-30, 30)
    return jax.device_put(np.asarray(values, x.dtype), x.sharding)

  return jax.tree.map(noise, targets(mesh_name))


def items_of(state):
  """Returns the parts of a TrainState, or of targets, that are saved."""
  return {name: getattr(state, name) for name in ITEMS}


def save(directory, state, *numbers, keep=2, keep_every=0, meta=META):
  checkpointer = Checkpointer(directory, keep, keep_every)
  for number in numbers or (3,):
    checkpointer.save(number, items_of(state), meta)
  checkpointer.close()


def restore(directory, specs, number=3):
  """Restores the items of a step; returns them by name."""
  checkpointer = Checkpointer(directory, keep=None, read_only=True)
  meta = checkpointer.read_meta(number)
  trees = checkpointer.restore(number, meta, **specs)
  checkpointer.close()
  return dict(zip(specs, trees, strict=True))


def restore_newest(directory, specs, **kwargs):
  """Restores the newest undamaged step: (step, Meta, items by name) or None."""
  checkpointer = Checkpointer(directory, keep=2, **kwargs)
  with contextlib.closing(checkpointer):
    found = restore_lib.newest(checkpointer, lambda step, meta: specs)
  return found and (*found[:2], dict(zip(specs, found[2], strict=True)))


@pytest.fixture(autouse=True)
def no_wait_before_retry(monkeypatch):
  monkeypatch.setattr(checkpoint, '_RETRY_S', 0)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """A directory with a checkpoint of step 3, and the state saved in it."""
  directory = tmp_path_factory.mktemp('run') / 'checkpoints'
  state = make_state()
  save(directory, state)
  return directory, state


def small(value):
  """Items that are quick to save."""
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
    checkpointer.save(number, small(number), Meta(position=number))
  checkpointer.close()
  return directory


@pytest.fixture
def steps(three_steps, tmp_path):
  """A directory with steps 10, 20 and 30, to be damaged."""
  return shutil.copytree(three_steps, tmp_path / 'checkpoints')


def names(directory):
  return {path.name for path in pathlib.Path(directory).iterdir()}


def tree_of_files(directory):
  """Returns the contents of all files below a directory, by path."""
  return {
    path.relative_to(directory): path.is_file() and path.read_bytes()
    for path in pathlib.Path(directory).rglob('*')
  }


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


# Save and restore


@pytest.mark.parametrize('mesh_name', MESHES)
def test_restore_is_bitwise_exact_on_any_mesh(saved, mesh_name):
  directory, state = saved
  specs = items_of(targets(mesh_name))
  trees = restore(directory, specs)
  assert_same_bits(trees, items_of(state))
  for x, y in zip(jax.tree.leaves(trees), jax.tree.leaves(specs), strict=True):
    assert x.sharding == y.sharding


@pytest.mark.parametrize('source', ['all_axes', 'one_device'])
def test_state_of_any_mesh_restores_on_eight_devices(tmp_path, source):
  state = make_state(source, seed=1)
  save(tmp_path, state)
  trees = restore(tmp_path, items_of(targets('fsdp8')))
  assert_same_bits(trees, items_of(state))


def test_parameters_restore_without_optimizer_state(saved):
  directory, state = saved
  checkpointer = restore_lib.open_run(directory.parent)
  specs = {'params': targets('all_axes').params}
  number, meta, (params,) = restore_lib.newest(
    checkpointer, lambda step, meta: specs
  )
  checkpointer.close()
  assert number == checkpointer.durable_step == 3
  assert_same_bits(params, state.params)
  assert dataclasses.replace(meta, leaves=None) == META


def test_donation_after_save_does_not_change_the_checkpoint(tmp_path):
  """The save continues in the background while a step reuses the memory."""
  state = make_state()
  before = jax.tree.map(np.array, items_of(state))
  checkpointer = Checkpointer(tmp_path, 2)
  checkpointer.save(3, items_of(state), META)
  overwrite = jax.jit(
    lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0
  )
  overwrite(items_of(state))
  checkpointer.close()
  trees = restore(tmp_path, items_of(targets('fsdp8')))
  assert_same_bits(trees, before)


def test_names_on_disk_are_parameter_paths(saved):
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


def test_manifest_lists_every_array(saved):
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


def test_meta_on_disk_has_only_the_recorded_keys(tmp_path):
  """`read` inverts `make`."""
  training = Meta({'seed': 0}, 'toy', {}, 0, False)
  names = ['config', 'stage', 'identity', 'position', 'evaluation_due']
  converted = Meta(config={'seed': 0})
  for meta, keys in [(training, names), (converted, ['config']), (Meta(), [])]:
    values = manifest.make(meta, {}, {})
    assert list(values) == ['format_version', *keys, 'leaves', 'digest']
    (tmp_path / 'metadata').write_text(json.dumps(values))
    found = manifest.read(tmp_path / 'metadata')
    assert found == dataclasses.replace(meta, leaves={})


def test_meta_of_format_2_is_of_pretraining(tmp_path, monkeypatch):
  """The number of samples is the position, the data are the identity."""
  values = {'format_version': 2, 'samples': 64, 'data': {'seed': 3}}
  values |= {'config': {}, 'evaluation_due': True, 'leaves': {}}
  values['digest'] = manifest.json_digest(values)
  (tmp_path / 'metadata').write_text(json.dumps(values))
  found = manifest.read(tmp_path / 'metadata')
  assert found == Meta({}, 'pretraining', {'seed': 3}, 64, True, {})
  (tmp_path / 'metadata').write_text(json.dumps(values | {'samples': 65}))
  with pytest.raises(Damaged, match='differs from what was written'):
    manifest.read(tmp_path / 'metadata')


# Durability


def test_step_is_durable_only_once_on_disk(tmp_path, monkeypatch):
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


def test_latest_steps_and_multiples_are_kept(tmp_path):
  checkpointer = Checkpointer(tmp_path, keep=2, keep_every=4)
  for number in range(1, 12):
    checkpointer.save(number, small(number), Meta())
  checkpointer.close()
  assert names(tmp_path) == {'4', '8', '10', '11'}
  assert checkpointer.steps() == [4, 8, 10, 11]


def test_steps_are_sorted_by_number(tmp_path):
  for name in ('9', '10', '100', 'x', '12.orbax-checkpoint-tmp'):
    (tmp_path / name).mkdir()
  checkpointer = Checkpointer(tmp_path, keep=2, read_only=True)
  assert checkpointer.steps() == [9, 10, 100]
  checkpointer.close()


def test_partial_step_of_a_killed_run_is_removed(tmp_path):
  """A partial step does not count as damaged."""
  half = tmp_path / '3.orbax-checkpoint-tmp'
  (half / 'params').mkdir(parents=True)
  checkpointer = Checkpointer(tmp_path, keep=2)
  found = restore_lib.newest(checkpointer, lambda step, meta: {})
  assert found is None
  checkpointer.save(2, small(2), Meta())
  assert checkpointer.finish() == 2
  checkpointer.close()
  assert names(tmp_path) == {'2'}


def test_saving_before_a_later_step_raises(steps):
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
  """Returns a function that limits the size of files, like a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def complete_steps(directory):
  """Names of complete steps; failed writers may still leave temporaries."""
  return {n for n in names(directory) if 'orbax-checkpoint-tmp' not in n}


@pytest.mark.parametrize('limit', [0, 2000])
def test_full_disk_raises_and_keeps_the_old_step(tmp_path, file_limit, limit):
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
    assert complete_steps(tmp_path) == {'1'}
    assert_same_bits(restore(tmp_path, small_targets(), 1), small(1))
  checkpointer.save(4, small(4), Meta())
  assert checkpointer.finish() == 4
  checkpointer.close()
  assert complete_steps(tmp_path) == {'4'}


def closed_loop_error():
  """Returns the error of TensorStore when a write ends after a failed save."""
  loop = asyncio.new_event_loop()
  loop.close()
  try:
    loop.call_soon_threadsafe(print)
  except RuntimeError as error:
    # TensorStore is not written in Python: no frame called asyncio.
    return error.with_traceback(error.__traceback__.tb_next)


def test_late_writes_of_a_failed_save_are_silent(tmp_path, monkeypatch):
  reports, late = [], closed_loop_error()
  monkeypatch.setattr(sys, 'unraisablehook', reports.append)
  for _ in range(2):  # the second Checkpointer must not wrap the hook again
    Checkpointer(tmp_path, keep=1).close()
  report = lambda error: sys.unraisablehook(
    types.SimpleNamespace(
      exc_type=type(error),
      exc_value=error,
      exc_traceback=error.__traceback__,
      object=None,
    )
  )
  report(late)
  assert not reports
  for other in (KeyError('a'), RuntimeError('Event loop is closed')):
    report(other)
    assert reports.pop().exc_value is other


def test_errors_of_orbax_are_not_logged_as_well(tmp_path, caplog):
  """Also those of futures that nobody waits for."""
  Checkpointer(tmp_path, keep=1).close()
  code = compile('1 / 0', '/lib/orbax/checkpoint/_src/path/a.py', 'exec')
  for source, expected in ((code, 0), (compile('1 / 0', 'b.py', 'exec'), 1)):
    try:
      exec(source)
    except ZeroDivisionError as error:
      logging.getLogger('asyncio').error('never retrieved', exc_info=error)
    assert len(caplog.records) == expected


@pytest.mark.parametrize('error', ['ENOENT', 'ESTALE', 'EIO'])
def test_directory_out_of_reach_is_a_failed_save(tmp_path, monkeypatch, error):
  checkpointer = Checkpointer(tmp_path, keep=2)
  checkpointer.save(1, small(1), Meta())
  checkpointer._manager.wait_until_finished()
  number = getattr(errno, error)

  def fail(path):
    raise OSError(number, os.strerror(number))

  with monkeypatch.context() as patch:
    patch.setattr(os, 'listdir', fail)
    with pytest.raises(SaveError, match=os.strerror(number)):
      checkpointer.finish()
  checkpointer.save(2, small(2), Meta())
  assert checkpointer.finish() == 2
  checkpointer.close()


def test_background_error_names_its_step(tmp_path, monkeypatch):
  """The background save or the next save raises the error."""
  checkpointer = Checkpointer(tmp_path, keep=2)
  full = OSError(28, 'No space left on device')
  with monkeypatch.context() as m:
    m.setattr(manifest, 'make', lambda *args: (_ for _ in ()).throw(full))
    with pytest.raises(SaveError, match='make room') as error:
      checkpointer.save(1, small(1), Meta())  # may raise already
      checkpointer.save(2, small(2), Meta())
  assert error.value.step == 1
  checkpointer.save(2, small(2), Meta())
  assert checkpointer.finish() == 2
  checkpointer.close()
  assert complete_steps(tmp_path) == {'2'}


def test_vanished_step_is_not_durable(tmp_path):
  checkpointer = Checkpointer(tmp_path, keep=2)
  checkpointer.save(1, small(1), Meta())
  checkpointer._manager.wait_until_finished()
  shutil.rmtree(tmp_path / '1')
  with pytest.raises(SaveError, match='not in the directory'):
    checkpointer.finish()
  assert checkpointer.durable_step is None
  checkpointer.close()


def test_close_raises_if_the_last_save_failed(tmp_path, monkeypatch):
  checkpointer = Checkpointer(tmp_path, keep=2)
  full = OSError(28, 'No space left on device')
  monkeypatch.setattr(
    manifest, 'make', lambda *args: (_ for _ in ()).throw(full)
  )
  checkpointer.save(1, small(1), Meta())
  with pytest.raises(SaveError):
    checkpointer.close()


def test_error_names_a_directory_that_cannot_be_created(tmp_path):
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
    lambda step: edit_meta(step, '"position": 30', '"position": 31'),
    'meta differs from what was written',
  ),
  'meta with another version': (
    lambda step: edit_meta(step, '"format_version": 3', '"format_version": 2'),
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
def test_damaged_step_falls_back_to_the_previous_one(steps, capsys, damage):
  inflict, reason = DAMAGES[damage]
  inflict(steps / '30')
  damaged = tree_of_files(steps / '30')
  number, meta, trees = restore_newest(steps, small_targets())
  assert (number, meta.position) == (20, 20)
  assert_same_bits(trees, small(20))
  aside = steps.parent / 'checkpoints.aside' / '30'
  assert names(steps) == {'10', '20'}
  assert tree_of_files(aside) == damaged
  (line,) = capsys.readouterr().err.splitlines()
  assert str(steps / '30') in line and f'moved to {aside}' in line
  assert re.search(reason, line)


def test_two_damaged_steps_are_moved_aside(steps, capsys):
  truncate(biggest_file(steps / '30' / 'guard'))
  flip(biggest_file(steps / '20' / 'params'), 0.5)
  number, _, trees = restore_newest(steps, small_targets())
  assert number == 10
  assert_same_bits(trees, small(10))
  assert names(steps.parent / 'checkpoints.aside') == {'20', '30'}
  assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.slow
def test_any_damage_to_any_file_is_found_or_harmless(steps):
  """Flips bits in, truncates and deletes files of a step."""
  random = np.random.default_rng(0)
  files = sorted(p for p in (steps / '30').rglob('*') if p.is_file())
  checkpointer = Checkpointer(steps, keep=None, read_only=True)
  found = 0
  for path in files:
    content = path.read_bytes()
    flips = [flip] * 3 if content else []
    for inflict in (*flips, truncate, pathlib.Path.unlink):
      at = (random.random(), random.integers(8)) if inflict is flip else ()
      inflict(path, *at)
      try:
        meta = checkpointer.read_meta(30)
        specs = small_targets()
        trees = checkpointer.restore(30, meta, **specs)
      except Damaged:
        found += 1
      else:
        assert_same_bits(dict(zip(specs, trees, strict=True)), small(30))
        assert meta.position == 30
      path.write_bytes(content)
  checkpointer.close()
  assert found > len(files)


def test_failed_read_is_retried_once(steps, monkeypatch):
  """Mounted buckets have transient failures."""
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


def test_out_of_memory_is_not_damage(steps, monkeypatch):
  checkpointer = Checkpointer(steps, keep=None)

  def fail(*args, **kwargs):
    raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating')

  monkeypatch.setattr(checkpointer._manager, 'restore', fail)
  with pytest.raises(RuntimeError, match='Out of memory'):
    restore_lib.newest(checkpointer, lambda step, meta: small_targets())
  checkpointer.close()
  assert names(steps) == {'10', '20', '30'}


def test_damaged_run_never_restarts_from_scratch(steps):
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
  for _ in range(2):  # and at the next start
    with pytest.raises(UserError, match='checkpoints.aside has 10, 20, 30'):
      restore_newest(steps, small_targets())
  shutil.rmtree(steps)
  with pytest.raises(UserError, match='checkpoints.aside has 10, 20, 30'):
    restore_newest(steps, small_targets())


def test_new_directory_restores_nothing(tmp_path):
  path = tmp_path / 'run' / 'checkpoints'
  assert restore_newest(path, small_targets()) is None
  assert path.is_dir()


def test_moved_steps_are_never_overwritten(steps):
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


def test_damaged_step_can_be_saved_again(steps):
  """Orbax no longer knows the step that was moved aside."""
  empty(steps / '30')
  checkpointer = Checkpointer(steps, keep=2)
  restore_lib.newest(checkpointer, lambda step, meta: small_targets())
  assert checkpointer.durable_step == 20
  checkpointer.save(30, small(7), Meta())
  assert checkpointer.finish() == 30
  checkpointer.close()
  assert_same_bits(restore(steps, small_targets(), 30), small(7))


def test_error_names_a_step_that_cannot_be_moved(steps):
  empty(steps / '30')
  (steps.parent / 'checkpoints.aside').write_text('in the way')
  with pytest.raises(UserError, match=f'cannot move {steps}/30'):
    restore_newest(steps, small_targets())


# Read-only


def test_read_only_restore_skips_damaged_steps(steps, capsys):
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
  assert f'{steps}/40 is damaged and skipped' in first
  assert f'{steps}/30 is damaged and skipped' in second


def test_read_only_restore_fails_if_all_steps_are_damaged(steps):
  for number in ('10', '20', '30'):
    empty(steps / number)
  for _ in range(2):
    with pytest.raises(UserError, match='all checkpoints in .* are damaged'):
      restore_newest(steps, small_targets(), read_only=True)
  assert names(steps) == {'10', '20', '30'}


def test_read_only_checkpointer_never_saves(steps):
  before = tree_of_files(steps)
  checkpointer = Checkpointer(steps, keep=None, read_only=True)
  with pytest.raises(RuntimeError, match='step 40 was not saved'):
    checkpointer.save(40, small(40), Meta())
  checkpointer.close()
  assert tree_of_files(steps) == before


def test_missing_checkpoint_error_names_the_command(tmp_path):
  with pytest.raises(
    UserError, match=f'launch/pretrain.py.* --workdir {tmp_path}'
  ):
    restore_lib.open_run(tmp_path)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(UserError, match='saved no checkpoint yet'):
    restore_lib.open_run(tmp_path)


# Mismatches


def with_shape(x, *shape):
  return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)


def with_dtype(x, dtype):
  return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)


MISMATCHES = {
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


@pytest.mark.parametrize('mismatch', MISMATCHES)
def test_other_model_is_refused_and_the_error_names_the_array(saved, mismatch):
  """The step does not count as damaged and is not moved."""
  directory, _ = saved
  change, message = MISMATCHES[mismatch]
  specs = {'params': change(targets('fsdp8').params)}
  with pytest.raises(
    UserError, match=f'{directory}/3 does not fit this config: it {message}'
  ) as error:
    restore_newest(directory, specs)
  assert '\n' not in str(error.value)
  assert names(directory) == {'3'}
  assert names(directory.parent) == {'checkpoints'}


def test_config_mismatch_moves_nothing(steps):
  def refuse(step, meta):
    raise UserError(f'step {step} is at {meta.position}')

  checkpointer = Checkpointer(steps, keep=None)
  with pytest.raises(UserError, match='step 30 is at 30'):
    restore_lib.newest(checkpointer, refuse)
  checkpointer.close()
  assert names(steps) == {'10', '20', '30'}


@pytest.mark.parametrize('version', [1, 99])
def test_other_format_is_refused_and_not_moved(steps, monkeypatch, version):
  monkeypatch.setattr(manifest, 'FORMAT_VERSION', version)
  checkpointer = Checkpointer(steps, keep=None)
  checkpointer.save(40, small(40), Meta())
  checkpointer.close()
  monkeypatch.undo()
  if version == 1:  # format 1 had no digest
    path = steps / '40' / 'meta' / 'metadata'
    path.write_text(json.dumps({'format_version': 1, 'samples': 40}))
  with pytest.raises(
    UserError,
    match=f'{steps}/40 has checkpoint format {version}; .* reads formats 2 '
    'and 3',
  ):
    restore_newest(steps, small_targets())
  assert names(steps) == {'10', '20', '30', '40'}


def test_tuples_and_dicts_have_the_same_names_on_disk(tmp_path):
  """A change of optax classes therefore keeps old steps readable."""
  x = jnp.arange(4.0)
  checkpointer = Checkpointer(tmp_path, keep=2)
  checkpointer.save(1, {'opt_state': ((), (x, {'a': x + 1}), None)}, Meta())
  checkpointer.finish()
  meta = checkpointer.read_meta(1)
  like = jax.ShapeDtypeStruct((4,), x.dtype, sharding=x.sharding)
  for specs in (
    {'1': {'0': like, '1': {'a': like}}},
    ((), [like, {'a': like}]),
  ):
    (tree,) = checkpointer.restore(1, meta, opt_state=specs)
    assert jax.tree.structure(tree) == jax.tree.structure(specs)
    assert_same_bits(jax.tree.leaves(tree), [x, x + 1])
  checkpointer.close()


# Rollback


def test_rolled_back_run_continues_from_that_step(steps):
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


def test_roll_back_refuses_a_missing_step(steps):
  checkpointer = Checkpointer(steps, keep=None)
  with pytest.raises(UserError, match='has no step 15; it has 10, 20, 30'):
    restore_lib.roll_back(checkpointer, 15)
  assert restore_lib.roll_back(checkpointer, 30) == []
  checkpointer.close()
  assert names(steps) == {'10', '20', '30'}


def test_a_path_that_is_not_utf8_is_refused(tmp_path):
  """Orbax cannot read it, which would look like damage."""
  path = f'{tmp_path}/a\udcff'
  for read_only in (False, True):
    with pytest.raises(UserError, match='is not UTF-8: rename the folder'):
      Checkpointer(path, keep=1, read_only=read_only)
  assert not os.listdir(tmp_path)
