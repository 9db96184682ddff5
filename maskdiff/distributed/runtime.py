"""Joins the processes of a run, and sets up the compilation cache.

A run is one process on a laptop and one process per host on a pod. `started`
reads the environment and joins the processes through `jax.distributed`. If a
process fails, it exits without waiting for the others:

    with runtime.started():
      loop.run(config, workdir)

Enter it before any call that asks JAX for its devices.
"""

import contextlib
import itertools
import os
import socket
import stat
import sys
import threading
import time
import traceback
import urllib.request

import jax
from jax._src import distributed  # address and barrier are not public

from maskdiff.errors import (
  STATUS_OUTPUT_CLOSED,
  STATUS_UNEXPECTED,
  NotJoined,
  OutputClosed,
  Preempted,
  UserError,
  one_line,
  printable,
)

JOIN_TIMEOUT_S = 300
HEARTBEAT_S = 10
BARRIER_TIMEOUT_S = 4 * 3600
_METADATA_TIMEOUT_S = 3
_EXIT_DELAY_S = 3
_EXPLICIT = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_CACHE = 'JAX_COMPILATION_CACHE_DIR'
# Files of the drivers of NVIDIA, of Windows (WSL) and of AMD.
_GPU_FILES = ('/dev/nvidiactl', '/dev/dxg', '/dev/kfd')

_barriers = itertools.count()


@contextlib.contextmanager
def started(timeout_s=JOIN_TIMEOUT_S, heartbeat_s=HEARTBEAT_S):
  """Context manager that joins the other processes of the run, if any.

  With several processes an error inside ends this process at once: a normal
  exit would wait for processes that wait for this one. The exit status is 2
  after a UserError, 75 if the other processes are missing, and 1 after other
  errors. JAX notices after about heartbeat_s and aborts the other processes
  (SIGABRT, status 134 in a shell), without their `finally` and `atexit` code.
  Preempted, which all processes raise together, ends them normally.

  Args:
    timeout_s: seconds to wait for the other processes.
    heartbeat_s: whole seconds without a heartbeat after which a process counts
      as dead and the others are aborted.

  Raises:
    UserError: environment variables contradict each other.
  """
  quiet_without_tpu(os.environ, jax.config.jax_platforms)
  arguments = detect(os.environ, jax.config.jax_platforms)
  if arguments is None:
    use_compile_cache()
    yield
    return
  try:
    join(arguments, timeout_s, heartbeat_s)
    use_compile_cache()
    yield
  except Preempted:
    raise
  except (Exception, KeyboardInterrupt) as error:
    _leave(error)


def quiet_without_tpu(environ, platforms):
  """Keeps libtpu from complaining on a machine without a TPU.

  If libtpu is installed, JAX loads it even without a TPU. libtpu then prints
  five lines about its missing host name and chip type, before JAX falls back to
  another device. With the two variables, it finds no TPU and prints nothing.
  Errors on a machine with a TPU stay visible.

  Args:
    environ: environment variables, after JAX was imported; changed in place.
    platforms: value of jax_platforms.
  """
  if finds_no_tpu(environ, platforms):
    environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
    environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5litepod-1')


def finds_no_tpu(environ, platforms):
  """Returns whether JAX looked for a TPU and found none.

  Args:
    environ: environment variables, after JAX was imported.
    platforms: value of jax_platforms.
  """
  # JAX sets the variable if it finds no TPU chip.
  return 'TPU_SKIP_MDS_QUERY' in environ and not platforms


def has_gpu():
  """Returns whether this machine has a GPU, without starting JAX's devices."""
  return any(map(os.path.exists, _GPU_FILES))


def detect(environ, platforms):
  """Returns arguments for `jax.distributed.initialize`; None for one process.

  With TPU chips that no environment variable describes, the function queries
  the metadata server of Google Cloud, for at most 3 s. There is no other
  network access.

  Args:
    environ: environment variables, after JAX was imported.
    platforms: value of jax_platforms. JAX sets it to include 'tpu' if it finds
      TPU chips and JAX_PLATFORMS is not set.

  Returns:
    Dict of arguments; {} if JAX detects the cluster itself.

  Raises:
    UserError: a variable is missing or malformed.
  """
  given = [name for name in _EXPLICIT if environ.get(name)]
  if environ.get('JAX_NUM_PROCESSES') == '1':
    return None
  if len(given) == len(_EXPLICIT):
    return _explicit(*(environ[name] for name in _EXPLICIT))
  cluster = _in_cluster(environ, platforms)
  if given and (not cluster or given != ['JAX_COORDINATOR_ADDRESS']):
    missing = [name for name in _EXPLICIT if name not in given]
    raise UserError(
      f'{" and ".join(given)} without {" and ".join(missing)}: set all of them '
      'in every process, or none of them'
    )
  return {} if cluster else None


