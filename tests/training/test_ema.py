"""The moving average of the weights: formula, runs, resume, loading."""

import contextlib
import functools
import os
import pathlib
import re
import shutil
import types

import forked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import saved
import tiny

import maskdiff
from maskdiff import config as config_lib
from maskdiff.checkpoints import checkpoint, restore
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.errors import UserError
from maskdiff.interop import convert, load
from maskdiff.monitoring import history, loss_curves, metrics, report
from maskdiff.training import ema as ema_lib
from maskdiff.training import loop, pretraining, resume, train_state
from maskdiff.training.run_setup import open_setup

ROOT = pathlib.Path(__file__).parents[2]
STEPS, SAVED = 4, 2

# Formula


def updates(decay, values, ok=None):
  """Returns the average after each of some values of one parameter."""
  update = jax.jit(functools.partial(ema_lib.update, decay))
  ema, found = jax.jit(ema_lib.start)({'w': values[:1]}), []
  ok = np.ones(len(values), bool) if ok is None else ok
  for value, applied in zip(values[1:], ok[1:], strict=True):
    ema = update(ema, {'w': value[None]}, applied)
    found.append(float(ema.params['w'][0]))
  return np.array(found)


@pytest.mark.parametrize('decay', [0.3, 0.9])
def test_average_is_the_weighted_sum_of_all_parameters(decay):
  """The warmup ends at n = 3 for decay 0.3, and at n = 80 for decay 0.9."""
  values = np.random.default_rng(0).normal(size=121).astype(np.float32)
  n = np.arange(1, len(values))
  decays = np.minimum(decay, (1 + n) / (10 + n))
  assert decays[0] < decay == decays[-1]
  after = np.cumprod(decays[::-1])[::-1]  # product of the decays from n on
  weights = np.append(after[0], (1 - decays) * np.append(after[1:], 1.0))
  assert weights.sum() == pytest.approx(1)
  found = updates(decay, values)
  assert found[-1] == pytest.approx(weights @ values, abs=1e-6)
  first = 2 / 11 * values[0] + 9 / 11 * values[1]
  assert found[0] == pytest.approx(first, abs=1e-6)


def test_rate_of_a_decay_near_1_is_exact():
  """1 - float32(0.9999) would be wrong by 1.7e-4 of the rate."""
  ema = ema_lib.Ema({'w': jnp.zeros(1)}, jnp.int32(10**6))
  new = ema_lib.update(0.9999, ema, {'w': jnp.ones(1)}, True)
  np.testing.assert_allclose(new.params['w'], 1e-4, rtol=1e-6)
  assert new.updates == 10**6 + 1


def test_refused_update_keeps_all_bits_of_the_average():
  before = ema_lib.Ema({'w': jnp.array([-0.0, 1.0, 1e-40])}, jnp.int32(5))
  bad = {'w': jnp.array([jnp.nan, 0.5, jnp.inf])}
  after = jax.jit(functools.partial(ema_lib.update, 0.9))(before, bad, False)
  assert_same_bits(jax.device_get(after), jax.device_get(before))


# Runs


@pytest.fixture(scope='module')
def make_config(tokenizer, corpus):
  def make(**changes):
    changes = {k.replace('__', '.'): v for k, v in changes.items()}
    settings = {
      'data.path': str(corpus),
      'data.tokenizer': tokenizer.path,
      'train.steps': STEPS,
      'train.batch': 16,
      'train.log_every_steps': 1,
      'train.ema_decay': 0.9,
      'eval.every_steps': 2,
      'checkpoint.every_steps': SAVED,
    }
    return tiny.config(tiny.TRAIN_KEYS | settings | changes)

  return make


@pytest.fixture(scope='module')
def runs(make_config, tmp_path_factory):
  """Two runs, with and without average, with copies as if killed at SAVED."""
  folder = tmp_path_factory.mktemp('runs')
  save = checkpoint.Checkpointer.save
  for name, decay in (('with', 0.9), ('without', 0.0)):

    def save_and_copy(self, step, *args, name=name):
      save(self, step, *args)
      self._manager.wait_until_finished()
      if step == SAVED:
        shutil.copytree(folder / name, folder / f'{name}_killed')

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(checkpoint.Checkpointer, 'save', save_and_copy)
      loop.run(make_config(train__ema_decay=decay), str(folder / name))
  return folder


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def state_of(workdir):
  return saved.newest(workdir)[2]


def without_ema(values):
  return {k: v for k, v in values.items() if 'ema' not in k}


def scalars(workdir, name):
  rows = metrics.read(workdir / 'metrics.jsonl')
  return {row['step']: row[name] for row in rows if name in row}


@pytest.mark.slow
def test_average_changes_nothing_else(runs):
  """State and metrics are those of a run without, bit for bit."""
  state = state_of(runs / 'with')
  assert_same_bits(without_ema(state), state_of(runs / 'without'))
  assert len(state) > len(without_ema(state))
  for name in ('train/loss_nats_per_token', 'eval/bits_per_byte'):
    assert scalars(runs / 'with', name) == scalars(runs / 'without', name)


