"""The program of a reward worker: answers come in, rewards go out.

    python -m maskdiff.rl.reward_worker DESCRIPTOR PARENT

DESCRIPTOR is one end of a socket pair, on which reward_pool.py sends a setup
and then one answer at a time, as JSON. PARENT is the process id of the pool:
without it, the worker ends. The program does not import JAX.
"""

import contextlib
import json
import math
import multiprocessing.connection
import numbers
import os
import random
import resource
import signal
import sys
import threading
import time

from maskdiff.errors import UserError
from maskdiff.rl import rewards

MAX_PARTS = 64
MAX_NAME = 100  # characters
POLL_S = 1.0
CORES = 4  # a reward may use this many on average


def main(descriptor, parent):
  """Scores answers until the pool closes the connection."""
  os.set_inheritable(descriptor, False)
  connection = multiprocessing.connection.Connection(descriptor)
  threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
  setup = json.loads(connection.recv_bytes())
  _silence()
  try:
    source = rewards.Source(*setup['source'])
    sys.path.append(os.path.dirname(source.path))  # modules beside a program
    function = rewards.load(source)
  except UserError as error:
    _send(connection, {'refused': str(error)})
    return
  _limit_memory(setup['memory_bytes'])
  _send(connection, {'ready': True})
  with contextlib.suppress(EOFError):
    while True:
      request = json.loads(connection.recv_bytes())
      _limit_cpu(setup['timeout_s'])
      _send(connection, scored(function, source, **request))


def scored(function, source, question, text):
  """Returns the reward of an answer, or its error.

  Returns:
    {'parts': {name: finite float}}, with `total`; or {'error': kind, 'message':
    text} with a kind of reward_pool.KINDS.
  """
  random.seed(0)  # the result does not depend on the worker
  try:
    value = function(question, text)
  except MemoryError:
    return {'error': 'memory', 'message': 'MemoryError'}
  except SystemExit as error:
    return {'error': 'ended', 'message': f'exit {error.code}'}
  except BaseException as error:
    try:
      message = rewards.described(error, source)
    except Exception:  # the text of the error raises one
      message = type(error).__name__
    return {'error': 'raised', 'message': message}
  try:
    return checked(value)
  except Exception as error:
    return {'error': 'wrong_type', 'message': type(error).__name__}


def checked(value):
  """Returns {'parts': ...} for the value of a reward, or its error."""
  parts = value if isinstance(value, dict) else {'total': value}
  names = [n for n in parts if isinstance(n, str) and 0 < len(n) <= MAX_NAME]
  if len(names) < len(parts) or not 0 < len(parts) <= MAX_PARTS:
    return _wrong('a dict without names, with too many or too long ones')
  found = {}
  for name, part in parts.items():
    if not isinstance(part, numbers.Real) and getattr(part, 'shape', 0) == ():
      part = part.item()  # of NumPy
    if not isinstance(part, numbers.Real):
      return _wrong(f'a {type(part).__name__}, not a number')
    try:
      found[str(name)] = float(part)
    except OverflowError:
      found[str(name)] = math.inf
  if 'total' not in found:
    found['total'] = sum(found.values())
  for name, part in found.items():
    if not math.isfinite(part):
      return {'error': 'not_finite', 'message': f'{name} is {part}'}
  return {'parts': found}


def _wrong(found):
  return {'error': 'wrong_type', 'message': f'the reward is {found}'}


def _send(connection, message):
  connection.send_bytes(json.dumps(message).encode())


def _silence():
  """Makes /dev/null of the standard streams."""
  handle = os.open(os.devnull, os.O_RDWR)
  for number in range(3):
    os.dup2(handle, number)
  os.close(handle)


def _end_with(parent):
  """Kills this process and those that it started when its parent has ended."""
  while os.getppid() == parent:
    time.sleep(POLL_S)
  os.killpg(0, signal.SIGKILL)


def _limit_memory(size):
  """Allows a number of bytes over those in use now, where Linux counts them."""
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  try:
    with open('/proc/self/statm') as file:
      used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + size, used + size))
  except (OSError, ValueError):  # another platform, or a lower limit
    pass


def _limit_cpu(timeout_s):
  """Ends a computation that the pool cannot end, because the pool has died.

  A computation that holds the interpreter's lock also stops `_end_with`.
  """
  usage = resource.getrusage(resource.RUSAGE_SELF)
  used = usage.ru_utime + usage.ru_stime
  allowed = math.ceil(used + CORES * timeout_s + POLL_S)
  _, hard = resource.getrlimit(resource.RLIMIT_CPU)
  if hard != resource.RLIM_INFINITY:
    allowed = min(allowed, hard)
  resource.setrlimit(resource.RLIMIT_CPU, (allowed, hard))


if __name__ == '__main__':
  main(*map(int, sys.argv[1:]))
