"""A batch of the sampler that waits for requests between its passes."""

import collections

from maskdiff.sampling.serve import Answer, RowRequest, serve
from maskdiff.sampling.settings import DEFAULT

# Rows of the shorter batch have this share of the context, if it is not less
# than SHORTEST.
SHARE, SHORTEST = 4, 64
# Passes after which new text is streamed and new requests join.
REPORT_PASSES = 4


def default_lengths(network, c, context):
  """Returns the row lengths of a server, a list in increasing order.

  Networks that see all masks of an answer compute whole rows, so that short
  requests get a batch with shorter rows. For the other networks, the program of
  one batch has several lengths; see sampling/passes.py.

  Args:
    network: Network.
    c: SamplerConfig.
    context: tokens of a training row.
  """
  one_program = network.block_length or c.lookahead >= 0
  if one_program or context // SHARE < SHORTEST:
    return [context]
  return [context // SHARE, context]


class Batch:
  """Rows of one length, and the requests that wait for them.

  Attributes:
    length: number of tokens and slots for which a row has room.
    waiting: deque of RowRequest.
    taken: number of requests in rows.
  """

  def __init__(self, network, c, rows, length, cancelled):
    """Makes a batch; see `serve` for the arguments."""
    self.length, self.waiting, self.taken = length, collections.deque(), 0
    self._cancelled = cancelled
    self._items = serve(
      *(network, c, self._requests(), rows, length), REPORT_PASSES, cancelled
    )

  @property
  def busy(self):
    """Whether there are requests. Only then `step` may be called."""
    return bool(self.waiting or self.taken)

  def step(self):
    """Runs a few passes; returns a serve.Progress, or the Answer of a row."""
    item = next(self._items)
    self.taken -= isinstance(item, Answer)
    return item

  def warm_up(self):
    """Compiles all programs, by two requests that are cancelled.

    The second request joins the batch while the first is in a row, because an
    exact cache has a program for this case. With one row, it joins afterwards.
    """
    row = [None] * self.length
    requests = [RowRequest(('warm-up', i), row, 0, DEFAULT) for i in range(2)]
    for request in requests:
      self.waiting.append(request)
      self.step()
    for request in requests:
      self._cancelled.add(request.id)
      for _ in range(2):  # the Answer of the request; passes of the other
        if self.busy:
          self.step()
    while self.busy:
      self.step()
    self._cancelled.clear()

  def _requests(self):
    while True:
      if self.waiting:
        self.taken += 1
        yield self.waiting.popleft()
      else:
        yield None
