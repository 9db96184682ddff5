"""Starts Python programs in a fraction of the time that importing JAX takes.

    forked.run([script, '--flag'], env=environment, cwd=folder)
    forked.start([script, '--flag'], stderr=file)

A server process imports the third-party libraries and the package once. For
every program it forks a child, which takes over arguments, environment, folder
and standard files of the caller and runs the script as `python script` would.
Forking saves about 1.8 s of CPU per program, and the suite starts hundreds of
programs. A program whose PYTHONPATH has another package, with other files,
imports that package.

JAX and libtpu read some environment variables when they are imported. Programs
with other values of these variables get a server of their own.
"""

import array
import atexit
import contextlib
import gc
import json
import multiprocessing.process
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import warnings

MODULES = (
  'jax',
  'jax.experimental.multihost_utils',
  'flax.nnx',
  'optax',
  'orbax.checkpoint.checkpoint_managers',
  'grain.experimental',
  'ml_collections.config_flags',
  'jax.experimental.pallas.ops.tpu.splash_attention',
  'sentencepiece',
  'tensorboardX',
  'tqdm',
)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGE = 'maskdiff'
# They import most of the package. Importing it starts nothing.
PACKAGE_MODULES = (
  'maskdiff.planner.training_run',
  'maskdiff.posttraining.finetuning',
  'maskdiff.rl.stage',
  'maskdiff.evals.answered',
)
# Prefixes of variables that JAX or libtpu reads when it is imported, and
# variables with these prefixes that are read later.
AT_IMPORT = ('JAX_', 'TPU_', 'LIBTPU_', 'GRPC_')
LATER = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
SERVER = 'FORK_SERVER'  # variable with the socket of a running server


_servers = {}


class Process:
  """A running program, with the methods of subprocess.Popen that tests use."""

  def __init__(self, connection, pid, captured):
    self._connection, self.pid, self.returncode = connection, pid, None
    self._captured = captured

  def wait(self, timeout=None):
    """Waits for the end; returns the exit status, as Popen.wait does."""
    if self.returncode is None:
      self._connection.settimeout(timeout)
      try:
        answer = self._connection.recv(64)
      except TimeoutError as late:
        raise subprocess.TimeoutExpired(str(self.pid), timeout) from late
      except BlockingIOError:
        return None
      # No answer means that the server itself has died.
      self.returncode = int(answer) if answer else -signal.SIGKILL
      self._connection.close()
    return self.returncode

  def poll(self):
    """Returns the exit status, or None while the program runs."""
    return self.wait(timeout=0)

  def send_signal(self, number):
    """Sends a signal to the program if it still runs."""
    if self.poll() is None:
      with contextlib.suppress(ProcessLookupError):
        os.kill(self.pid, number)

  def kill(self):
    self.send_signal(signal.SIGKILL)

  def communicate(self, timeout=None):
    """Waits for the end; returns the captured outputs as str."""
    self.wait(timeout)
    texts = []
    for file in self._captured:
      texts.append(file and os.pread(file.fileno(), 1 << 30, 0).decode())
      if file:
        file.close()
    self._captured = None, None
    return tuple(texts)


def start(command, env=None, cwd=None, stdin=None, stdout=None, stderr=None):
  """Starts `python *command`.

  Args:
    command: a script with its arguments, or '-c' with a program and arguments.
    env: environment, by default that of this process.
    cwd: folder, by default that of this process.
    stdin, stdout, stderr: open files or descriptors, by default those of this
      process; or subprocess.DEVNULL; or, for outputs, PIPE. A file stores the
      output of a PIPE until `communicate` returns it.

  Returns:
    Process.
  """
  environment = dict(os.environ if env is None else env)
  connection = socket.socket(socket.AF_UNIX)
  connection.connect(address(environment))
  captured = [
    tempfile.TemporaryFile() if file == subprocess.PIPE else None
    for file in (stdout, stderr)
  ]
  files = [stdin, captured[0] or stdout, captured[1] or stderr]
  with open(os.devnull, 'r+') as null:
    for number, file in enumerate(files):
      if file == subprocess.DEVNULL:
        files[number] = null
      elif file is None:
        files[number] = number
    numbers = [f if isinstance(f, int) else f.fileno() for f in files]
    message = {
      'command': [str(word) for word in command],
      'environment': environment,
      'folder': os.path.abspath(cwd or os.getcwd()),
    }
    body = json.dumps(message).encode()
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', numbers))
    connection.sendmsg([len(body).to_bytes(4, 'big')], [rights])
    connection.sendall(body)
  return Process(
    connection, int.from_bytes(connection.recv(4), 'big'), captured
  )


def run(command, env=None, cwd=None, input='', timeout=None, check=False):
  """Runs `python *command` to its end.

  Returns:
    subprocess.CompletedProcess with both outputs as str.

  Raises:
    subprocess.TimeoutExpired: the program took longer; it was killed.
    subprocess.CalledProcessError: `check` is set, and the exit status is not 0.
  """
  with tempfile.TemporaryFile() as given:
    given.write(input.encode())
    given.seek(0)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = start(command, env, cwd, given, **pipes)
  try:
    process.wait(timeout)
  except subprocess.TimeoutExpired:
    process.kill()
    raise
  done = subprocess.CompletedProcess(
    command, process.wait(), *process.communicate()
  )
  if check:
    done.check_returncode()
  return done


