"""Serves requests as they come, in a batch of fixed size (continuous batching).

Rows end at different times, for example at an early eos, or because a threshold
commits many tokens per step. The next request takes the row of one that has
ended, while the other rows continue (admission.py). One program serves all
requests, and the answer to a request does not depend on the others.
"""

import numbers
import time
from collections.abc import Hashable
from typing import NamedTuple

import jax
import numpy as np

from maskdiff.errors import UserError
from maskdiff.sampling import layouts, passes, recording, sampler
from maskdiff.sampling.admission import State, abandon, admit
from maskdiff.sampling.recording import Recording
from maskdiff.sampling.request import begin
from maskdiff.sampling.settings import DEFAULT, Settings

# After None, `next` is called again after this many passes, or after this time
# if no row is in progress.
POLL_PASSES, POLL_SECONDS = 8, 0.01


class RowRequest(NamedTuple):
  """A request for one row."""

  id: Hashable  # names the request in its Answer
  row: list  # int for a token, None for a slot
  seed: int
  settings: Settings = DEFAULT


class Answer(NamedTuple):
  """The filled row of a request, or the error of a request that failed."""

  id: Hashable
  recording: Recording | None = None  # None: the request was refused
  forwards: int = 0  # see state.Carry
  positions: int = 0  # see state.Carry
  error: UserError | None = None


class Progress(NamedTuple):
  """The rows in progress after a few passes."""

  # From the id of a request to its Recording so far. Slots without a committed
  # token have step 0.
  recordings: dict


def serve(
  network, c, requests, rows, length, report_passes=0, cancelled=frozenset()
):
  """Yields an Answer to each request, as the rows end.

  If a request is not valid, or its logits are NaN or infinite, its Answer has
  an error. The other requests are not affected. In a run of several processes,
  all must pass the same requests, and None at the same points.

  Args:
    network: Network.
    c: SamplerConfig.
    requests: iterable of RowRequest, which may be endless. The next request is
      taken only when a row is free, so with rows=1 a request may depend on the
      previous answer. No row is computed while `next` waits. An iterable that
      has no request at the moment, such as an empty queue, can yield None
      instead of waiting. The rows are then computed, and `next` is called again
      after a few passes.
    rows: number of rows of the batch.
    length: number of tokens and slots for which a row has room.
    report_passes: if above 0, a Progress is also yielded after this many passes
      or fewer, even if no row has ended.
    cancelled: container of ids, which may grow. With `report_passes`, its
      requests leave their rows before the next passes; their Answer is an
      error.

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
    left = [i for i, request in enumerate(active) if _is_in(request, cancelled)]
    if left:
      state = abandon(state, left)
      for i in left:
        request, active[i] = active[i], None
        yield Answer(request.id, error=_cancelled_error())
    admitted, idle = {}, False
    for i in range(rows):
      while more and not idle and active[i] is None:
        request = next(requests, _END)
        more, idle = request is not _END, request is None
        if not more or idle:
          continue
        try:
          if _is_in(request, cancelled):
            raise _cancelled_error()
          *admitted[i], own_shapes = _begin(network, c, request, length)
          shapes = passes.wider(shapes or own_shapes, own_shapes)
          active[i] = request
        except UserError as error:
          yield Answer(request.id, error=error)
    if not any(active):
      time.sleep(POLL_SECONDS if idle else 0)
      continue
    state = admit(network, c, shapes, state, admitted, rows)
    most_passes = report_passes or (POLL_PASSES if idle else 0)
    state, ended, recordings = _run(
      network, c, shapes, state, active, most_passes
    )
    for i, answer in ended:
      active[i] = None
      yield answer
    if report_passes:
      in_progress = [i for i in range(rows) if active[i]]
      yield Progress({active[i].id: recordings[i] for i in in_progress})


_END = object()


def _is_in(request, cancelled):
  return request is not None and request.id in cancelled


def _cancelled_error():
  return UserError('the request was cancelled')


def _begin(network, c, request, length):
  """Returns Carry, Layout and shapes of one RowRequest, by request.begin.

  Raises:
    UserError: the request is too long, or has a value of the wrong type; or see
      `request.begin`.
  """
  _check_request(network, request)
  if len(request.row) > length:
    raise UserError(
      f'the request has {len(request.row)} tokens and slots, but rows have '
      f'room for {length}: shorten the prompt or ask for fewer tokens'
    )
  one_row = layouts.lay_out([request.row], [request.seed], request.settings)
  return begin(network, c, layouts.widen(one_row, length), num_slots=length)


def _check_request(network, request):
  """Raises a UserError if a field of a RowRequest has another type or range."""
  vocab_size = network.config.vocab_size
  whole = lambda x: isinstance(x, numbers.Integral) and not isinstance(x, bool)
  if not isinstance(request.row, (list, tuple)):
    raise UserError('row: must be a list of token ids, with None for slots')
  for i, token in enumerate(request.row):
    if token is not None and not (whole(token) and 0 <= token < vocab_size):
      raise UserError(
        f'row: element {i} is {token!r}, but must be None for a slot or a '
        f'token id in [0, {vocab_size})'
      )
  if not whole(request.seed):
    raise UserError(f'seed={request.seed!r}: must be an integer')
  if not isinstance(request.settings, Settings):
    raise UserError(
      'settings: must be sampling.settings.Settings, not '
      f'{type(request.settings).__name__}'
    )


def _run(network, c, shapes, state, active, most_passes):
  """Runs the batch until a row ends.

  Args:
    network: Network.
    c: SamplerConfig.
    shapes: from `request.begin`.
    state: admission.State.
    active: list of the RowRequest, or None, in each row.
    most_passes: number of passes after which to stop in any case; 0: no limit.

  Returns:
    The next State; a list of (row, Answer) for the rows that have ended; and
    the Recordings of all rows, [] if no row has ended and there is no limit.
  """
  carry, layout, cache = state
  is_active = np.array([request is not None for request in active])
  calls = int(carry.calls) + most_passes if most_passes else sampler.MOST
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
  recordings = []
  if ended.size or most_passes:
    recordings = recording.of_rows(carry, fill, valid)
  answers = [
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
  return State(carry, layout, cache), answers, recordings