@pytest.mark.slow
def test_average_is_evaluated_beside_the_weights(runs):
  for name in ('loss_nats_per_token', 'bits_per_byte', 'stderr_nats_per_token'):
    raw = scalars(runs / 'with', f'eval/{name}')
    average = scalars(runs / 'with', f'eval/ema_{name}')
    assert raw.keys() == average.keys() == {0, 2, 4}
    assert raw[0] == average[0]
    assert raw[4] != average[4]
  other = history.read_run(runs / 'without')
  assert not any('ema' in key for key in other.keys)


@pytest.mark.slow
def test_report_draws_the_average_as_a_dotted_line(runs):
  both = history.read_runs([runs / 'with', runs / 'without'])
  panel = loss_curves.heldout(both)
  dashes = [(t.meta['run'], t.line.dash) for t in panel.figure.data]
  assert dashes == [(0, 'solid'), (0, 'dot'), (1, 'solid')]
  average = scalars(runs / 'with', 'eval/ema_loss_nats_per_token')
  np.testing.assert_allclose(
    panel.figure.data[1].y, list(average.values()), rtol=1e-5
  )
  assert 'moving average' in panel.note
  assert 'moving average' not in loss_curves.heldout(both[1:]).note
  labels = [label for label, _ in report._losses(both[0])]
  assert 'held-out, average, nats/token' in labels


# Resume


@pytest.fixture
def killed(runs, tmp_path):
  return lambda name: shutil.copytree(runs / f'{name}_killed', tmp_path / name)


@pytest.mark.slow
def test_resume_of_the_average_is_bitwise_exact(runs, killed, make_config):
  workdir = killed('with')
  loop.run(make_config(), str(workdir))
  assert_same_bits(state_of(workdir), state_of(runs / 'with'))
  name = 'eval/ema_loss_nats_per_token'
  assert scalars(workdir, name) == scalars(runs / 'with', name)


@pytest.mark.slow
def test_average_turned_on_starts_at_the_restored_weights(
  runs, killed, make_config, capfd
):
  workdir = killed('without')
  before = state_of(workdir)
  config = make_config(train__steps=SAVED + 1, optimizer__decay_steps=1)
  loop.run(config, str(workdir))
  line = f'checkpoints/{SAVED} has no moving average of the weights: the'
  assert line in capfd.readouterr().err
  after = state_of(workdir)
  assert after["['ema']['updates']"] == 1
  for name in before:
    if "['params']" in name:
      np.testing.assert_allclose(
        after[name.replace("['params']", "['ema']['params']")],
        (2 * before[name] + 9 * after[name]) / 11,
        rtol=1e-5,
        atol=1e-7,
      )


@pytest.mark.slow
def test_average_turned_off_is_dropped(runs, killed, make_config, capfd):
  workdir = killed('with')
  loop.run(make_config(train__ema_decay=0.0), str(workdir))
  line = f'the moving average of the weights in {workdir}/checkpoints/{SAVED} '
  assert f'{line}will not be in later' in capfd.readouterr().err
  assert_same_bits(state_of(workdir), state_of(runs / 'without'))


def start(config, workdir):
  """Returns TrainState and Start of a run, as before its first step."""
  spans = types.SimpleNamespace(
    span=lambda _: contextlib.nullcontext(), beat=lambda: None
  )
  setup = open_setup(config, spans, lambda: None)
  checkpointer = checkpoint.Checkpointer(str(workdir / 'checkpoints'), 2, 0)
  with contextlib.closing(checkpointer), jax.set_mesh(setup.mesh):
    return resume.restore_or_init(
      config,
      setup,
      pretraining.make_stage(config, setup),
      jax.random.key(1),
      checkpointer,
    )


def assert_average_starts_at(state, expected):
  assert_same_bits(named(state.params), expected)
  assert_same_bits(named(state.ema.params), expected)
  assert state.ema.updates == 0


def damage(workdir):
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS) / 'params')


def roll_back(workdir):
  checkpointer = checkpoint.Checkpointer(str(workdir / 'checkpoints'), 2, 0)
  with contextlib.closing(checkpointer):
    restore.roll_back(checkpointer, SAVED)


@pytest.mark.slow
@pytest.mark.parametrize('lose', [damage, roll_back])
def test_step_without_an_average_starts_one(
  runs, make_config, tmp_path, capfd, lose
):
  """The newest step has an average, the step before it has none."""
  workdir = shutil.copytree(runs / 'with', tmp_path / 'run')
  before = workdir / 'checkpoints' / str(SAVED)
  shutil.rmtree(before)
  shutil.copytree(runs / 'without_killed' / 'checkpoints' / str(SAVED), before)
  expected = part(runs / 'without_killed', "['params']")
  lose(workdir)
  state, begin = start(make_config(model__zero_outputs=True), workdir)
  assert begin.step == state.step == SAVED
  assert_average_starts_at(state, expected)
  printed = capfd.readouterr().err
  assert f'checkpoints/{SAVED} has no moving average of the weights' in printed
  assert 'config.model.zero_outputs was False, now True' in printed