def address(environment):
  """Returns the socket of a server that was started with these variables.

  A program with this path in its environment as SERVER uses the same server.
  """
  seen = {
    name: value
    for name, value in sorted(environment.items())
    if name.startswith(AT_IMPORT) and name not in LATER
  }
  key = json.dumps(seen)
  if key not in _servers:
    _servers[key] = os.environ.get(SERVER) or _start_server(seen)
  return _servers[key]


def _start_server(seen):
  folder = tempfile.TemporaryDirectory(prefix='forked')
  path = os.path.join(folder.name, 'socket')
  others = {k: v for k, v in os.environ.items() if not k.startswith(AT_IMPORT)}
  server = subprocess.Popen(
    [sys.executable, __file__, path],
    env=others | seen,
    stdin=subprocess.PIPE,  # the server ends when this pipe is closed
    stdout=subprocess.PIPE,
    cwd=folder.name,
  )
  assert server.stdout.readline() == b'ready\n'

  @atexit.register
  def close():
    server.stdin.close()
    server.wait()
    folder.cleanup()

  return path


def serve(path):
  """Serves until standard input ends; returns in a child, with its command."""
  listener = socket.socket(socket.AF_UNIX)
  listener.bind(path)
  listener.listen(64)
  for name in MODULES:
    __import__(name)
  sys.path.insert(0, ROOT)
  for name in PACKAGE_MODULES:
    __import__(name)
  del sys.path[0]
  # Tracing makes many objects: see conftest.py.
  gc.freeze()
  gc.set_threshold(50_000, 20, 50)
  # JAX warns of forks because its backends have threads; none has started yet.
  warnings.filterwarnings('ignore', category=RuntimeWarning)
  warnings.filterwarnings('ignore', category=DeprecationWarning)
  waiting = selectors.DefaultSelector()
  waiting.register(listener, selectors.EVENT_READ)
  waiting.register(sys.stdin, selectors.EVENT_READ)
  os.write(1, b'ready\n')
  while True:
    for event, _ in waiting.select():
      if event.fileobj is sys.stdin:
        os._exit(0)
      elif event.fileobj is listener:
        connection, _ = listener.accept()
        message, files = _receive(connection)
        pid = os.fork()
        if not pid:
          for number, file in enumerate(files):
            os.dup2(file, number)
          waiting.close()
          for own in (listener, connection):
            own.close()
          return message
        for file in files:
          os.close(file)
        connection.sendall(pid.to_bytes(4, 'big'))
        child = os.pidfd_open(pid)
        waiting.register(child, selectors.EVENT_READ, (pid, connection))
      else:
        pid, connection = event.data
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):  # the caller may have ended
          connection.sendall(b'%d' % os.waitstatus_to_exitcode(status))
        connection.close()
        waiting.unregister(event.fileobj)
        os.close(event.fileobj)


def _receive(connection):
  space = socket.CMSG_LEN(3 * array.array('i').itemsize)
  size, ancillary, _, _ = connection.recvmsg(4, space)
  files = array.array('i')
  files.frombytes(ancillary[0][2])
  left, body = int.from_bytes(size, 'big'), b''
  while len(body) < left:
    body += connection.recv(left - len(body))
  return json.loads(body), files


def become(command, environment, folder):
  """Sets up this process as `python *command` would before its first line."""
  before = os.environ.get('PYTHONPATH', '').split(os.pathsep)
  os.environ.clear()
  os.environ.update(environment)
  os.chdir(folder)
  # Workers that the program spawns look for its script in this folder.
  multiprocessing.process.ORIGINAL_DIR = folder
  sys.stdin, sys.stdout, sys.stderr = (
    open(number, mode, buffering=buffering, closefd=False, encoding='utf-8')
    for number, mode, buffering in ((0, 'r', -1), (1, 'w', -1), (2, 'w', 1))
  )
  warnings.resetwarnings()
  # Warnings that Python ignores by default.
  for category in (
    DeprecationWarning,
    PendingDeprecationWarning,
    ImportWarning,
    ResourceWarning,
  ):
    warnings.simplefilter('ignore', category)
  first = '' if command[0] == '-c' else os.path.dirname(command[0])
  own = environment.get('PYTHONPATH', '').split(os.pathsep)
  rest = [p for p in sys.path[1:] if p not in before]
  sys.path[:] = [first, *filter(None, own), *rest]
  sys.argv[:] = ['-c', *command[2:]] if command[0] == '-c' else command
  found = next(filter(os.path.isdir, map(_package_in, sys.path)), None)
  loaded = _package_in(ROOT)
  if not found or (found != loaded and _files(found) != _files(loaded)):
    for name in list(sys.modules):
      if name.partition('.')[0] == PACKAGE:
        del sys.modules[name]


def _package_in(folder):
  return os.path.join(folder, PACKAGE)


def _files(package):
  """Returns a dict from each file of a package to its size and time."""
  found = {}
  for folder, inner, names in os.walk(package):
    if '__pycache__' in inner:
      inner.remove('__pycache__')
    for name in names:
      path = os.path.join(folder, name)
      state = os.stat(path)
      found[path.removeprefix(package)] = state.st_size, state.st_mtime_ns
  return found


if __name__ == '__main__':
  given = serve(sys.argv[1])
  become(given['command'], given['environment'], given['folder'])
  if given['command'][0] == '-c':
    main = {'__name__': '__main__', '__builtins__': __builtins__}
    exec(compile(given['command'][1], '<string>', 'exec'), main)
  else:
    runpy.run_path(given['command'][0], run_name='__main__')
