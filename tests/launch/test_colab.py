"""launch/colab.ipynb runs in a kernel, with a tiny model.

Its cells start the real scripts. The cells that install packages, mount storage
or depend on the chip run with fakes.
"""

import ast
import base64
import contextlib
import glob
import html
import json
import math
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import threading
import types
from importlib import metadata

import nbformat
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import xla_flags
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from maskdiff.data import records
from maskdiff.model import transformer
from maskdiff.monitoring import metrics
from maskdiff.training import step

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = nbformat.read(ROOT / 'launch' / 'colab.ipynb', as_version=4)
CELLS = {cell.id: cell for cell in NOTEBOOK.cells}
EVERY = 10  # steps between checkpoints
SMALL = dict(
  model__embed=32,
  model__layers=1,
  model__heads=2,
  model__kv_heads=2,
  model__head_dim=16,
  model__mlp=64,
  model__dtype='float32',
  data__length=64,
  train__batch=8,
  train__log_every_steps=2,
  optimizer__warmup_steps=5,
  optimizer__decay_steps=5,
  eval__every_steps=EVERY,
  eval__batch=4,
  eval__batches=2,
  sample__prompts='()',
  checkpoint__every_steps=EVERY,
)


def overrides(**changes):
  return [
    f'--config.{key.replace("__", ".")}={value}'
    for key, value in (SMALL | changes).items()
  ]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A directory with a Parquet file of the functions of some modules."""
  folder = tmp_path_factory.mktemp('colab')
  files = [ROOT / 'maskdiff' / 'config' / 'keys.py', pathlib.Path(ast.__file__)]
  text = '\n'.join(f.read_text() for f in [*files, pathlib.Path(glob.__file__)])
  functions = re.split(r'\n(?=(?:  )*def |class )', text)
  table = pyarrow.table({'code': functions})
  pyarrow.parquet.write_table(table, folder / 'text.parquet')
  return folder


@contextlib.contextmanager
def kernel(folder, steps):
  """A client with a fresh kernel. Its process group ends with it."""
  notebook = nbformat.reads(nbformat.writes(NOTEBOOK), as_version=4)
  parameters = dict(
    CLONE=str(ROOT),
    INSTALL=False,
    WORKDIR=str(folder / 'run'),
    OVERRIDES=overrides(train__steps=steps),
    SOURCE=str(folder / '*.parquet'),
    TEXT_KEY='code',
    PREPARE=['--heldout_fraction=0.2', '--workers=1'],
    ROWS=str(folder / 'rows'),
    GEN_LENGTH=8,
    QUESTIONS=4,
    REDRAW_S=0.2,
  )
  given = [f'{name} = {value!r}' for name, value in parameters.items()]
  place = [cell.id for cell in notebook.cells].index('parameters') + 1
  cell = nbformat.v4.new_code_cell('\n'.join(given), id='given')
  notebook.cells.insert(place, cell)
  client = NotebookClient(
    notebook, timeout=400, resources={'metadata': {'path': str(folder)}}
  )
  environment = os.environ | {
    'PYTHONPATH': str(ROOT),
    'XLA_FLAGS': xla_flags.FAST,
    'IPYTHONDIR': str(folder / 'ipython'),
  }
  environment.pop('MPLBACKEND', None)
  with client.setup_kernel(env=environment):
    yield client


def execute(client, *names):
  """Runs the named cells, or all; returns the output of the last."""
  for i, cell in enumerate(client.nb.cells):
    if cell.cell_type == 'code' and (not names or cell.id in names):
      client.execute_cell(cell, i)
      last = cell
  return printed(last)


def ask(client, code):
  """Returns the value of an expression in the kernel."""
  cell = nbformat.v4.new_code_cell(f'print(json.dumps({code}))', id='ask')
  client.nb.cells.append(cell)
  client.execute_cell(cell, len(client.nb.cells) - 1)
  client.nb.cells.pop()
  return json.loads(printed(cell))


def printed(cell):
  texts = [o.text for o in cell.outputs if o.output_type == 'stream']
  return ''.join(texts)


def outputs(cell, kind):
  """Returns the outputs of a cell with a MIME type."""
  return [o.data[kind] for o in cell.outputs if kind in o.get('data', {})]


@contextlib.contextmanager
def once(condition, act):
  """Calls `act` when the condition becomes true within the block."""

  def watch():
    while not done.wait(0.05):
      if condition():
        return act()

  done = threading.Event()
  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def last_step(folder):
  """Returns the step of the newest row of metrics, or 0."""
  rows = metrics.read(folder / 'run' / 'metrics.jsonl')
  return rows[-1]['step'] if rows else 0


def checkpoints(folder):
  """Returns the steps of complete checkpoints."""
  names = (p.name for p in (folder / 'run' / 'checkpoints').iterdir())
  return sorted(int(name) for name in names if name.isdecimal())


@pytest.fixture(scope='module')
def story(folder):
  """A failing run, the stop button, the same cell again, a lost machine, and
  all cells on a new machine."""
  first_cells = 'clone', 'given', 'parameters', 'keep', 'sizes', 'chip', 'data'
  story = types.SimpleNamespace(folder=folder)
  with contextlib.suppress(DeadKernelError), kernel(folder, 10**6) as client:
    execute(client, *first_cells, 'curves', 'draw')
    cells = {cell.id: cell for cell in client.nb.cells}
    ask(client, 'OVERRIDES.append("--config.train.step=1")')
    with pytest.raises(CellExecutionError) as story.failure:
      execute(client, 'train')
    story.failed = printed(cells['train'])
    ask(client, 'OVERRIDES.pop()')
    group = os.getpgid(client.km.provisioner.pid)
    stop = lambda: os.killpg(group, signal.SIGINT)
    with once(lambda: last_step(folder) > EVERY, stop):
      story.stopped = execute(client, 'train')
    story.saved = checkpoints(folder)[-1]
    kill = lambda: os.killpg(group, signal.SIGKILL)
    with once(lambda: checkpoints(folder)[-1] > story.saved, kill):
      execute(client, 'train')
  story.newest = checkpoints(folder)[-1]
  story.steps = story.newest + 2 * EVERY
  with kernel(folder, story.steps) as client:
    execute(client)
    story.cells = {cell.id: cell for cell in client.nb.cells}
    story.curves = ask(
      client,
      '[[list(map(float, line.get_ydata())) for line in axis.lines] '
      'for axis in draw(metrics()).axes]',
    )
  story.rows = metrics.read(folder / 'run' / 'metrics.jsonl')
  return story


@pytest.mark.slow
def test_a_failed_run_shows_its_last_lines(story):
  assert "'train.step'" in story.failed
  assert 'train.steps' in story.failed  # the suggested key
  assert 'training ended with status 2' in str(story.failure.value)


@pytest.mark.slow
def test_the_stop_button_saves_the_state(story):
  assert 'starting from scratch' in story.stopped
  assert f'preempted: step {story.saved} is saved' in story.stopped


@pytest.mark.slow
def test_the_same_cell_resumes_also_on_a_new_machine(story):
  """The second kernel resumes from the newest checkpoint of the first, which
  was killed with its training."""
  assert story.newest > story.saved
  text = printed(story.cells['train'])
  assert f'resuming at step {story.newest}\n' in text
  trained = [r['step'] for r in story.rows if 'train/step_s' in r]
  assert trained == sorted(set(trained)) and trained[-1] == story.steps
  assert story.saved in trained and max(np.diff(trained)) <= 2


@pytest.mark.slow
def test_the_curves_show_the_metrics(story):
  """Each panel has a line of all rows. The first panel also has the held-out
  bound and the unigram entropy."""
  column = lambda name: [r[name] for r in story.rows if name in r]
  for lines, name in zip(
    story.curves,
    ('train/objective_nats_per_token', 'train/grad_norm', 'train/tokens_per_s'),
    strict=True,
  ):
    assert len(column(name)) > story.steps / 3
    assert lines[0] == pytest.approx(column(name))
  heldout = column('eval/loss_nats_per_token')
  assert len(heldout) == 1 + story.steps // EVERY
  assert story.curves[0][1] == pytest.approx(heldout)
  entropy = records.read_manifest(story.folder / 'rows').splits['heldout']
  assert story.curves[0][-1] == pytest.approx(
    [entropy.unigram_entropy_nats] * 2, abs=1e-3
  )
  (image,) = outputs(story.cells['train'], 'image/png')
  assert base64.b64decode(image).startswith(b'\x89PNG')
  assert len(image) > 20_000  # three empty frames take half of this


@pytest.mark.slow
def test_the_replay_is_shown_in_the_notebook(story):
  page = (story.folder / 'run' / 'replay.html').read_text()
  assert page.startswith('<!doctype html>')
  (shown,) = outputs(story.cells['sample'], 'text/html')
  assert shown.count('<iframe') == 1
  assert html.unescape(re.search(r'srcdoc="(.*?)"', shown, re.S)[1]) == page


@pytest.mark.slow
def test_the_bound_is_compared_with_the_unigram_entropy(story):
  shown = dict(
    re.findall(
      r'^(\w+).*? ([-+]?\d+\.\d+)', printed(story.cells['bound']), re.M
    )
  )
  last = [r for r in story.rows if 'eval/loss_nats_per_token' in r][-1]
  assert last['step'] == story.steps
  bound = last['eval/loss_nats_per_token']
  entropy = story.curves[0][-1][0]
  assert shown == {
    'bound': f'{bound:.3f}',
    'unigram': f'{entropy:.3f}',
    'difference': f'{entropy - bound:+.3f}',
  }


@pytest.mark.slow
def test_questions_and_a_text_are_scored(story):
  lines = printed(story.cells['evaluate']).splitlines()
  rows = [json.loads(line) for line in lines if line.startswith('{')]
  totals = {row['task']: row for row in rows if 'task' in row}
  assert totals.keys() == {'choices', 'bound'}
  assert len(rows) == 4 + 1 + 1 + 1
  assert 0 <= totals['choices']['accuracy'] <= 1
  assert totals['bound']['nats_per_token'] > 0


@pytest.mark.slow
def test_the_planned_figures_match_the_configs(story):
  table = [x.split() for x in printed(story.cells['sizes']).splitlines()[1:]]
  assert [row[0] for row in table] == [
    '150m.py:v5e-1',
    '150m.py:v6e-1',
    '1b.py:v6e-1',
    '1b.py:v5e-1',
  ]
  for config, rows, _, length, used, _, capacity, speed, hours in table:
    module = runpy.run_path(str(ROOT / 'configs' / config.split(':')[0]))
    c = module['get_config'](config.split(':')[1])
    assert (int(rows), int(length)) == (c.train.batch, c.data.length)
    assert float(used) < float(capacity)
    tokens = c.train.steps * c.train.batch * c.data.length
    hours = float(hours.replace(',', ''))
    speed = float(speed.replace(',', ''))
    assert tokens / speed / 3600 == pytest.approx(hours, rel=0.01)


@pytest.mark.slow
def test_a_cpu_gets_the_smallest_config(story):
  shown = printed(story.cells['chip'])
  assert shown.splitlines()[-1].startswith(
    'cpu, 0.0 GiB for programs: configs/'
  )


# Cells that need another machine, with fakes.


def play(name, **names):
  """Runs a cell with these names defined; returns its namespace."""
  exec(compile(CELLS[name].source, name, 'exec'), names)
  return names


@pytest.mark.parametrize(
  'kind, gib, config',
  [
    ('TPU v5 lite', 15.75, '150m.py:v5e-1'),
    ('TPU v6 lite', 31.25, '150m.py:v6e-1'),
    ('TPU v2', 7.5, 'tiny.py'),
    ('NVIDIA A100-SXM4-40GB', 29.6, '150m.py:gpu'),
    ('NVIDIA L4', 16.6, '150m.py:gpu'),
    ('Tesla T4', 11.0, 'tiny.py'),
    ('cpu', 0, 'tiny.py'),
  ],
)
def test_the_config_suits_the_chip(kind, gib, config):
  run = lambda *args: f'a warning\n{json.dumps([kind, gib])}\n'
  assert play('chip', run=run, CONFIG='')['CONFIG'] == f'configs/{config}'
  assert play('chip', run=run, CONFIG='mine.py')['CONFIG'] == 'mine.py'


TPU = {'TPU_ACCELERATOR_TYPE': 'v5e-1'}


@pytest.mark.parametrize(
  'files, environment, packages, source, wanted',
  [
    ((), {}, (), 'embedded', ()),
    ((), {}, (), 'a.parquet', ('-r', 'requirements-data.txt')),
    ((), TPU, (), 'embedded', ('-r', 'requirements-tpu.txt')),
    (('/dev/accel0',), {}, (), 'embedded', ('-r', 'requirements-tpu.txt')),
    (('/dev/nvidia0',), {}, (), 'embedded', ('jax[cuda13]',)),
    (
      ('/dev/nvidia0',),
      {},
      ('jax-cuda12-plugin',),
      'embedded',
      ('jax[cuda12]',),
    ),
  ],
)
def test_install_depends_on_the_runtime(
  files, environment, packages, source, wanted, monkeypatch
):
  monkeypatch.setattr(glob, 'glob', lambda p: [f for f in files if p[:-1] in f])
  monkeypatch.setattr(
    metadata,
    'distributions',
    lambda: [
      types.SimpleNamespace(metadata={'Name': name}) for name in packages
    ],
  )
  fake_path = types.SimpleNamespace(exists=files.__contains__)
  fake_os = types.SimpleNamespace(environ=environment, path=fake_path)
  commands = []
  play(
    'install',
    os=fake_os,
    SOURCE=source,
    INSTALL=True,
    run=lambda *args: commands.append(args),
  )
  assert commands == [
    ('-m', 'pip', 'install', '-q')
    + ('-r', 'requirements.txt', 'matplotlib', *wanted)
  ]
  for name in re.findall(r'\S+\.txt', ' '.join(commands[0])):
    assert (ROOT / name).exists()


def test_a_tokenizer_is_trained_on_another_text_key(folder, tmp_path):
  """TEXT_KEY applies to the tokenizer and to the rows."""

  def run(*args):
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

  made = play(
    'data',
    re=re,
    run=run,
    ROOT=ROOT,
    SOURCE=str(folder / '*.parquet'),
    TEXT_KEY='code',
    TOKENIZER=str(tmp_path / 'own.model'),
    VOCAB_SIZE=400,
    ROWS=str(tmp_path / 'rows'),
    PREPARE=['--heldout_fraction=0.2', '--workers=1'],
  )
  assert 0 < made['UNIGRAM'] < math.log(400)


@pytest.fixture
def colab(monkeypatch):
  """A fake google.colab; returns the list of its calls."""
  calls = []
  for name in ('google', 'google.colab'):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  sys.modules['google.colab'].drive = types.SimpleNamespace(
    mount=lambda path: calls.append(('drive', path))
  )
  sys.modules['google.colab'].auth = types.SimpleNamespace(
    authenticate_user=lambda: calls.append(('user',))
  )
  return calls


@pytest.mark.parametrize(
  'in_colab, workdir, expected',
  [
    (True, '/content/drive/MyDrive/run', [('drive', '/content/drive')]),
    (True, '/gcs/mine/run', [('user',), ('bucket', 'mine')]),
    (True, '/content/run', []),
    (False, '/content/drive/MyDrive/run', []),
    (False, '/gcs/mine/run', []),
  ],
)
def test_colab_mounts_drive_or_the_bucket(in_colab, workdir, expected, colab):
  bash = lambda command, check: colab.append(('bucket', command[-1]))
  fake = types.SimpleNamespace(run=bash)
  play('keep', IN_COLAB=in_colab, WORKDIR=workdir, subprocess=fake)
  assert colab == expected


def test_a_bucket_is_mounted_once(tmp_path):
  """Runs the commands of the cell with fake programs that record calls. The
  first run installs gcsfuse."""
  script = play('keep', IN_COLAB=False, WORKDIR='')['MOUNT']
  assert '/gcs/$0' in script
  script = script.replace('/gcs/', f'{tmp_path}/gcs/')
  script = script.replace('/usr/share/keyrings', str(tmp_path))
  script = script.replace('/etc/apt/sources.list.d', str(tmp_path))
  programs = tmp_path / 'bin'
  programs.mkdir()

  def fake(name, code):
    (programs / name).write_text(f'#!/bin/sh\n{code}\n')
    (programs / name).chmod(0o755)

  record = f'echo "$(basename $0) $*" >> {tmp_path}/calls'
  fake('curl', 'echo the key')
  fake('lsb_release', 'echo noble')
  fake('mountpoint', f'test -e {tmp_path}/mounted')
  install = f'cp {programs}/gcsfuse.later {programs}/gcsfuse'
  fake('apt-get', f'{record}; case "$*" in *install*) {install};; esac')
  fake('gcsfuse.later', f'{record}; touch {tmp_path}/mounted')
  environment = {'PATH': f'{programs}:/usr/bin:/bin'}
  for _ in range(2):
    command = ['bash', '-c', script, 'mine']
    subprocess.run(command, check=True, env=environment)
  assert (tmp_path / 'calls').read_text().splitlines() == [
    'apt-get -qq update',
    'apt-get -qq install gcsfuse',
    f'gcsfuse --implicit-dirs --rename-dir-limit=100000 mine '
    f'{tmp_path}/gcs/mine',
  ]
  assert (tmp_path / 'gcsfuse.list').read_text() == (
    f'deb [signed-by={tmp_path}/cloud.google.asc] '
    'https://packages.cloud.google.com/apt gcsfuse-noble main\n'
  )


# The file itself.


def test_the_notebook_is_valid_and_has_no_outputs():
  nbformat.validate(NOTEBOOK)
  for cell in NOTEBOOK.cells:
    if cell.cell_type == 'code':
      assert cell.outputs == [] and cell.execution_count is None
      ast.parse(cell.source, feature_version=(3, 11))


def test_numbers_in_the_text_match_the_configs():
  text = '\n'.join(c.source for c in CELLS.values() if c.cell_type != 'code')

  def parameters(name, *machine):
    config = runpy.run_path(str(ROOT / 'configs' / name))['get_config']
    model = step.step_config(config(*machine)).model
    return transformer.num_params(model)[0]

  state = 12 * parameters('150m.py')  # with two moments, 4 bytes each
  for number in (
    f'{parameters("tiny.py") / 1e6:.1f} million',
    f'{parameters("150m.py") / 1e6:.0f} million',
    f'{parameters("1b.py", "v6e-1") / 1e9:.2f} billion',
    f'{parameters("1b.py", "v5e-1") / 1e9:.2f} billion',
    f'{state / 1e9:.1f} GB',
  ):
    assert number in text