def _explicit(address, num_processes, process_id):
  """Returns arguments for `jax.distributed.initialize` from 3 variables."""
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal():
    raise UserError(
      f'JAX_COORDINATOR_ADDRESS={address!r} must be HOST:PORT of process 0'
    )
  if not (
    num_processes.isdecimal()
    and process_id.isdecimal()
    and int(process_id) < int(num_processes)
  ):
    raise UserError(
      f'JAX_PROCESS_ID={process_id!r} must be one of 0 to JAX_NUM_PROCESSES - '
      f'1, with JAX_NUM_PROCESSES={num_processes!r}'
    )
  return dict(
    coordinator_address=address,
    num_processes=int(num_processes),
    process_id=int(process_id),
    cluster_detection_method='deactivate',
  )


def _in_cluster(environ, platforms):
  """Returns whether JAX can detect this cluster, of several processes."""
  several = lambda name: int(environ.get(name) or 1) > 1
  if 'OMPI_MCA_orte_hnp_uri' in environ:
    return several('OMPI_COMM_WORLD_SIZE')
  if several('OMPI_COMM_WORLD_SIZE'):
    raise UserError(
      'this Open MPI does not give the address of its coordinator: set '
      f'{", ".join(_EXPLICIT)} in every process'
    )
  # A batch script lacks some of these variables; a shell of salloc has a step
  # of one task.
  if all(
    f'SLURM_{name}' in environ
    for name in ('JOB_ID', 'STEP_NODELIST', 'NTASKS', 'PROCID', 'LOCALID')
  ):
    return (
      several('SLURM_NTASKS') and environ.get('SLURM_STEP_NUM_TASKS') != '1'
    )
  if 'tpu' not in (platforms or '').split(','):
    return False
  hosts = environ.get(
    'TPU_PROCESS_ADDRESSES', environ.get('TPU_WORKER_HOSTNAMES')
  )
  if hosts is not None:  # GKE, and Colab with a single host
    return ',' in hosts or several('MEGASCALE_NUM_SLICES')
  # JAX sets TPU_SKIP_MDS_QUERY if it finds no TPU chip.
  if 'TPU_SKIP_MDS_QUERY' in environ or 'COLAB_RELEASE_TAG' in environ:
    return False
  return _on_cloud_tpu_vm(environ)


def _on_cloud_tpu_vm(environ):
  """Returns whether the metadata server describes this host as a TPU VM."""
  server = environ.get('GCE_METADATA_IP', '169.254.169.254')
  request = urllib.request.Request(
    f'http://{server}/computeMetadata/v1/instance/attributes/'
    'agent-worker-number',
    headers={'Metadata-Flavor': 'Google'},
  )
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  try:
    with direct.open(request, timeout=_METADATA_TIMEOUT_S):
      return True
  except OSError:
    return False


def join(arguments, timeout_s, heartbeat_s=HEARTBEAT_S):
  """Connects this process to the other processes of the run.

  Args:
    arguments: result of `detect`.
    timeout_s: seconds to wait for all processes.
    heartbeat_s: see `started`.

  Raises:
    UserError: environment variables are wrong.
    NotJoined: the coordinator cannot be reached, or processes are missing. A
      background thread still tries to connect, so the caller must end the
      process.
  """
  errors = []

  def initialize():
    try:
      # After its own timeout JAX aborts with a C++ stack trace.
      jax.distributed.initialize(
        **arguments,
        initialization_timeout=timeout_s + 60,
        heartbeat_timeout_seconds=int(heartbeat_s),
      )
    except Exception as error:
      errors.append(error)

  thread = threading.Thread(target=initialize, daemon=True)
  thread.start()
  thread.join(timeout_s)
  if not thread.is_alive() and not errors:
    return
  state = distributed.global_state
  address = state.coordinator_address
  if errors:
    # A network error may be temporary, e.g. while the coordinator still waits
    # for the previous process of this host.
    temporary = isinstance(errors[0], RuntimeError)
    raise (NotJoined if temporary else UserError)(
      'cannot join the other processes'
      + (f' at {address}' if address else '')
      + f': {one_line(errors[0], 300)}'
    ) from errors[0]
  if address is None:
    raise UserError(
      f'no coordinator address was detected in {timeout_s} s: set '
      f'{", ".join(_EXPLICIT)} in every process'
    )
  if state.process_id and not _reachable(address):
    raise NotJoined(
      f'no coordinator at {address} after {timeout_s} s: check that process 0 '
      'runs there, that this machine can resolve the host name, and that no '
      'firewall blocks the port'
    )
  raise NotJoined(
    f'not all processes joined the coordinator {address} in {timeout_s} s: '
    'check that every process was started, and the output of those that ended'
  )


