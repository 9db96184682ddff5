"""Runs of several processes, each started by its own command as on a pod.

Two processes with two fake devices each must match one process with four.
"""

import functools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess

import forked
import jax
import numpy as np
import pytest
import tiny

from maskdiff.data import records, row_reader, row_writer
from maskdiff.data.rows import Rows
from maskdiff.distributed import mesh
from maskdiff.monitoring import metrics
from maskdiff.training import loop

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, DEVICES = 6, 4

SETTINGS = {
  **tiny.TRAIN_KEYS,
  'train.steps': STEPS,
  'train.batch': 32,
  'train.log_every_steps': 1,
  # The last step has a program of its own.
  'objective.anneal_steps': STEPS,
  'eval.every_steps': 4,
  'sample.prompts': ('def read(',),
  'sample.gen_length': 4,
  'sample.block_length': 4,
  'sample.steps': 4,
  'checkpoint.every_steps': 4,
}

# Records which rows of the global batches the process reads.
RECORD_ROWS = """
import json, os, runpy, sys

# Gloo prints about its connections from several threads at once. Send that to
# /dev/null: only Python writes to the original standard output.
sys.stdout = os.fdopen(os.dup(1), 'w')
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

from maskdiff.data import pipeline

for name in ('train_batches', 'heldout_batches'):
  def recorded(*args, real=getattr(pipeline, name), name=name, **kwargs):
    path = f"{sys.argv[sys.argv.index('--workdir') + 1]}.{name}"
    with open(path + os.environ['JAX_PROCESS_ID'], 'w') as f:
      json.dump([int(row) for row in kwargs['rows']], f)
    for batch in real(*args, **kwargs):
      assert len(batch.tokens) == len(kwargs['rows'])
      yield batch
  setattr(pipeline, name, recorded)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.fixture(scope='module')
def with_columns(corpus, tokenizer, tmp_path_factory):
  """Returns a directory of rows of 8 tokens with documents and answers."""
  random = np.random.default_rng(0)
  manifest = records.read_manifest(corpus)

  def rows(split):
    source = row_reader.RowSource(corpus, manifest, split)
    tokens = source.read(range(len(source))).tokens.reshape(-1, 8)
    doc = np.cumsum(random.random(tokens.shape) < 0.3, axis=1) % 8
    doc[random.random(len(doc)) < 0.3, 6:] = -1
    return Rows(tokens, doc, random.random(tokens.shape) < 0.7)

  directory = tmp_path_factory.mktemp('columns') / 'rows'
  splits = {split: [rows(split)] for split in records.SPLITS}
  row_writer.write_rows(directory, splits, tokenizer, source='random columns')
  return directory


@pytest.fixture(scope='module')
def settings(corpus, with_columns, tokenizer):
  """Returns values of the config by dotted key.

  The samples are those of a mixture, in which one dataset stores all columns.
  """
  return SETTINGS | {
    'data.path': f'{corpus}=0.5,{with_columns}=0.5',
    'eval.path': str(with_columns),
    'objective.attend_within': 'document',
    'data.tokenizer': str(tokenizer.path),
  }


@pytest.fixture(scope='module')
def config(settings):
  return tiny.config(settings)


@pytest.fixture(scope='module')
def config_file(settings, tmp_path_factory):
  path = tmp_path_factory.mktemp('config') / 'small.py'
  return tiny.config_file(path, settings)


def start(
  script, *arguments, processes=2, of_process=None, program=RECORD_ROWS
):
  """Runs a script in several processes.

  Args:
    script: path of a script, relative to launch/.
    *arguments: for all processes.
    processes: number of processes.
    of_process: dict from a process index to more arguments.
    program: Python program that runs the script of its first argument.

  Returns:
    List of (standard output, standard error, exit status).
  """
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = s.getsockname()[1]
  number = DEVICES // processes
  devices = f'--xla_force_host_platform_device_count={number}'
  environ = {
    **os.environ,
    'XLA_FLAGS': re.sub(
      r'--xla_force_host_platform_device_count=\d+',
      devices,
      os.environ['XLA_FLAGS'],
    ),
    'PYTHONPATH': str(ROOT),
    'JAX_COORDINATOR_ADDRESS': f'localhost:{port}',
    'JAX_NUM_PROCESSES': str(processes),
  }
  started = [
    forked.start(
      [
        '-c',
        program,
        str(ROOT / 'launch' / script),
        *map(str, arguments),
        *(of_process or {}).get(i, []),
      ],
      env=environ | {'JAX_PROCESS_ID': str(i)},
      cwd=ROOT,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for i in range(processes)
  ]
  try:
    ended = [(*p.communicate(timeout=400), p.returncode) for p in started]
  finally:
    for p in started:
      p.kill()
  return ended


def pretrain(config_file, workdir, *arguments):
  """Trains in two processes; returns the result of `start`."""
  ended = start(
    'pretrain.py', '--config', config_file, '--workdir', workdir, *arguments
  )
  for _, err, status in ended:
    assert status == 0, err[-4000:]
  return ended


def run(config, workdir, *make_stage):
  """Trains in this process, on DEVICES of its devices."""
  with pytest.MonkeyPatch.context() as patch:
    devices = jax.devices()[:DEVICES]
    make_mesh = functools.partial(mesh.make_mesh, devices=devices)
    patch.setattr(mesh, 'make_mesh', make_mesh)
    loop.run(config, str(workdir), *make_stage)


@pytest.fixture(scope='module')
def run_of_one(config, tmp_path_factory):
  """Work directory of a run of one process."""
  workdir = tmp_path_factory.mktemp('one')
  run(config, workdir)
  return workdir


@pytest.fixture(scope='module')
def run_of_two(config_file, tmp_path_factory):
  """Work directory of the same run in two processes, and their outputs."""
  workdir = tmp_path_factory.mktemp('runs') / 'two'
  return workdir, pretrain(config_file, workdir)


def rows_of(workdir):
  """All metrics by step and name, except times."""
  rows = {}
  for row in metrics.read(workdir / 'metrics.jsonl'):
    for name, value in row.items():
      assert (row['step'], name) not in rows or name == 'step'
      rows[row['step'], name] = value
  times = ('train/step_s', 'train/tokens_per_s')
  return {key: v for key, v in rows.items() if key[1] not in times}


def assert_same_metrics(workdir, other):
  rows, other_rows = rows_of(workdir), rows_of(other)
  assert rows.keys() == other_rows.keys()
  assert {step for step, _ in rows} == set(range(STEPS + 1))
  for key, value in rows.items():
    if isinstance(value, str):
      assert other_rows[key] == value, key
    else:
      assert other_rows[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_two_processes_have_the_metrics_of_one(run_of_one, run_of_two):
  assert_same_metrics(run_of_one, run_of_two[0])


def test_each_process_reads_only_its_own_rows(run_of_two):
  for name, batch in (('train_batches', 32), ('heldout_batches', 16)):
    read = [
      json.loads(pathlib.Path(f'{run_of_two[0]}.{name}{i}').read_text())
      for i in range(2)
    ]
    assert [len(rows) for rows in read] == [batch // 2] * 2
    assert sorted(read[0] + read[1]) == list(range(batch))


def test_only_process_0_prints(run_of_two, with_columns):
  workdir, ((out, err, _), (other_out, other_err, _)) = run_of_two
  assert 'held-out bound' in out
  assert f'step {STEPS}/{STEPS}' in err
  assert other_out == ''
  assert 'nats' not in other_err and 'sample' not in other_err
  header = (workdir / 'header.txt').read_text()
  assert '4 x cpu, replica=1, fsdp=4, sequence=1, tensor=1, 2 proc' in header
  # An epoch reads prompts and padding too.
  positions = records.read_manifest(with_columns).splits['train'].rows * 8
  epochs = 0.5 * STEPS * 32 * 16 / positions
  (line,) = [x for x in header.splitlines() if 'random columns' in x]
  assert f'this run reads {epochs:.2f} epochs' in line


def without_the_last_step(workdir, copy):
  shutil.copytree(workdir, copy)
  shutil.rmtree(copy / 'checkpoints' / str(STEPS))
  return copy


def test_one_process_resumes_a_run_of_two(
  run_of_one, run_of_two, config, tmp_path
):
  workdir = without_the_last_step(run_of_two[0], tmp_path / 'run')
  run(config, workdir)
  assert_same_metrics(run_of_one, workdir)


def test_two_processes_resume_a_run_of_one(run_of_one, config_file, tmp_path):
  workdir = without_the_last_step(run_of_one, tmp_path / 'run')
  (_, err, _), _ = pretrain(config_file, workdir)
  assert 'resuming at step 4' in err
  assert_same_metrics(run_of_one, workdir)
  assert {p.name for p in (workdir / 'checkpoints').iterdir()} == {'4', '6'}


def test_sequence_and_tensor_axes_may_span_processes(
  run_of_one, config_file, tmp_path
):
  """Every host reads all rows and puts its own columns on its devices."""
  pretrain(
    config_file,
    tmp_path / 'run',
    '--config.mesh.fsdp=1',
    '--config.mesh.sequence=2',
    '--config.mesh.tensor=2',
  )
  assert_same_metrics(run_of_one, tmp_path / 'run')


def test_two_processes_have_the_block_lengths_of_one(settings, tmp_path):
  """Each process chooses a compiled step by the number of the step."""
  settings = settings | {
    'objective.name': 'block_diffusion',
    'objective.anneal_steps': 0,
    'objective.block_length': 4,
    'objective.block_plan': ((0.0, 1), (0.4, 4)),
    'eval.batches': 1,
    'sample.prompts': (),
  }
  run(tiny.config(settings), tmp_path / 'one')
  file = tiny.config_file(tmp_path / 'config.py', settings)
  pretrain(file, tmp_path / 'two')
  assert_same_metrics(tmp_path / 'one', tmp_path / 'two')
  rows = rows_of(tmp_path / 'two')
  lengths = [rows[i, 'train/block_length'] for i in range(1, STEPS + 1)]
  assert lengths == [1, 1, 4, 4, 4, 4]


def test_two_processes_sample_and_process_0_prints(run_of_two):
  workdir = run_of_two[0]
  arguments = ('--workdir', workdir, '--prompt', 'def read(')
  arguments += ('--gen_length', 4, '--steps', 4)
  (shown, _, status), (other_out, _, _) = start(
    'sample.py', *arguments, '--show'
  )
  assert (status, other_out) == (0, '')
  text = rows_of(workdir)[STEPS, 'sample/0']
  assert shown.endswith(f'{"=" * 8}\n{text}\n{"=" * 8}\n')
  assert shown.count('=' * 8) == 5


@pytest.mark.parametrize('failing', [0, 1])
def test_error_in_one_process_ends_all(config_file, tmp_path, failing):
  ended = start(
    'pretrain.py',
    *('--config', config_file, '--workdir', tmp_path / 'run'),
    of_process={failing: ['--workdir=/dev/null/nowhere']},
  )
  _, err, status = ended[failing]
  (line,) = [x for x in err.splitlines() if x.startswith('error: ')]
  assert status == 2 and '/nowhere' in line
  assert f'process {failing} of 2' in line
  assert ended[1 - failing][2] not in (0, 2)


def test_error_in_all_processes_is_printed_by_all(config_file, tmp_path):
  ended = start(
    'pretrain.py',
    *('--config', config_file, '--workdir', tmp_path / 'run'),
    '--config.train.batch=14',
  )
  for i, (_, err, status) in enumerate(ended):
    assert status == 2
    (line,) = [x for x in err.splitlines() if x.startswith('error: ')]
    assert 'config.train.batch=14' in line
    assert f'process {i} of 2' in line


ONCE = """
import os, pathlib, sys, time
from maskdiff.distributed import runtime

def make(name):
  path = pathlib.Path(sys.argv[1], name)
  if not path.exists():
    time.sleep(1)
    path.write_text(os.environ['JAX_PROCESS_ID'])
  return path.read_text()

with runtime.started():
  for name in ('first', 'second'):
    print(name, runtime.main_process_first(lambda: make(name)))
"""


def test_main_process_first_makes_a_file_once(tmp_path):
  (tmp_path / 'once.py').write_text(ONCE)
  ended = start(tmp_path / 'once.py', tmp_path)
  for out, err, status in ended:
    assert status == 0, err
    assert out == 'first 0\nsecond 0\n'
