"""launch/checkpoints.py lists, verifies and rolls back checkpoints."""

import os
import pathlib
import re
import runpy
import shutil
import time
import types
from unittest import mock

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags

from maskdiff.checkpoints import checkpoint, manifest, restore
from maskdiff.checkpoints.checkpoint import Checkpointer
from maskdiff.errors import InUse, UserError
from maskdiff.files import lock

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'launch' / 'checkpoints.py'


@pytest.fixture(scope='module')
def script():
  """The main function of the script, called with keyword flags."""
  define = ('DEFINE_string', 'DEFINE_bool', 'DEFINE_integer')
  nothing = {name: mock.DEFAULT for name in define}
  # Two scripts cannot define the same flags in one process.
  with mock.patch.multiple(
    flags, mark_flag_as_required=mock.DEFAULT, **nothing
  ):
    main = runpy.run_path(str(SCRIPT))['main']

  def run(workdir, verify=False, rollback=None):
    main(types.SimpleNamespace(**locals() | {'workdir': str(workdir)}))

  return run


@pytest.fixture(scope='module')
def three_steps(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  checkpointer = Checkpointer(workdir / 'checkpoints', keep=None)
  random = np.random.default_rng(0)
  for step in (10, 20, 3000):
    w = jnp.asarray(random.normal(size=(64, 40)), jnp.float32)
    items = {
      'params': {'w': w, 'odd': w[:7, :3].astype(jnp.bfloat16)},
      'opt_state': ((), ({'mu': {'w': w}},), jnp.int32(step)),
      'guard': {'seen': jnp.int32(step)},
    }
    checkpointer.save(step, items, manifest.Meta(position=step))
  checkpointer.close()
  return workdir


@pytest.fixture
def workdir(three_steps, tmp_path):
  """A copy of a run with checkpoints of steps 10, 20 and 3000."""
  return shutil.copytree(three_steps, tmp_path / 'run')


@pytest.fixture(autouse=True)
def no_wait_before_retries(monkeypatch):
  monkeypatch.setattr(checkpoint, '_RETRY_S', 0)


def flip_a_bit(step, item):
  files = [path for path in (step / item).rglob('*') if path.is_file()]
  path = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 8
  path.write_bytes(content)


def lines(capsys):
  return capsys.readouterr().out.splitlines()


def test_each_step_has_a_line_with_date_size_and_state(script, workdir, capsys):
  path = workdir / 'checkpoints' / '20'
  content = b'0' * 5_000_000
  (path / 'more').write_bytes(content)
  then = time.mktime((2031, 2, 3, 4, 5, 0, 0, 0, -1))
  os.utime(path / 'meta' / 'metadata', (then, then))
  script(workdir)
  found = [
    re.match(r' *([\d,]+)  (\d+-\d\d-\d\d \d\d:\d\d) +(\d\.\d+) GB  (.+)', line)
    for line in lines(capsys)
  ]
  assert [match[1] for match in found] == ['10', '20', '3,000']
  assert {match[4] for match in found} == {'meta intact'}
  assert found[1][2] == '2031-02-03 04:05'
  assert 0.005 <= float(found[1][3]) < 0.006 and float(found[0][3]) < 0.005


def test_a_step_without_meta_is_damaged(script, workdir, capsys):
  shutil.rmtree(workdir / 'checkpoints' / '20' / 'meta')
  (workdir / 'checkpoints' / '4000').mkdir()
  with pytest.raises(SystemExit) as end:
    script(workdir)
  assert end.value.code == 1
  states = [line.split('  ')[-1] for line in lines(capsys)]
  assert states[0] == states[2] == 'meta intact'
  for state in (states[1], states[3]):
    assert state.startswith('damaged: its meta cannot be read')


def test_intact_steps_are_verified(script, workdir, capsys):
  script(workdir, verify=True)
  assert [line.split('  ')[-1] for line in lines(capsys)] == [
    'all 5 arrays match their fingerprints'
  ] * 3


@pytest.mark.parametrize(
  'item, name',
  [('params', 'params/w'), ('opt_state', 'opt_state/1/0/mu/w')],
)
def test_verify_names_the_array_with_a_flipped_bit(
  script, workdir, capsys, item, name
):
  flip_a_bit(workdir / 'checkpoints' / '20', item)
  script(workdir)  # the list does not read arrays
  assert all('meta intact' in line for line in lines(capsys))
  with pytest.raises(SystemExit) as end:
    script(workdir, verify=True)
  assert end.value.code == 1
  first, second, third = lines(capsys)
  assert f'damaged: bits of {name} have changed' in second
  matched = 'match their fingerprints'
  assert matched in first and matched in third


def test_verify_moves_nothing(script, workdir):
  flip_a_bit(workdir / 'checkpoints' / '3000', 'params')
  before = sorted(workdir.rglob('*'))
  with pytest.raises(SystemExit):
    script(workdir, verify=True)
  assert sorted(workdir.rglob('*')) == before


def test_verify_restores_shards_on_all_devices(workdir, monkeypatch):
  """A checkpoint can therefore be larger than the memory of one device."""
  seen = {}
  real = Checkpointer.restore

  def watch(self, step, meta, **targets):
    seen.update(manifest.flat(targets))
    return real(self, step, meta, **targets)

  monkeypatch.setattr(Checkpointer, 'restore', watch)
  checkpointer = restore.open_run(workdir)
  restore.verify(checkpointer, 20, checkpointer.read_meta(20))
  checkpointer.close()
  assert jax.device_count() == 8
  parts = {k: x.sharding.shard_shape(tuple(x.shape)) for k, x in seen.items()}
  assert parts == {
    'guard/seen': (),
    'opt_state/1/0/mu/w': (8, 40),
    'opt_state/2': (),
    'params/odd': (7, 3),
    'params/w': (8, 40),
  }


def test_a_rollback_moves_later_steps_aside(script, workdir, capsys):
  script(workdir, rollback=10)
  (line,) = lines(capsys)
  assert 'ends with step 10; 20, 3000 are now in' in line
  assert os.listdir(workdir / 'checkpoints') == ['10']
  assert set(os.listdir(workdir / 'checkpoints.aside')) == {'20', '3000'}
  script(workdir)
  assert lines(capsys)[-1].startswith('set aside: 20, 3000 in ')


@pytest.mark.parametrize(
  'flags, says',
  [
    ({'rollback': 15}, 'has no step 15; it has 10, 20, 3000'),
    ({'rollback': 20}, 'step 20 is damaged'),
    ({'rollback': 10, 'verify': True}, '--verify and --rollback exclude'),
  ],
)
def test_a_refused_rollback_moves_nothing(script, workdir, flags, says):
  shutil.rmtree(workdir / 'checkpoints' / '20' / 'meta')
  with pytest.raises(UserError, match=says):
    script(workdir, **flags)
  assert not (workdir / 'checkpoints.aside').exists()
  assert len(os.listdir(workdir / 'checkpoints')) == 3


def test_a_rollback_is_refused_while_the_run_writes(script, workdir, capsys):
  with lock.locked(workdir):
    with pytest.raises(InUse, match=f'process {os.getpid()} on '):
      script(workdir, rollback=10)
    script(workdir)  # a reader needs no lock
  assert len(lines(capsys)) == 3
  assert not (workdir / 'checkpoints.aside').exists()


def test_a_directory_with_planted_files_is_listed(script, workdir, capsys):
  (workdir / 'checkpoints' / '20' / 'link').symlink_to('nowhere')
  (workdir / 'checkpoints.aside' / '\x1b[2J').mkdir(parents=True)
  with pytest.raises(SystemExit):
    script(workdir)
  printed = lines(capsys)
  assert printed[1].endswith('damaged: link is not a regular file')
  assert printed[-1].startswith(r'set aside: \x1b[2J in ')


@pytest.mark.slow
def test_the_command_line(workdir, tmp_path):
  """One test for two commands, since each imports JAX."""

  def launch(*args):
    return forked.run(
      [str(SCRIPT), *args],
      env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'none'},
    )

  # Listing needs no device: the run may hold those of the host.
  result = launch(f'--workdir={workdir}')
  assert result.returncode == 0, result.stderr
  assert len(result.stdout.splitlines()) == 3
  assert result.stderr == ''
  result = launch(f'--workdir={tmp_path}/none', '--rollback=10')
  assert result.returncode == 2
  assert re.fullmatch('error: .*holds no checkpoint.*\n', result.stderr)
