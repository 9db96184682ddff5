"""The metadata of a checkpoint that somebody else wrote: damaged, or read."""

import contextlib
import json
import os
import types

import jax
import pytest

from maskdiff import config as config_lib
from maskdiff.checkpoints import manifest, position, restore
from maskdiff.checkpoints.checkpoint import Checkpointer
from maskdiff.checkpoints.manifest import Damaged, Meta
from maskdiff.errors import UserError
from maskdiff.training import resume

LEAF = {'shape': [2, 3], 'dtype': 'float32', 'fingerprint': 5}
META = Meta({'seed': 0}, 'pretraining', {}, 0, False, {'params/embed': LEAF})


def write(path, **changes):
  """Writes metadata with a right digest, which anybody can compute."""
  values = {'format_version': manifest.FORMAT_VERSION, **vars(META), **changes}
  values['digest'] = manifest.json_digest(values)
  path.write_text(json.dumps(values))
  return path


def leaf(**changes):
  return {'leaves': {'params/embed': LEAF | changes}}


def named(*names):
  return {'leaves': dict.fromkeys(names, LEAF)}


WRONG = [
  {'config': []},
  {'stage': 3},
  {'identity': 'x'},
  {'evaluation_due': 1},
  {'leaves': []},
  {'leaves': None},
  {'leaves': {'a': 3}},
  leaf(shape=None),
  leaf(shape='ab'),
  leaf(shape=[2, -3]),
  leaf(shape=[True]),
  leaf(shape=[2.0]),
  leaf(shape=[float('nan')]),
  leaf(shape=[10**30]),
  leaf(shape=[2**31, 2**31, 2**31]),
  leaf(dtype='float3'),
  leaf(dtype='object'),
  leaf(dtype='f4'),
  leaf(dtype='f4,f4'),
  leaf(dtype='(' * 10**5),
  leaf(dtype={'names': ['a'], 'formats': ['f4']}),
  leaf(dtype=None),
  leaf(fingerprint='x'),
  leaf(fingerprint=-1),
  leaf(fingerprint=None),
  named(''),
  named('/etc/passwd'),
  named('params/../../x'),
  named('params//x'),
  named('params/.'),
  named('a', 'a/b'),
  named('/'.join('a' * 101)),
  named('a\x1b[2J/..'),
]


@pytest.mark.parametrize('changes', WRONG)
def test_values_that_no_run_writes_are_damage(tmp_path, changes):
  with pytest.raises(Damaged) as damage:
    manifest.read(write(tmp_path / 'metadata', **changes))
  message = str(damage.value)
  assert message.isprintable() and len(message) < 300


def test_values_of_a_run_are_read(tmp_path):
  assert manifest.read(write(tmp_path / 'metadata')) == META


@pytest.mark.parametrize(
  'content',
  [
    b'{"leaves": ' * 10**5,
    b'[' * 10**5 + b']' * 10**5,
    b'\xff{}',
    b'3',
    b'[]',
    b'',
    b'{"format_version": 1e999}',
    b'{"a": "\\ud800"}',
    b'1' * 5000,
  ],
)
def test_odd_files_are_damage(tmp_path, content):
  (tmp_path / 'metadata').write_bytes(content)
  with pytest.raises(Damaged):
    manifest.read(tmp_path / 'metadata')


def plant_fifo(step, secret):
  (step / 'meta' / 'metadata').unlink()
  os.mkfifo(step / 'meta' / 'metadata')


def plant_link(step, secret):
  (step / 'params').mkdir()
  (step / 'params' / 'array').symlink_to(secret)


def plant_link_to_folder(step, secret):
  (step / 'params').symlink_to(secret.parent)


def plant_mark(step, secret):
  (step / 'damaged.txt').symlink_to('nowhere')


def plant_huge_mark(step, secret):
  (step / 'damaged.txt').write_text('x' * 10**5)


def plant_mark_with_escapes(step, secret):
  (step / 'damaged.txt').write_text('\x1b[2J disk of host 3\n')


