"""Detection of the processes of a run, joining them, compilation cache."""

import contextlib
import http.server
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import forked
import jax
import pytest
import tpu_compiler

from maskdiff.distributed import runtime
from maskdiff.errors import NotJoined, UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXPLICIT = {
  'JAX_COORDINATOR_ADDRESS': '10.0.0.1:1234',
  'JAX_NUM_PROCESSES': '4',
  'JAX_PROCESS_ID': '3',
}
SLURM = {
  'SLURM_JOB_ID': '17',
  'SLURM_STEP_NODELIST': 'node[1-2]',
  'SLURM_NTASKS': '16',
  'SLURM_STEP_NUM_TASKS': '16',
  'SLURM_PROCID': '3',
  'SLURM_LOCALID': '3',
}
MPI = {'OMPI_MCA_orte_hnp_uri': '1.0;tcp://h:1', 'OMPI_COMM_WORLD_SIZE': '2'}
TPU = 'tpu,cpu'  # jax_platforms if JAX finds TPU chips


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  """Allows connections to this machine only."""
  create_connection = socket.create_connection

  def local(address, *args, **kwargs):
    assert address[0] in ('127.0.0.1', 'localhost'), address
    return create_connection(address, *args, **kwargs)

  monkeypatch.setattr(socket, 'create_connection', local)


@contextlib.contextmanager
def metadata_server(status):
  """Runs a metadata server like Google Cloud's; yields HOST:PORT."""
  paths = []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      paths.append((self.path, self.headers['Metadata-Flavor']))
      self.send_response(status)
      self.end_headers()

    def log_message(self, *args):
      pass

  server = http.server.HTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield f'127.0.0.1:{server.server_port}'
  server.shutdown()
  server.server_close()
  path = '/computeMetadata/v1/instance/attributes/agent-worker-number'
  assert set(paths) == {(path, 'Google')}


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


@pytest.mark.parametrize(
  'environ, platforms',
  [
    ({}, None),  # a laptop
    ({}, 'cpu'),
    ({}, 'cuda'),
    ({'TPU_SKIP_MDS_QUERY': '1'}, 'tpu'),  # JAX found no chips
    ({**EXPLICIT, 'JAX_NUM_PROCESSES': '1'}, None),
    ({'JAX_NUM_PROCESSES': '1', 'TPU_WORKER_HOSTNAMES': 'a,b'}, TPU),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 'cpu'),  # a CPU process on a pod
    ({'TPU_WORKER_HOSTNAMES': 'localhost', 'TPU_WORKER_ID': '0'}, TPU),
    ({'COLAB_RELEASE_TAG': 'release-colab'}, TPU),
    ({**SLURM, 'SLURM_NTASKS': '1'}, None),
    ({**SLURM, 'SLURM_STEP_NUM_TASKS': '1'}, None),  # a shell of salloc
    ({'SLURM_JOB_ID': '17', 'SLURM_NTASKS': '16'}, None),  # a batch script
    ({**MPI, 'OMPI_COMM_WORLD_SIZE': '1'}, None),
  ],
)
def test_single_process_is_detected_without_network(environ, platforms):
  assert runtime.detect(environ, platforms) is None


