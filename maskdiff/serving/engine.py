"""Samples in a thread for requests that arrive on an asyncio event loop.

The thread runs one batch per row length. A request joins the batch with the
shortest rows that have room for it, so its answer does not depend on the other
requests, and short requests do not pay for long rows. The batches take turns of
a few passes. Each has one compiled program, which `Engine.start` compiles.
"""

import asyncio
import contextlib
import itertools
import queue
import threading

import jax
from absl import logging

from maskdiff.errors import UserError, one_line
from maskdiff.sampling.serve import Answer, RowRequest
from maskdiff.serving.batch import Batch


class Unavailable(UserError):
  """The engine takes no request at the moment, or has ended."""

  http_status = 503


class Broken(UserError):
  """The network has failed at a row."""

  http_status = 500


class Pending:
  """A request in the engine, read and changed on the event loop only.

  Attributes:
    id: number of the request.
    answer: serve.Answer; None as long as the row is not filled.
  """

  def __init__(self, id):
    self.id, self.answer = id, None
    self._recording, self._changed = None, asyncio.Event()

  def update(self, recording, answer=None):
    """Sets the newest Recording of the row, and the Answer at the end."""
    self._recording, self.answer = recording, answer
    self._changed.set()

  async def recordings(self):
    """Yields the Recording of the row after some passes, and of the filled row.

    Recordings that arrive while the caller is busy are skipped.

    Raises:
      UserError: the request failed, or the engine has ended.
    """
    answer = None
    while not answer:
      await self._changed.wait()
      self._changed.clear()
      answer = self.answer  # may be set while the caller is busy
      if answer and answer.error:
        raise Broken(str(answer.error)) if answer.recording else answer.error
      yield self._recording


class Engine:
  """A thread with the sampler. Methods are called on the event loop.

  Attributes:
    length: number of tokens and slots of the longest request.
    error: UserError that new requests get; None while the engine takes them.
  """

  def __init__(self, network, c, rows, lengths, mesh=None, max_waiting=1024):
    """Makes an engine, which `start` starts.

    Args:
      network: Network.
      c: SamplerConfig.
      rows: number of rows of each batch.
      lengths: row lengths in increasing order, for one batch each.
      mesh: mesh of the parameters; None: they are on one device.
      max_waiting: number of waiting requests at which `submit` refuses others.
    """
    self.length, self.error = lengths[-1], None
    self._mesh, self._max_waiting = mesh, max_waiting
    self._pending, self._ids = {}, itertools.count()
    self._inbox, self._cancelled = queue.SimpleQueue(), set()
    self._batches = [
      Batch(network, c, rows, length, self._cancelled) for length in lengths
    ]
    self._loop, self._ready = None, threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def start(self):
    """Starts the thread and compiles the programs.

    Raises:
      UserError: a program cannot be compiled or run.
    """
    self._thread.start()
    self._ready.wait()
    if self.error:
      raise self.error

  @property
  def running(self):
    """Number of requests in rows."""
    return sum(batch.taken for batch in self._batches)

  @property
  def waiting(self):
    """Number of requests that wait for a row."""
    return max(len(self._pending) - self.running, 0)

  def submit(self, row, seed, settings):
    """Returns the Pending of a new request.

    Args:
      row: list of at most `length`; int for a token, None for a slot.
      seed: int.
      settings: Settings.

    Raises:
      Unavailable: too many requests are waiting, or the engine has ended.
    """
    if self.error:
      raise self.error
    if self.waiting >= self._max_waiting:
      raise Unavailable(f'{self.waiting} requests are waiting: try again later')
    self._loop = asyncio.get_running_loop()
    request = RowRequest(next(self._ids), row, seed, settings)
    self._pending[request.id] = pending = Pending(request.id)
    self._inbox.put(request)
    return pending

  def cancel(self, pending):
    """Frees the row of a request, unless it has been answered."""
    if pending.id in self._pending:
      self._cancelled.add(pending.id)

  def refuse(self, error):
    """Refuses new requests; those in the engine are still answered."""
    self.error = self.error or error

  def stop(self, error):
    """Ends the thread after its current passes. Open requests get the error."""
    self.refuse(error)
    self._inbox.put(None)
    for id in list(self._pending):
      self._update(id, None, Answer(id, error=error))

  def join(self):
    """Waits for the end of the thread."""
    self._thread.join()

  def _update(self, id, recording, answer=None):
    if pending := self._pending.get(id):
      pending.update(recording, answer)
    if answer:
      self._pending.pop(id, None)
      self._cancelled.discard(id)

  # The methods below run in the thread.

  def _run(self):
    try:
      with jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext():
        for batch in self._batches:
          batch.warm_up()
        self._ready.set()
        while self._receive():
          for batch in self._batches:
            if batch.busy:
              self._deliver(batch.step())
    except Exception as error:
      if not isinstance(error, UserError):
        logging.exception('the sampler failed')
        error = Unavailable(f'the sampler failed: {one_line(error)}')
      self.refuse(error)
      self._ready.set()
      self._call(self.stop, error)

  def _receive(self):
    """Gives new requests to the batches; returns False at the end.

    Waits for a request if there is none.
    """
    with contextlib.suppress(queue.Empty):
      while True:
        is_idle = not any(batch.busy for batch in self._batches)
        request = self._inbox.get(block=is_idle)
        if request is None:
          return False
        fits = [b for b in self._batches if len(request.row) <= b.length]
        fits[0].waiting.append(request)
    return True

  def _deliver(self, item):
    if isinstance(item, Answer):
      self._call(self._update, item.id, item.recording, item)
    else:
      for id, recording in item.recordings.items():
        self._call(self._update, id, recording)

  def _call(self, function, *args):
    """Calls a function on the event loop, if there is one."""
    if self._loop:
      with contextlib.suppress(RuntimeError):  # the loop is closed
        self._loop.call_soon_threadsafe(function, *args)