@pytest.mark.parametrize(
  'plant, message',
  [
    (plant_fifo, 'metadata is not a regular file'),
    (plant_link, 'array is not a regular file'),
    (plant_link_to_folder, 'params is not a regular file'),
    (plant_mark, 'cannot read'),
    (plant_huge_mark, 'more than 4,096 bytes'),
    (plant_mark_with_escapes, r'\\x1b\[2J disk of host 3$'),
  ],
)
def test_a_step_with_planted_files_is_damaged(tmp_path, plant, message):
  directory = tmp_path / 'checkpoints'
  (directory / '3' / 'meta').mkdir(parents=True)
  write(directory / '3' / 'meta' / 'metadata')
  (tmp_path / 'secret').mkdir()
  secret = tmp_path / 'secret' / 'key'
  secret.write_text('secret')
  checkpointer = Checkpointer(directory, keep=None, read_only=True)
  assert checkpointer.read_meta(3) == META
  plant(directory / '3', secret)
  with pytest.raises(Damaged, match=message):
    checkpointer.read_meta(3)
  checkpointer.close()


def test_only_names_of_steps_are_steps(tmp_path):
  names = ('7', '07', '-1', '9' * 30, '\u0663', '12.orbax-checkpoint-tmp-0')
  checkpointer = Checkpointer(tmp_path, keep=None, read_only=True)
  for name in names:
    (tmp_path / name).mkdir()
  assert checkpointer.steps() == [7]
  checkpointer.close()


@pytest.fixture
def checkpointer(tmp_path):
  """A reader of a directory with one step, which has metadata only."""
  (tmp_path / '3' / 'meta').mkdir(parents=True)
  write(tmp_path / '3' / 'meta' / 'metadata')
  checkpointer = Checkpointer(tmp_path, keep=None, read_only=True)
  yield checkpointer
  checkpointer.close()


def test_a_step_whose_position_is_not_one_is_damaged(checkpointer):
  def targets_of(step, meta):
    raise Damaged('its meta has no position of the stage')

  with pytest.raises(UserError, match='3: its meta has no position'):
    restore.newest(checkpointer, targets_of)


@pytest.mark.parametrize(
  'position, start, fits',
  [
    (64, 0, True),
    (-1, 0, False),
    (2**63, 0, False),
    (True, 0, False),
    ('64', 0, False),
    (None, 0, False),
    ({'a': 1}, 0, False),
    ({'a': 1}, {'a': 0}, True),
    (1, {'a': 0}, False),
  ],
)
def test_a_position_has_the_type_of_the_first(position, start, fits):
  stage = types.SimpleNamespace(name='toy', start=start, identity={})
  meta = Meta({}, 'toy', {}, position, False, {})
  config = config_lib.default()
  with contextlib.nullcontext() if fits else pytest.raises(Damaged):
    resume._check('runs/x/checkpoints/3', meta, config, stage)


def test_a_reader_of_several_processes_writes_nothing(
  checkpointer, tmp_path, monkeypatch
):
  def fail(step, args):
    raise OSError('disk of host 3')

  monkeypatch.setattr(checkpointer, '_restore_with_retry', fail)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  shape = jax.ShapeDtypeStruct((2, 3), 'float32')
  restored = lambda: checkpointer.restore(3, META, params={'embed': shape})
  with pytest.raises(UserError, match='disk of host 3; launch/checkpoints.py'):
    restored()
  assert not (tmp_path / '3' / 'damaged.txt').exists()
  checkpointer.read_only = False  # a run marks the step
  with pytest.raises(RuntimeError, match='start again'):
    restored()
  with pytest.raises(Damaged, match='disk of host 3'):
    checkpointer.read_meta(3)


@pytest.mark.parametrize('values', [3, None, {}, {'a': 1}])
def test_arrays_without_their_place_in_the_position_are_joined(values):
  position.join(values, {'a': {'b': {'c': 5}}})