@pytest.mark.slow
def test_new_run_starts_from_the_average_of_another(
  runs, average, make_config, tmp_path, capfd
):
  source = str(runs / 'with')
  config = make_config(init_from=source, init_from_ema=True)
  state, begin = start(config, tmp_path / 'new')
  assert begin.step == state.step == 0
  assert_average_starts_at(state, average)
  line = f'parameters are those of the moving average of {source}\n'
  assert line in capfd.readouterr().err


# Loading


def named(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def part(workdir, name):
  """Returns the arrays of the newest checkpoint below a name."""
  state = state_of(workdir)
  return {k[len(name) :]: x for k, x in state.items() if k.startswith(name)}


@pytest.fixture(scope='module')
def average(runs):
  """Returns the arrays of the average by name."""
  return part(runs / 'with', "['ema']['params']")


@pytest.mark.slow
def test_load_takes_the_average_on_any_mesh(runs, average, monkeypatch):
  """Nothing else is read from the checkpoint."""
  read, restore = [], checkpoint.Checkpointer.restore

  def recorded(self, step, meta, **targets):
    read.append(set(targets))
    return restore(self, step, meta, **targets)

  monkeypatch.setattr(checkpoint.Checkpointer, 'restore', recorded)
  workdir = str(runs / 'with')
  assert_same_bits(named(load.load(workdir, ema=True)[2]), average)
  model = maskdiff.load(workdir, tensor=2, ema=True)
  assert_same_bits(named(model.params), average)
  model = maskdiff.load(workdir, with_tokenizer=False, ema=True)
  assert_same_bits(named(model.params), average)
  assert read == [{'ema'}] * 3
  raw = named(maskdiff.load(workdir).params)
  assert read.pop() == {'params'}
  assert any((raw[name] != x).any() for name, x in average.items())


@pytest.mark.slow
def test_export_writes_the_average(runs, average, tmp_path):
  workdir, out = str(runs / 'with'), tmp_path / 'out'
  lines = convert.to_hf(workdir, str(out), ema=True)
  assert f'the moving average of step {STEPS} of {workdir}' in lines[0]
  _, params = load.load_params(str(out), mesh_lib.make_mesh())
  assert_same_bits(named(params), average)
  convert.check(str(out), workdir, ema=True)  # raises an error if they differ
  with pytest.raises(UserError, match='differs from'):
    convert.check(str(out), workdir)
  for folder in (str(out), str(runs / 'without')):
    with pytest.raises(UserError, match='has no moving average'):
      load.load(folder, ema=True)


@pytest.mark.slow
def test_warm_start_from_the_average(runs, average, make_config):
  config = make_config(init_from=str(runs / 'with'), init_from_ema=True)
  params = load.warm_start(config, mesh_lib.make_mesh())
  assert_same_bits(named(params), average)
  config.init_from = str(runs / 'without')
  with pytest.raises(UserError, match=f'step {STEPS} of .* has no moving aver'):
    load.warm_start(config, mesh_lib.make_mesh())
  config.init_from = ''
  with pytest.raises(UserError, match='init_from_ema needs a work directory'):
    config_lib.validate(config)


@pytest.mark.slow
def test_average_of_a_warm_start_has_its_own_memory(make_config):
  """The train step donates parameters and average."""
  c, tx = tiny.MODEL, optax.sgd(0.1)
  mesh = mesh_lib.make_mesh()
  shardings = train_state.shardings(c, tx, mesh, ema=True)
  make_state = jax.jit(
    functools.partial(train_state.from_params, c, tx, ema=True),
    out_shardings=shardings,
    donate_argnums=0,
  )
  params = jax.device_put(tiny.strong_params(), shardings.params)
  before = named(jax.tree.map(np.array, params))
  state = make_state(params)
  assert_same_bits(named(state.params), before)
  assert_same_bits(named(state.ema.params), before)
  leaves = map(jax.tree.leaves, (state.params, state.ema.params))
  for x, y in zip(*leaves, strict=True):
    assert x.sharding == y.sharding
    shards = [a.addressable_shards[0].data for a in (x, y)]
    first, second = (shard.unsafe_buffer_pointer() for shard in shards)
    assert first != second


@pytest.mark.slow
def test_script_refuses_ema_of_a_run_without_average(runs):
  flags = ('--task=addition', '--num=1', f'--workdir={runs / "without"}')
  result = forked.run(
    ['launch/evaluate.py', *flags, '--ema'],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )
  assert result.returncode == 2
  (line,) = result.stderr.splitlines()
  assert re.fullmatch(r'error: step 4 of .*/without has no moving aver.*', line)