def _reachable(address):
  """Returns whether HOST:PORT accepts connections."""
  host, _, port = address.rpartition(':')
  try:
    with socket.create_connection((host.strip('[]'), int(port)), timeout=5):
      return True
  except OSError:
    return False


def use_compile_cache():
  """Enables JAX's persistent compilation cache, so that restarts are faster.

  The cache is in JAX_COMPILATION_CACHE_DIR, or else in maskdiff/compiled in the
  user's cache folder (XDG_CACHE_HOME or ~/.cache). It holds code that is
  executed. It is therefore never in a work directory, which may come from
  somebody else, and the default is used only if no other user can write it.
  Process 0 writes the cache; hosts share it only if they share the directory.
  JAX_ENABLE_COMPILATION_CACHE=0 disables it.

  On CPUs the cache is used only if JAX_COMPILATION_CACHE_DIR is set, because
  another machine may lack the instructions of a compiled program.
  """
  if os.environ.get(_CACHE) or jax.default_backend() == 'cpu':
    return
  home = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  path = os.path.join(home, 'maskdiff', 'compiled')
  if reason := _not_private(path):
    print_once(f'no compilation cache in {path} ({reason}); set {_CACHE}')
  else:
    jax.config.update('jax_compilation_cache_dir', path)


def _not_private(path):
  """Makes a directory that only this user can write.

  Returns:
    '', or why the directory may hold files of other users.
  """
  if not os.path.isabs(path):
    return 'the user has no home directory'
  try:
    os.makedirs(path, mode=0o700, exist_ok=True)
    status = os.lstat(path)
  except OSError as error:
    return one_line(error.strerror)
  if not stat.S_ISDIR(status.st_mode):
    return 'it is a link'
  if status.st_uid != os.geteuid():
    return 'it belongs to another user'
  return 'other users can write it' if status.st_mode & 0o022 else ''


def main_process_first(work):
  """Calls `work` in process 0, then in all others; returns its result.

  Use it for files that are made once: with a shared disk the other processes
  find the files of process 0, otherwise each makes its own.

  Args:
    work: function without arguments that makes the files if they are missing.
  """
  main = jax.process_index() == 0
  result = work() if main else None
  if jax.process_count() > 1:
    distributed.global_state.client.wait_at_barrier(
      f'maskdiff_{next(_barriers)}', BARRIER_TIMEOUT_S * 1000
    )
  return result if main else work()


def process_name():
  """Returns index and host of this process for messages; '' if it is alone."""
  state = distributed.global_state
  if state.num_processes == 1:
    return ''
  return (
    f'process {state.process_id} of {state.num_processes} on '
    f'{socket.gethostname()}'
  )


def _leave(error):
  """Prints the error and exits without waiting for other processes."""
  name = process_name() or f'a process on {socket.gethostname()}'
  if isinstance(error, UserError):
    print(printable(f'error: {error} ({name})'), file=sys.stderr)
  elif not isinstance(error, OutputClosed):
    traceback.print_exception(error)
    print(f'{name} ends', file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  if distributed.global_state.process_id == 0:
    # The exit of process 0 ends the others. If all fail, the delay lets each
    # print its own error.
    time.sleep(_EXIT_DELAY_S)
  if isinstance(error, OutputClosed):
    os._exit(STATUS_OUTPUT_CLOSED)
  os._exit(error.status if isinstance(error, UserError) else STATUS_UNEXPECTED)


def print_once(text, file=None):
  """Prints a line from process 0 only, on standard error unless `file`.

  Control characters are escaped, because the text may be that of a model or of
  a stranger.
  """
  if jax.process_index() == 0:
    print(printable(text), file=file or sys.stderr, flush=True)
