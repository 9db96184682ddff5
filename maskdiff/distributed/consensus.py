"""What the processes of a run must see alike: when to end, what they run."""

import hashlib
import itertools
import json
import pathlib
import signal
import threading

import jax
from jax._src import distributed  # the service of the processes is not public
from jax.experimental import multihost_utils

from maskdiff.distributed.runtime import BARRIER_TIMEOUT_S
from maskdiff.errors import UserError

_calls = itertools.count()


class Preemption:
  """Whether the run has been told to end.

      with Preemption() as preemption:
        while not preemption.poll():
          ...

  A single process installs a handler of SIGTERM, and puts the one before back
  at the end; it can only do so in the main thread. Several have one of JAX's
  since they joined: a SIGTERM to any of them makes `poll` true at the same
  call in all.
  """

  def __init__(self):
    self._told = False
    self._polls = 0
    self._handler_before = None

  def __enter__(self):
    # A handler of Python's would displace that of JAX.
    alone = distributed.global_state.client is None
    if alone and threading.current_thread() is threading.main_thread():
      before = signal.signal(signal.SIGTERM, self._tell)
      self._handler_before = signal.SIG_DFL if before is None else before
    return self

  def __exit__(self, *error):
    if self._handler_before is not None:
      signal.signal(signal.SIGTERM, self._handler_before)
      self._handler_before = None

  def poll(self):
    """Whether to end now.

    All processes must call it equally often, at the same places: they agree on
    the number of the call at which it becomes true, one that none has made
    yet. A call that only some make is one at which the others do not end. With
    several processes it waits, once SIGTERM has come, until all know of it.
    """
    if distributed.global_state.preemption_sync_manager and not self._told:
      self._polls += 1
      self._told = multihost_utils.reached_preemption_sync_point(self._polls)
    return self._told

  def _tell(self, number, frame):
    self._told = True


def agree(what):
  """Stops all processes if they are not about to do the same.

  All must call it, with the same items.

  Args:
    what: short strings by item, such as digests of the config.

  Raises:
    UserError: in all processes, if one differs from process 0; it names the
      items and the processes.
  """
  if jax.process_count() == 1:
    return
  client, call = distributed.global_state.client, next(_calls)
  key = f'maskdiff_agree_{call}'
  who, timeout_ms = jax.process_index(), BARRIER_TIMEOUT_S * 1000
  if who == 0:
    client.key_value_set(f'{key}/first', json.dumps(what))
  first = json.loads(client.blocking_key_value_get(f'{key}/first', timeout_ms))
  differing = {k: text for k, text in what.items() if first.get(k) != text}
  if differing:
    client.key_value_set(f'{key}/differ/{who}', json.dumps(differing))
  client.wait_at_barrier(key, timeout_ms)
  told = sorted(
    (int(name.rpartition('/')[2]), json.loads(text))
    for name, text in client.key_value_dir_get(f'{key}/differ/')
  )
  if told:
    raise UserError(_disagreement(first, told))


def _disagreement(first, told):
  parts = []
  for item, expected in first.items():
    others = [(i, texts[item]) for i, texts in told if item in texts]
    if others:
      some = ', '.join(f'{text} in process {i}' for i, text in others[:4])
      more = f' and {len(others) - 4} more' if len(others) > 4 else ''
      parts.append(f'{item} is {expected} in process 0, but {some}{more}')
  return (
    f'the processes differ: {"; ".join(parts)}; start all with the same '
    'arguments, code and data'
  )


def code_version():
  """Digest of the files of this package, which hosts should have alike."""
  root = pathlib.Path(__file__).parents[1]
  digest = hashlib.blake2b(digest_size=8)
  for path in sorted(root.rglob('*.py')):
    content = path.read_bytes()
    name = path.relative_to(root).as_posix()
    digest.update(f'{name} {len(content)}\n'.encode() + content)
  return digest.hexdigest()
