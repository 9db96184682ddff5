"""Several processes as one run, and where compiled programs are kept.

A run is one process on a laptop, and one per host on a pod. `started` finds
out which from the environment, joins the processes through `jax.distributed`,
and sees to it that a process which fails does not wait for the others:

    with runtime.started(workdir):
      train.run(config, workdir)

It comes before anything that asks JAX for its devices.
"""

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
import traceback
import urllib.request

import jax
from jax._src import distributed  # the address and the barrier are not public

from maskdiff.errors import (
  STATUS_AGAIN,
  STATUS_UNEXPECTED,
  STATUS_USER,
  NotJoined,
  Preempted,
  UserError,
  one_line,
)

JOIN_TIMEOUT_S = 300
HEARTBEAT_S = 10
BARRIER_TIMEOUT_S = 4 * 3600
_METADATA_TIMEOUT_S = 3
_LINGER_S = 3
_EXPLICIT = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_CACHE = 'JAX_COMPILATION_CACHE_DIR'

_barriers = itertools.count()


@contextlib.contextmanager
def started(workdir, timeout_s=JOIN_TIMEOUT_S, heartbeat_s=HEARTBEAT_S):
  """Joins the other processes of the run, if there are any.

  With several, an error inside ends this process at once, with status 2 after
  a UserError, 75 if the others are not there and 1 after other errors: an
  orderly end would wait for processes that wait for this one. Those end when
  JAX notices, about heartbeat_s later: it aborts them (SIGABRT, status 134
  in a shell), and nothing of theirs in `finally` or `atexit` is run. After
  Preempted, which all raise alike, they end in order.

  Args:
    workdir: of the run, or None; compiled programs are kept there, see
      `use_compile_cache`.
    timeout_s: seconds to wait for the others.
    heartbeat_s: whole seconds without a sign of life after which a process
      counts as dead and the others end.

  Raises:
    UserError: the variables of the environment contradict each other.
  """
  arguments = detect(os.environ, jax.config.jax_platforms)
  if arguments is None:
    use_compile_cache(workdir)
    yield
    return
  try:
    join(arguments, timeout_s, heartbeat_s)
    use_compile_cache(workdir)
    yield
  except Preempted:
    raise
  except (Exception, KeyboardInterrupt) as error:
    _leave(error)