@pytest.mark.parametrize(
  'environ, platforms',
  [
    (SLURM, None),
    (SLURM, 'cpu'),
    (MPI, None),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, TPU),  # GKE
    ({'TPU_PROCESS_ADDRESSES': 'a,b', 'TPU_WORKER_HOSTNAMES': 'a'}, TPU),
    ({'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, TPU),
    ({**SLURM, 'JAX_COORDINATOR_ADDRESS': '10.0.0.1:1234'}, None),
  ],
)
def test_cluster_is_left_to_jax(environ, platforms):
  assert runtime.detect(environ, platforms) == {}


def test_explicit_variables_override_the_cluster():
  assert runtime.detect({**SLURM, **EXPLICIT}, TPU) == {
    'coordinator_address': '10.0.0.1:1234',
    'num_processes': 4,
    'process_id': 3,
    'cluster_detection_method': 'deactivate',
  }


@pytest.mark.parametrize('status, expected', [(200, {}), (404, None)])
def test_tpu_vm_is_detected_by_its_metadata(status, expected):
  with metadata_server(status) as address:
    assert runtime.detect({'GCE_METADATA_IP': address}, TPU) == expected


def test_tpu_without_metadata_server_is_a_single_process(monkeypatch):
  closed = f'127.0.0.1:{free_port()}'
  assert runtime.detect({'GCE_METADATA_IP': closed}, TPU) is None
  monkeypatch.setattr(runtime, '_METADATA_TIMEOUT_S', 0.2)
  with socket.create_server(('127.0.0.1', 0)) as silent:
    address = f'127.0.0.1:{silent.getsockname()[1]}'
    began = time.monotonic()
    assert runtime.detect({'GCE_METADATA_IP': address}, TPU) is None
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
  'environ, message',
  [
    (
      {'JAX_COORDINATOR_ADDRESS': 'h:1'},
      'JAX_COORDINATOR_ADDRESS without JAX_NUM_PROCESSES and JAX_PROCESS_ID',
    ),
    (
      {'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '1'},
      'JAX_NUM_PROCESSES and JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS',
    ),
    ({**SLURM, 'JAX_PROCESS_ID': '1'}, 'JAX_PROCESS_ID without'),
    ({**EXPLICIT, 'JAX_COORDINATOR_ADDRESS': 'host'}, "'host' must be HOST"),
    ({**EXPLICIT, 'JAX_PROCESS_ID': '4'}, "'4' must be one of 0 to"),
    ({**EXPLICIT, 'JAX_NUM_PROCESSES': 'all'}, "JAX_NUM_PROCESSES='all'"),
    ({'OMPI_COMM_WORLD_SIZE': '2'}, 'set JAX_COORDINATOR_ADDRESS, '),
  ],
)
def test_contradictory_variables_are_refused(environ, message):
  with pytest.raises(UserError, match=message) as error:
    runtime.detect(environ, None)
  assert '\n' not in str(error.value)


def start(process_id, address, timeout_s):
  """Starts one of two processes; it joins, prints a line and exits."""
  script = (
    'import sys\n'
    'from maskdiff.distributed import runtime\n'
    f'with runtime.started({timeout_s}):\n'
    '  print("here", flush=True)\n'
  )
  return forked.start(
    ['-c', script],
    env={
      **os.environ,
      'PYTHONPATH': str(ROOT),
      'JAX_COORDINATOR_ADDRESS': address,
      'JAX_NUM_PROCESSES': '2',
      'JAX_PROCESS_ID': str(process_id),
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'process_id, message',
  [
    (1, 'no coordinator at {} after 2 s'),
    (0, 'not all processes joined the coordinator {} in 2 s'),
  ],
)
def test_missing_processes_end_the_run_with_one_line(process_id, message):
  address = f'localhost:{free_port()}'
  out, err = (process := start(process_id, address, 2)).communicate(timeout=120)
  (line,) = [x for x in err.splitlines() if x.startswith('error: ')]
  assert message.format(address) in line
  assert f'process {process_id} of 2' in line
  assert (process.returncode, out) == (75, '')  # restart it
  assert 'Traceback' not in err and '*** Check failure' not in err


@pytest.fixture
def initialize(monkeypatch):
  """Returns a function that replaces jax.distributed.initialize."""
  return lambda f: monkeypatch.setattr(jax.distributed, 'initialize', f)


def test_heartbeat_and_timeout_are_passed_to_jax(initialize):
  passed = {}
  initialize(lambda **arguments: passed.update(arguments))
  runtime.join({'process_id': 3}, 5, heartbeat_s=20)
  assert passed['process_id'] == 3
  assert passed['heartbeat_timeout_seconds'] == 20
  assert passed['initialization_timeout'] > 5


@pytest.mark.parametrize(
  'error, expected', [(RuntimeError, NotJoined), (ValueError, UserError)]
)
def test_network_errors_are_not_user_errors(initialize, error, expected):
  """JAX raises RuntimeError for errors of the network."""

  def fail(**arguments):
    raise error('a\nlong story')

  initialize(fail)
  with pytest.raises(
    UserError, match='other processes: a long story'
  ) as raised:
    runtime.join({}, 5)
  assert type(raised.value) is expected


@pytest.mark.parametrize(
  'error, expected',
  [
    ('errors.UserError("bad")', 2),
    ('errors.NotJoined("late")', 75),
    ('errors.Preempted(3)', 75),
    ('KeyError("bug")', 1),
    ('KeyboardInterrupt()', 1),
  ],
)
def test_exit_status_of_a_process_with_peers(error, expected):
  """The peers are simulated."""
  script = (
    'import sys\n'
    'from maskdiff import errors\n'
    'from maskdiff.distributed import runtime\n'
    'runtime.detect = lambda *args: {}\n'
    'runtime.join = runtime.use_compile_cache = lambda *args: None\n'
    'runtime.distributed.global_state.num_processes = 2\n'
    'runtime.distributed.global_state.process_id = 1\n'
    'try:\n'
    '  with runtime.started():\n'
    f'    raise {error}\n'
    'except errors.Preempted as error:\n'
    '  assert error.step == 3\n'
    '  sys.exit(errors.STATUS_AGAIN)\n'
  )
  ended = forked.run(
    ['-c', script],
    env={**os.environ, 'PYTHONPATH': str(ROOT)},
  )
  assert ended.returncode == expected, ended.stderr
  if expected != 75 or 'NotJoined' in error:
    assert 'process 1 of 2 on ' in ended.stderr


def test_two_processes_join():
  address = f'localhost:{free_port()}'
  processes = [start(i, address, 100) for i in range(2)]
  for process in processes:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert 'here' in out.splitlines()


def test_single_process_propagates_errors(monkeypatch, tmp_path):
  for name in EXPLICIT:
    monkeypatch.delenv(name, raising=False)
  error = UserError('of the run')
  with pytest.raises(UserError) as raised, runtime.started():
    raise error
  assert raised.value is error


# The compilation cache


@pytest.fixture
def cache_dir(monkeypatch):
  """Yields a function that reads the cache directory, which is restored."""
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR', raising=False)
  before = jax.config.jax_compilation_cache_dir
  yield lambda: jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', before)


@pytest.fixture
def folder(cache_dir, monkeypatch, tmp_path):
  """The cache folder of a user with a TPU."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  return tmp_path / 'maskdiff' / 'compiled'


def test_accelerators_cache_programs_in_the_folder_of_the_user(
  cache_dir, folder
):
  for _ in range(2):
    runtime.use_compile_cache()
    assert cache_dir() == str(folder)
  assert folder.stat().st_mode & 0o777 == 0o700


def plant_link(folder):
  folder.symlink_to(folder.parent)


def plant_writable(folder):
  folder.mkdir()
  folder.chmod(0o770)


def plant_file(folder):
  folder.touch()


def plant_of_another_user(folder):
  folder.mkdir()
  if os.geteuid():
    pytest.skip('only root may give a folder away')
  os.chown(folder, 12345, -1)


@pytest.mark.parametrize(
  'plant, reason',
  [
    (plant_link, 'it is a link'),
    (plant_writable, 'other users can write it'),
    (plant_file, 'File exists'),
    (plant_of_another_user, 'it belongs to another user'),
  ],
)
def test_programs_that_others_can_write_are_not_loaded(
  cache_dir, folder, capsys, plant, reason
):
  folder.parent.mkdir()
  plant(folder)
  before = cache_dir()
  runtime.use_compile_cache()
  assert cache_dir() == before
  assert f'({reason}); set JAX_COMP' in capsys.readouterr().err


def test_cpus_cache_no_programs_by_default(cache_dir):
  before = cache_dir()
  runtime.use_compile_cache()
  assert cache_dir() == before


def test_environment_variable_sets_the_cache_directory(cache_dir, monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'gs://bucket/programs')
  before = cache_dir()  # JAX reads the variable itself at import
  runtime.use_compile_cache()
  assert cache_dir() == before


def test_single_process_calls_work_once():
  calls = []
  result = runtime.main_process_first(lambda: calls.append(1) or len(calls))
  assert (result, calls) == (1, [1])


@pytest.mark.parametrize(
  'environ, platforms, quiet',
  [
    ({'TPU_SKIP_MDS_QUERY': '1'}, None, True),
    ({}, 'tpu,cpu', False),  # JAX found TPU chips
    ({'TPU_SKIP_MDS_QUERY': '1'}, 'cpu', False),
    ({'TPU_SKIP_MDS_QUERY': '1'}, 'tpu', False),  # errors must be visible
  ],
)
def test_libtpu_is_quiet_only_without_a_tpu(environ, platforms, quiet):
  before = dict(environ)
  runtime.quiet_without_tpu(environ, platforms)
  added = {'TPU_WORKER_HOSTNAMES', 'TPU_ACCELERATOR_TYPE'} if quiet else set()
  assert environ.keys() == before.keys() | added
  assert runtime.detect(environ, platforms if quiet else 'cpu') is None


@pytest.mark.slow
@tpu_compiler.needs_libtpu
@pytest.mark.parametrize(
  'program',
  [
    'import jax\nfrom maskdiff.distributed import runtime\n'
    'with runtime.started(None): print(jax.default_backend())',
    'import jax, maskdiff\nmaskdiff.load("tests/golden/model_a")\n'
    'print(jax.default_backend())',
  ],
  ids=['script', 'library'],
)
def test_a_machine_without_a_tpu_prints_nothing_about_it(program):
  """libtpu prints five lines if JAX starts without `quiet_without_tpu`."""
  hidden = ('JAX_PLATFORMS', 'XLA_FLAGS')
  done = subprocess.run(
    [sys.executable, '-c', program],
    env={k: v for k, v in os.environ.items() if k not in hidden}
    | {'PYTHONPATH': str(ROOT)},
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  if 'cpu' not in done.stdout:
    pytest.skip('this machine has an accelerator')
  assert (done.returncode, done.stderr) == (0, '')
