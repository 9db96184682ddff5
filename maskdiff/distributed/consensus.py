"""Agreement between the processes of a run: preemption, config and code."""

import hashlib
import itertools
import json
import pathlib
import signal
import threading

import jax
from jax._src import distributed  # the key-value service is not public
from jax.experimental import multihost_utils

from maskdiff.distributed.runtime import BARRIER_TIMEOUT_S
from maskdiff.errors import InUse, UserError

_calls = itertools.count()


def next_call():
  """Returns a number for keys of the key-value service, new in each call.

  All processes must call this function equally often.
  """
  return next(_calls)


class Preemption:
  """Detects SIGTERM, at the same step in all processes of a run.

      with Preemption() as preemption:
        while not preemption.poll():
          ...

  A single process installs a SIGTERM handler and restores the previous one on
  exit. This works in the main thread only; in other threads `poll` stays
  false. Several processes use the handler that JAX installs when they join: a
  SIGTERM to any of them makes `poll` true at the same call in all of them.
  """

  def __init__(self):
    self._preempted = False
    self._polls = 0
    self._handler_before = None

  def __enter__(self):
    # With several processes a Python handler would replace the one of JAX.
    single = distributed.global_state.client is None
    if single and threading.current_thread() is threading.main_thread():
      before = signal.signal(signal.SIGTERM, self._on_sigterm)
      self._handler_before = signal.SIG_DFL if before is None else before
    return self

  def __exit__(self, *error):
    if self._handler_before is not None:
      signal.signal(signal.SIGTERM, self._handler_before)
      self._handler_before = None

  def poll(self):
    """Returns whether to stop now.

    All processes must call `poll` equally often and at the same places. After a
    SIGTERM they agree on the number of a future call, which returns True in
    all of them. If a process skips a call, the processes stop at different
    steps. The first call after a SIGTERM waits until all processes know of the
    SIGTERM.
    """
    if distributed.global_state.preemption_sync_manager and not self._preempted:
      self._polls += 1
      self._preempted = multihost_utils.reached_preemption_sync_point(
        self._polls
      )
    return self._preempted

  def _on_sigterm(self, number, frame):
    self._preempted = True


def agree(values):
  """Checks that all processes have the same values.

  All processes must call this function with the same keys.

  Args:
    values: dict of short strings, such as {'config': digest of the config}.

  Raises:
    UserError: in all processes, if a value differs from that of process 0. The
      message names the keys and the processes.
  """
  if jax.process_count() == 1:
    return
  client, call = distributed.global_state.client, next(_calls)
  key = f'maskdiff_agree_{call}'
  process, timeout_ms = jax.process_index(), BARRIER_TIMEOUT_S * 1000
  if process == 0:
    client.key_value_set(f'{key}/first', json.dumps(values))
  first = json.loads(client.blocking_key_value_get(f'{key}/first', timeout_ms))
  differing = {k: text for k, text in values.items() if first.get(k) != text}
  if differing:
    client.key_value_set(f'{key}/differ/{process}', json.dumps(differing))
  client.wait_at_barrier(key, timeout_ms)
  others = sorted(
    (int(name.rpartition('/')[2]), json.loads(text))
    for name, text in client.key_value_dir_get(f'{key}/differ/')
  )
  if others:
    raise UserError(_disagreement(first, others))


def raise_in_all(error):
  """Raises an error of process 0 in all processes, which all must call this.

  Args:
    error: UserError of process 0, or None. Ignored in other processes.
  """
  if jax.process_count() > 1:
    client = distributed.global_state.client
    key = f'maskdiff_error_{next(_calls)}'
    if jax.process_index() == 0:
      text = json.dumps([isinstance(error, InUse), error and str(error)])
      client.key_value_set(key, text)
    else:
      text = client.blocking_key_value_get(key, BARRIER_TIMEOUT_S * 1000)
      in_use, message = json.loads(text)
      error = message and (InUse if in_use else UserError)(message)
  if error:
    raise error


def from_first(work):
  """Returns a JSON value that process 0 computes, in all processes.

  Args:
    work: function without arguments, called in process 0 only. It may take an
      hour, and must not raise.
  """
  if jax.process_count() == 1:
    return work()
  client, key = distributed.global_state.client, f'maskdiff_{next(_calls)}'
  if jax.process_index() == 0:
    client.key_value_set(key, json.dumps(work()))
  value = json.loads(client.blocking_key_value_get(key, 3600 * 1000))
  client.wait_at_barrier(f'{key}_read', BARRIER_TIMEOUT_S * 1000)
  if jax.process_index() == 0:
    client.key_value_delete(key)
  return value


def _disagreement(first, others):
  """Returns the error message about processes that differ from process 0.

  Args:
    first: values of process 0.
    others: list of (process index, dict of the values that differ).
  """
  parts = []
  for key, expected in first.items():
    found = [(i, values[key]) for i, values in others if key in values]
    if found:
      some = ', '.join(f'{value} in process {i}' for i, value in found[:4])
      more = f' and {len(found) - 4} more' if len(found) > 4 else ''
      parts.append(f'{key} is {expected} in process 0, but {some}{more}')
  return (
    f'the processes differ: {"; ".join(parts)}; start all with the same '
    'arguments, code and data'
  )


def code_version():
  """Returns a digest of all Python files of the package maskdiff."""
  root = pathlib.Path(__file__).parents[1]
  digest = hashlib.blake2b(digest_size=8)
  for path in sorted(root.rglob('*.py')):
    content = path.read_bytes()
    name = path.relative_to(root).as_posix()
    digest.update(f'{name} {len(content)}\n'.encode() + content)
  return digest.hexdigest()