def detect(environ, platforms):
  """What to tell `jax.distributed.initialize`, or None for a single process.

  Nothing outside this machine is asked, except on TPUs that no variable of the
  environment describes: there the metadata server of Google Cloud is, for at
  most 3 s.

  Args:
    environ: variables of the environment, after JAX was imported.
    platforms: the value of jax_platforms: JAX puts 'tpu' there if it finds TPU
      chips and no JAX_PLATFORMS.

  Returns:
    The arguments, {} if JAX finds them out itself.

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
      'in every process, or none'
    )
  return {} if cluster else None


def _explicit(address, num_processes, process_id):
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal():
    raise UserError(
      f'JAX_COORDINATOR_ADDRESS={address!r} must be HOST:PORT, of process 0'
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
  """Whether JAX can find out the other processes from where it runs."""
  several = lambda name: int(environ.get(name) or 1) > 1
  if 'OMPI_MCA_orte_hnp_uri' in environ:
    return several('OMPI_COMM_WORLD_SIZE')
  if several('OMPI_COMM_WORLD_SIZE'):
    raise UserError(
      'this Open MPI does not tell the address of its coordinator: set '
      f'{", ".join(_EXPLICIT)} in every process'
    )
  # A batch script or an interactive shell has not all of them, or one task.
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
  if hosts is not None:  # GKE, and Colab with a single one
    return ',' in hosts or several('MEGASCALE_NUM_SLICES')
  # JAX sets the first where it finds no chip.
  if 'TPU_SKIP_MDS_QUERY' in environ or 'COLAB_RELEASE_TAG' in environ:
    return False
  return _on_cloud_tpu_vm(environ)


def _on_cloud_tpu_vm(environ):
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
  """Connects this process with the others of the run.

  Args:
    arguments: from `detect`.
    timeout_s: seconds to wait for all of them.
    heartbeat_s: see `started`.

  Raises:
    UserError: the variables of the environment are wrong.
    NotJoined: the coordinator cannot be reached, or processes are missing. The
      attempt goes on in the background, so the process has to be ended.
  """
  errors = []

  def initialize():
    try:
      # JAX aborts with a stack trace of C++ when its own time is over.
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
    # Such as a coordinator that still counts on the process before this one.
    passing = isinstance(errors[0], RuntimeError)
    raise (NotJoined if passing else UserError)(
      'cannot join the other processes'
      + (f' at {address}' if address else '')
      + f': {one_line(errors[0], 300)}'
    ) from errors[0]
  if address is None:
    raise UserError(
      f'the address of the coordinator could not be found out in {timeout_s} '
      f's: set {", ".join(_EXPLICIT)} in every process'
    )
  if state.process_id and not _reachable(address):
    raise NotJoined(
      f'no coordinator at {address} after {timeout_s} s: check that process 0 '
      'was started and runs there, that this machine knows the name, and that '
      'no firewall closes the port'
    )
  raise NotJoined(
    f'not all processes came to the coordinator {address} in {timeout_s} s: '
    'check that every one was started, and what those that ended have printed'
  )


def _reachable(address):
  host, _, port = address.rpartition(':')
  try:
    with socket.create_connection((host.strip('[]'), int(port)), timeout=5):
      return True
  except OSError:
    return False


def use_compile_cache(workdir):
  """Keeps compiled programs on disk, so that a restart does not compile anew.

  JAX_COMPILATION_CACHE_DIR says where, by default `compile_cache` in the work
  directory: where all processes can read what process 0, which alone writes,
  has put there. On CPUs, where another machine may not know the instructions
  of a program, only with the variable; likewise if there is no directory of
  the run's own, None. JAX_ENABLE_COMPILATION_CACHE=0 turns it off.
  """
  if os.environ.get(_CACHE) or jax.default_backend() == 'cpu':
    return
  if workdir is None:
    return
  jax.config.update(
    'jax_compilation_cache_dir',
    os.path.join(os.path.abspath(workdir), 'compile_cache'),
  )


def main_process_first(work):
  """Calls `work` in process 0, then in the others, all with its result.

  For what is made once and then found by all, if they share the disk; those
  that do not make their own.
  """
  main = jax.process_index() == 0
  result = work() if main else None
  if jax.process_count() > 1:
    distributed.global_state.client.wait_at_barrier(
      f'maskdiff_{next(_barriers)}', BARRIER_TIMEOUT_S * 1000
    )
  return result if main else work()


def who():
  """Which process this is, for messages; '' where there is only one."""
  state = distributed.global_state
  if state.num_processes == 1:
    return ''
  return (
    f'process {state.process_id} of {state.num_processes} on '
    f'{socket.gethostname()}'
  )


def _leave(error):
  """Says what is wrong and ends the process without waiting for any other."""
  name = who() or f'a process on {socket.gethostname()}'
  if isinstance(error, UserError):
    print(f'error: {error} ({name})', file=sys.stderr)
  else:
    traceback.print_exception(error)
    print(f'{name} ends', file=sys.stderr)
  sys.stdout.flush()
  sys.stderr.flush()
  if distributed.global_state.process_id == 0:
    # The others end with it; when all fail alike, each should say so itself.
    time.sleep(_LINGER_S)
  if isinstance(error, NotJoined):
    os._exit(STATUS_AGAIN)
  os._exit(STATUS_USER if isinstance(error, UserError) else STATUS_UNEXPECTED)


def say(text, file=None):
  """Prints a line, by default on standard error, once for all hosts."""
  if jax.process_index() == 0:
    print(text, file=file or sys.stderr, flush=True)
