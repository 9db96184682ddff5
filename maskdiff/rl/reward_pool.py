"""Rewards in worker processes, with a time limit per answer.

    with RewardPool(rewards.find('countdown')) as pool:
      pool.check(questions[0])
      found = pool.score(questions, texts)

Nothing that a reward does ends the caller: an answer whose reward fails is
counted by the kind of its error, and its reward is 0. The order of the rewards
is that of the answers, whichever worker computes them.

The workers are new Python processes, not forks, because the caller has the
threads of JAX. They run reward_worker.py and do not import JAX.
"""

import collections
import contextlib
import json
import multiprocessing.connection
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from typing import NamedTuple

import numpy as np

from maskdiff.errors import UserError, inline

# Kinds of errors.
KINDS = (
  'raised',  # the reward raised an exception
  'timeout',  # took longer than the limit
  'ended',  # ended its process, or was killed
  'memory',  # needed more memory than the limit
  'not_finite',  # is NaN or infinite
  'wrong_type',  # is not a number or a dict of named numbers
)
START_S = 120.0  # limit for the start of a worker
MAX_FAILED_STARTS = 3  # in one call
MAX_MESSAGE_BYTES = 1 << 20
PACKAGE = pathlib.Path(__file__).resolve().parents[2]
_FATAL = ('timeout', 'ended', 'memory')  # the worker is replaced
_STARTING, _IDLE = 'starting', None


class Rewards(NamedTuple):
  """Rewards of N answers.

  total: [N] float64; 0 for an answer with an error.
  failed: [N] bool, whether the reward of an answer has an error.
  parts: name -> [N] float64, without `total`; 0 where an answer has no such
    part, or an error.
  errors: kind of KINDS -> number of answers.
  messages: kind -> message of the first of them, one line.
  """

  total: np.ndarray
  failed: np.ndarray
  parts: dict
  errors: dict
  messages: dict


class RewardPool:
  """Processes that compute a reward; a context manager.

  The processes end with `close`, at the exit of the interpreter, and within
  seconds if the caller is killed.
  """

  def __init__(self, source, workers=2, timeout_s=10.0, memory_bytes=2 << 30):
    """Starts the workers, which load the reward.

    Args:
      source: rewards.Source.
      workers: number of processes.
      timeout_s: limit per answer, in seconds of wall time.
      memory_bytes: limit per worker, over what it needs at its start. Only
        Linux has this limit.

    Raises:
      UserError: the program of the reward fails or has no such function.
    """
    self._name = f'{source.path}:{source.name}' if source.path else source.name
    self._timeout_s, self._lock = timeout_s, threading.Lock()
    setup = {
      'source': list(source),
      'timeout_s': timeout_s,
      'memory_bytes': memory_bytes,
    }
    self._workers = []
    self._end = weakref.finalize(self, _end_all, self._workers, os.getpid())
    try:
      self._workers += [_Worker(setup) for _ in range(workers)]
      while any(worker.job == _STARTING for worker in self._workers):
        for worker, message in _messages(self._workers):
          if 'ready' not in message:
            raise UserError(message.get('refused') or _no_start(message))
          worker.job = _IDLE
    except BaseException:
      self.close()
      raise

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self):
    """Ends the processes, and those that they started."""
    self._end()

  def check(self, question):
    """Scores the right answer of a question, and an empty one.

    Raises:
      UserError: the reward has an error.
    """
    found = self.score([question] * 2, [question['answer'], ''])
    for kind, message in found.messages.items():
      answer = 'the right answer' if found.failed[0] else 'an empty answer'
      raise UserError(
        f'reward {self._name!r} of {answer} to '
        f'{inline(question["prompt"], 60)!r}: {kind} ({message}): change the '
        'function, or choose the reward of the task'
      )

  def score(self, questions, texts):
    """Computes the rewards of some answers.

    Args:
      questions: list of N questions, dicts of JSON values.
      texts: list of N answers.

    Returns:
      Rewards.
    """
    requests = [
      json.dumps({'question': question, 'text': text}).encode()
      for question, text in zip(questions, texts, strict=True)
    ]
    with self._lock:
      return _gathered(self._outcomes(requests))

  def _outcomes(self, requests):
    """Returns the message of a worker on each request."""
    for worker in self._workers:
      interrupted = isinstance(worker.job, int)  # the last call was
      if interrupted or not worker.runs():
        worker.end()
        worker.start()
    found, failed_starts = [None] * len(requests), []
    todo = collections.deque(range(len(requests)))
    while todo or any(isinstance(w.job, int) for w in self._workers):
      for worker in self._workers:
        if todo and worker.job is _IDLE:
          index = todo.popleft()
          worker.give(index, requests[index], self._timeout_s)
      for worker, message in _messages(self._workers):
        if worker.job != _STARTING:
          found[worker.job] = message
        elif 'ready' not in message:
          failed_starts.append(_no_start(message))
        worker.job = _IDLE
        if message.get('error') in _FATAL or 'refused' in message:
          worker.end()
          worker.start()
      if len(failed_starts) > MAX_FAILED_STARTS:
        for index in todo:
          found[index] = {'error': 'ended', 'message': failed_starts[-1]}
        todo.clear()
    return found


