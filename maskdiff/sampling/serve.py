"""Serves requests as they come, in a batch of fixed size (continuous batching).

Rows end at different times, for example at an early eos, or because a threshold
commits many tokens per step. The next request takes the row of one that has
ended, while the other rows go on (admission.py). One program serves all
requests, and the answer to a request does not depend on the others.
"""

import time
from collections.abc import Hashable
from typing import NamedTuple

import jax
import numpy as np

from maskdiff.errors import UserError
from maskdiff.sampling import layouts, passes, recording, sampler
from maskdiff.sampling.admission import State, admit
from maskdiff.sampling.recording import Recording
from maskdiff.sampling.request import begin
from maskdiff.sampling.settings import DEFAULT, Settings

# Passes between two looks at an iterator that had no request; seconds to wait
# before the next look if no row is in progress.
POLL_PASSES, POLL_SECONDS = 8, 0.01


class RowRequest(NamedTuple):
  """A request for one row."""

  id: Hashable  # names the request in its Answer
  row: list  # int for a token, None for a slot
  seed: int
  settings: Settings = DEFAULT


class Answer(NamedTuple):
  """The row of a request with its slots filled, or the reason why it is not."""

  id: Hashable
  recording: Recording | None = None  # None: the request was refused
  forwards: int = 0  # see state.Carry
  positions: int = 0  # see state.Carry
  error: UserError | None = None


def serve(network, c, requests, rows, length):
  """Yields an Answer to each request, as the rows end.

  A request that is not valid, or whose logits are NaN or infinite, gets an
  Answer with an error; the others go on.

  Args:
    network: Network.
    c: SamplerConfig.
    requests: iterable of RowRequest, which may be endless. The next request is
      taken only when a row is free, so that with rows=1 it may depend on the
      answer before it. While `next` waits, no row goes on. An iterable that may
      have to wait, such as a queue, can yield None instead: there is no request
      now. The rows then go on, and it is asked again after a few passes.
    rows: number of rows of the batch.
    length: number of tokens and slots for which a row has room.

  Raises:
    UserError: there are no rows, or they are longer than the training rows.
  """
  if rows < 1 or length < 1:
    raise UserError(f'rows={rows} and length={length} must be at least 1')
  if 0 < network.context < length:
    raise UserError(
      f'length={length}: canvas and cache of a row would be longer than '
      f'the training rows of the model, config.data.length={network.context}; '
      f'set length to at most {network.context}'
    )
  requests, more = iter(requests), True
  active = [None] * rows  # the request in each row
  state = shapes = None
  while more or any(active):
    admitted, idle = {}, False
    for i in range(rows):
      while more and not idle and active[i] is None:
        request = next(requests, _END)
        more, idle = request is not _END, request is None
        if not more or idle:
          continue
        try:
          *admitted[i], own_shapes = _begin(network, c, request, length)
          shapes = passes.wider(shapes or own_shapes, own_shapes)
          active[i] = request
        except UserError as error:
          yield Answer(request.id, error=error)
    if not any(active):
      time.sleep(POLL_SECONDS if idle else 0)
      continue
    state = admit(network, c, shapes, state, admitted, rows)
    state, ended = _run(network, c, shapes, state, active, idle)
    for i, answer in ended:
      active[i] = None
      yield answer


_END = object()


def _begin(network, c, request, length):
  """Returns the results of request.begin for one RowRequest.

  Raises:
    UserError: the request is too long, or see `request.begin`.
  """
  if len(request.row) > length:
    raise UserError(
      f'the request has {len(request.row)} tokens and slots, but rows have '
      f'room for {length}: shorten the prompt or ask for fewer tokens'
    )
  laid = layouts.lay_out([request.row], [request.seed], request.settings)
  return begin(network, c, layouts.widen(laid, length), num_slots=length)


def _run(network, c, shapes, state, active, idle):
  """Runs the batch until a row ends.

  Args:
    network: Network.
    c: SamplerConfig.
    shapes: from `request.begin`.
    state: admission.State.
    active: list of the RowRequest, or None, in each row.
    idle: whether to stop after POLL_PASSES passes, to look for a request.

  Returns:
    The next State; and a list of (row, Answer) for the rows that have ended.
  """
  carry, layout, cache = state
  is_active = np.array([request is not None for request in active])
  calls = int(carry.calls) + POLL_PASSES if idle else sampler.MOST
  limits = sampler.Limits(np.int32(is_active.sum() - 1), np.int32(calls))
  carry, cache = sampler.run(network, c, shapes, carry, layout, cache, limits)
  masked, fill, valid, forwards, positions, broken = jax.device_get(
    (
      carry.masked,
      layout.fill,
      layout.valid,
      carry.forwards,
      carry.positions,
      carry.broken,
    )
  )
  ended = np.flatnonzero(is_active & ~masked.any((1, 2)))
  recordings = recording.of_rows(carry, fill, valid) if ended.size else []
  return State(carry, layout, cache), [
    (
      i,
      Answer(
        active[i].id,
        recordings[i],
        int(forwards[i]),
        int(positions[i]),
        sampler.broken_error('this request') if broken[i] else None,
      ),
    )
    for i in ended
  ]
