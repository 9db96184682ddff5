"""Divides lists of work among processes that each have a copy of the model.

Each process computes its share on its own devices, and all processes receive
all results. If the parameters lie on the devices of several processes, the
arrays of a computation do too, and nothing is divided: all processes start the
same computations. interop/placement.py decides which of the two it is.
"""

import hashlib
import json
from typing import NamedTuple

import jax
import numpy as np
from jax._src import distributed  # barriers are not public
from jax.experimental import multihost_utils

from maskdiff.distributed import consensus
from maskdiff.distributed.runtime import BARRIER_TIMEOUT_S
from maskdiff.errors import UserError


class Item(NamedTuple):
  """A piece of work in a list that `computed` divides."""

  content: bytes  # must be the same in all processes
  cost: float  # processes receive items of similar cost


def is_divided(params):
  """Returns whether each of several processes has a copy of the parameters."""
  return jax.process_count() > 1 and all(
    x.is_fully_addressable for x in jax.tree.leaves(params)
  )


def computed(params, items, work, progress=None):
  """Returns the results of a list of work, the same list in all processes.

  All processes must call this function with the same items. It calls `work` for
  all items if the work is not divided.

  Args:
    params: parameter tree that `work` computes with.
    items: list of Item.
    work: function from (sorted list of indices of items, progress) to the
      list of their results. If the work is divided, results pass through JSON:
      arrays and tuples become lists.
    progress: function without arguments, called after each item; or None. Each
      item of this process then counts for one of every process.

  Raises:
    UserError: `work` raised it, in this or another process; or the processes
      have different items.
  """
  if not is_divided(params):
    return work(list(range(len(items))), progress)
  digest = hashlib.blake2b(digest_size=8)
  for item in items:
    digest.update(b'%d ' % len(item.content) + item.content)
  consensus.agree({'the input': digest.hexdigest()})
  shares = divide([item.cost for item in items], jax.process_count())
  own = shares[jax.process_index()]
  results = [None] * len(items)
  counted = progress and _counted(progress, len(items))
  for share, values in zip(
    shares, exchange(lambda: work(own, counted) if own else []), strict=True
  ):
    for i, value in zip(share, values, strict=True):
      results[i] = value
  return results


def divide(costs, count):
  """Returns the indices of each process, a list of sorted lists.

  The items are dealt in turn, the most expensive first.

  Args:
    costs: list of numbers.
    count: number of processes.
  """
  order = sorted(range(len(costs)), key=lambda i: -costs[i])
  return [sorted(order[process::count]) for process in range(count)]


def exchange(work):
  """Returns a list with the result of `work` in each process, in all processes.

  Args:
    work: function without arguments; returns a JSON value, or NumPy arrays in
      it. It may take hours.

  Raises:
    UserError: in all processes, if `work` raised it in any of them. The message
      is that of the process with the lowest index.
  """
  try:
    outcome = {'value': work()}
  except UserError as error:
    outcome = {'error': str(error)}
  text = json.dumps(outcome, default=lambda x: x.tolist()).encode()
  # The collective operations below have short time limits on some backends.
  distributed.global_state.client.wait_at_barrier(
    f'maskdiff_exchange_{consensus.next_call()}', BARRIER_TIMEOUT_S * 1000
  )
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(text)] = np.frombuffer(text, np.uint8)
  gathered = multihost_utils.process_allgather(padded)
  outcomes = [
    json.loads(row[:size].tobytes())
    for row, size in zip(gathered, sizes, strict=True)
  ]
  for outcome in outcomes:
    if 'error' in outcome:
      raise UserError(outcome['error'])
  return [outcome['value'] for outcome in outcomes]


def _counted(progress, total):
  """Returns a function that counts an item of each process, up to a total."""
  left = total

  def count():
    nonlocal left
    for _ in range(min(left, jax.process_count())):
      progress()
      left -= 1

  return count