class _Worker:
  """A worker process.

  process: subprocess.Popen; None if it could not be started.
  connection: to the process.
  job: _STARTING; _IDLE; or the index of an answer.
  deadline: time.monotonic() at which the job has taken too long.
  """

  def __init__(self, setup):
    self._setup = setup
    self.start()

  def start(self):
    """Starts the process; if that fails, its connection is at its end."""
    ours, theirs = socket.socketpair()
    self.connection = multiprocessing.connection.Connection(ours.detach())
    self.job, self.deadline = _STARTING, time.monotonic() + START_S
    with theirs, contextlib.suppress(OSError):
      self.process = None
      self.process = subprocess.Popen(
        [sys.executable, '-P', '-m', 'maskdiff.rl.reward_worker']
        + [str(theirs.fileno()), str(os.getpid())],
        env=_environment(),
        pass_fds=[theirs.fileno()],
        start_new_session=True,  # a group that `end` kills
      )
      self.connection.send_bytes(json.dumps(self._setup).encode())

  def runs(self):
    """Returns whether the process has not ended."""
    return self.process is not None and self.process.poll() is None

  def give(self, index, request, timeout_s):
    """Sends an answer."""
    self.job, self.deadline = index, time.monotonic() + timeout_s
    with contextlib.suppress(OSError):  # `receive` then finds the end
      self.connection.send_bytes(request)

  def receive(self):
    """Returns the next message; an error if the process has ended."""
    try:
      return json.loads(self.connection.recv_bytes(MAX_MESSAGE_BYTES))
    except (EOFError, OSError, ValueError):
      return {'error': 'ended', 'message': self._status()}

  def _status(self):
    if self.process is None:
      return 'no process could be started'
    try:
      status = self.process.wait(1)
    except subprocess.TimeoutExpired:
      return 'it closed its connection'
    return f'signal {-status}' if status < 0 else f'exit {status}'

  def end(self):
    """Kills the process and those that it started."""
    self.connection.close()
    if self.process is not None:
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(self.process.pid, signal.SIGKILL)
      self.process.wait()


def _environment():
  """Returns the environment of a worker."""
  paths = [str(PACKAGE), os.environ.get('PYTHONPATH', '')]
  return {
    **os.environ,
    'PYTHONPATH': os.pathsep.join(filter(None, paths)),
    'PYTHONHASHSEED': '0',  # sets of texts have one order
    # Libraries of a reward take neither the chips nor all cores.
    'JAX_PLATFORMS': 'cpu',
    'OMP_NUM_THREADS': '1',
    'OPENBLAS_NUM_THREADS': '1',
  }


def _messages(workers):
  """Waits for messages; returns a list of (worker, message).

  A worker that is over its deadline has an error as message. Not all workers
  may be idle.
  """
  busy = [worker for worker in workers if worker.job is not _IDLE]
  wait_s = min(worker.deadline for worker in busy) - time.monotonic()
  connections = [worker.connection for worker in busy]
  ready = multiprocessing.connection.wait(connections, max(0.0, wait_s))
  now, found = time.monotonic(), []
  for worker in busy:
    if worker.connection in ready:
      found.append((worker, worker.receive()))
    elif worker.deadline <= now:
      found.append((worker, {'error': 'timeout', 'message': 'over the limit'}))
  return found


def _no_start(message):
  reason = message.get('message', message.get('refused'))
  return f'a reward worker does not start ({reason})'


def _gathered(outcomes):
  """Returns Rewards of a list of messages."""
  parts = [outcome.get('parts', {}) for outcome in outcomes]
  names = sorted({name for p in parts for name in p} | {'total'})
  columns = {
    name: np.array([p.get(name, 0.0) for p in parts], np.float64)
    for name in names
  }
  errors, messages = collections.Counter(), {}
  for outcome in outcomes:
    if 'error' in outcome:
      errors[outcome['error']] += 1
      messages.setdefault(outcome['error'], inline(outcome['message'], 200))
  failed = np.array(['error' in outcome for outcome in outcomes], bool)
  return Rewards(columns.pop('total'), failed, columns, dict(errors), messages)


def _end_all(workers, owner):
  if os.getpid() == owner:  # not in a fork
    for worker in workers:
      worker.end()
