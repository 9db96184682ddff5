"""Serves a list of requests, each in one process if all have a copy.

See distributed/shares.py.
"""

import jax
import numpy as np

from maskdiff.distributed import shares
from maskdiff.distributed.mesh import whole_batch
from maskdiff.errors import UserError
from maskdiff.sampling.recording import Recording
from maskdiff.sampling.serve import Answer, serve

# Processes exchange their answers after about this many per row. Rows are idle
# at the end of an exchange, but a run that is killed has lost no more.
ANSWERS_PER_ROW = 16


def serve_all(network, c, requests, rows, length):
  """Yields an Answer to each request, in any order, in all processes.

  Args:
    network: Network.
    c: SamplerConfig.
    requests: list of RowRequest, the same in all processes.
    rows: number of rows of the batch, or of that of each process. It is
      rounded up to equal numbers on all devices.
    length: see `serve.serve`.

  Raises:
    UserError: see `serve.serve` and `shares.computed`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if not shares.is_divided(network.params):
    rows = whole_batch(mesh, min(rows, len(requests)))
    yield from serve(network, c, requests, rows, length)
    return
  processes = jax.process_count()
  rows = whole_batch(mesh, min(rows, -(-len(requests) // processes)))

  def work(indices, progress):
    by_id = {
      answer.id: answer
      for answer in serve(network, c, [some[i] for i in indices], rows, length)
    }
    return [_to_json(by_id[some[i].id]) for i in indices]

  size = ANSWERS_PER_ROW * rows * processes
  for start in range(0, len(requests), size):
    some = requests[start : start + size]
    items = [
      shares.Item(repr(request).encode(), request.row.count(None))
      for request in some
    ]
    found = shares.computed(network.params, items, work)
    for request, values in zip(some, found, strict=True):
      yield _from_json(request.id, *values)


def _to_json(answer):
  return [
    answer.recording and [x.tolist() for x in answer.recording],
    answer.forwards,
    answer.positions,
    answer.error and str(answer.error),
  ]


def _from_json(id, recording, forwards, positions, error):
  if recording:
    dtypes = np.int32, bool, np.int32, np.float32
    recording = Recording(*map(np.asarray, recording, dtypes))
  return Answer(
    id, recording, forwards, positions, UserError(error) if error else None
  )
