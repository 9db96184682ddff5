"""Puts new requests into rows of a batch while the other rows continue.

Without a cache, a new row joins the next forward pass. With a cache, a new row
needs a pass over its canvas first. If the cache is exact and other rows are
using it, this pass computes the new row only, and so it does for rows that wait
for such a pass. An approximate cache is made anew for every block, so a new row
waits for the next pass over all rows. Passes of its own were 20% slower in
benchmarks/serving.py, because they bring the blocks of the rows out of step.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.distributed.mesh import replicate
from maskdiff.model import cache as cache_lib
from maskdiff.model.cache import Cache
from maskdiff.sampling import passes, sampler
from maskdiff.sampling.state import Carry, Layout, in_progress


class State(NamedTuple):
  """State of a batch on devices, between two calls of `sampler.run`."""

  carry: Carry
  layout: Layout
  cache: Cache | None = None  # None if c.cache is 'none'


def admit(network, c, shapes, state, admitted, rows):
  """Returns the State of a batch with admitted requests in their rows.

  Args:
    network: Network.
    c: SamplerConfig.
    shapes: from `request.begin`.
    state: State, which is donated; None before the first request.
    admitted: dict from a row to the Carry and Layout of one request.
    rows: number of rows.
  """
  if not admitted:
    return state
  # The arrays have all rows. Rows without a new request get a copy of another
  # request, which is not used.
  any_row = next(iter(admitted.values()))
  new = jax.tree.map(
    lambda *x: np.concatenate(x) if np.ndim(x[0]) else x[0],
    *(tuple(admitted.get(i, any_row)) for i in range(rows)),
  )
  replaced = np.isin(np.arange(rows), list(admitted))
  if state is None:
    carry, layout = new
    carry = carry._replace(masked=carry.masked & replaced[:, None, None])
    # With the shardings of the results of `run`, so that all calls share a
    # program.
    cache = None if c.cache == 'none' else _empty_cache(network, c, layout)
    return State(*jax.jit(replicate)((carry, layout)), cache)
  carry, layout, cache = state
  if cache:
    broken = replaced & jax.device_get(carry.broken)
    for i in np.flatnonzero(broken):
      cache = _clear_row(cache, rows, np.int32(i))
  state = State(*_replace((carry, layout), new, replaced), cache)
  if cache and passes.exact_cache(network):
    # A row that waits for a pass over its canvas waits until no row uses its
    # cache. While requests are admitted, that may never happen.
    uses_cache, active = jax.device_get(
      (sampler.uses_cache(state.carry), in_progress(state.carry))
    )
    for i in np.flatnonzero(active & ~uses_cache) if uses_cache.any() else ():
      state = start_row(network, c, shapes, state, np.int32(i))
  return state


def abandon(state, rows):
  """Returns the State without the requests in some rows, which are then free.

  Args:
    state: State.
    rows: list of row numbers.
  """
  stays = ~np.isin(np.arange(len(state.layout.seeds)), rows)
  masked = _keep_rows(state.carry.masked, stays)
  return state._replace(carry=state.carry._replace(masked=masked))


@jax.jit
def _keep_rows(masked, stays):
  return replicate(masked & stays[:, None, None])


_empty_cache = jax.jit(passes.empty_cache, static_argnums=1)


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _clear_row(cache, rows, row):
  """Returns the Cache with zeros in a row.

  The keys and values of a broken row may be NaN. A NaN counts even where it is
  hidden, because its weight of 0 times NaN is NaN.
  """
  copies = _copies(cache, rows, row)
  k, v = jax.tree.map(lambda x: x.at[:, copies].set(0), (cache.k, cache.v))
  cleared = jnp.isin(jnp.arange(len(cache.labels.doc)), copies)[:, None]
  return cache_lib.Cache(k, v, cache_lib.hide(cache.labels, cleared))


def _copies(cache, rows, row):
  """Returns the rows of the cache that belong to a row of the batch.

  With guidance the second copies of all rows come after the first.
  """
  return row + rows * jnp.arange(len(cache.labels.doc) // rows)


@functools.partial(jax.jit, donate_argnums=0)
def _replace(old, new, replaced):
  """Returns the old Carry and Layout with some rows of the new ones."""

  def one(old, new):
    if not old.ndim:
      return new
    return jnp.where(replaced.reshape(-1, *[1] * (old.ndim - 1)), new, old)

  return replicate(jax.tree.map(one, old, new))


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnums=3)
def start_row(network, c, shapes, state, row):
  """Runs a denoising step of one row over its canvas, and fills its cache.

  Args:
    network: Network.
    c: SamplerConfig, with a cache.
    shapes: from `request.begin`.
    state: State.
    row: int32.

  Returns:
    The next State. Other rows do not change.
  """
  of_row = lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1) if x.ndim else x
  carry, layout = jax.tree.map(of_row, (state.carry, state.layout))
  places = layout.valid.shape[1]

  def step(shape):
    next_carry, cache = sampler.canvas_step(
      network, c, shape, layout, carry, None
    )
    return next_carry, cache_lib.widen(cache, places)

  steps = [functools.partial(step, shape) for shape in shapes]
  index = passes.choose_shape(network, c, shapes, carry, layout)
  carry, cache = jax.lax.switch(index, steps)
  carry = jax.tree.map(
    lambda old, new: (
      jax.lax.dynamic_update_slice_in_dim(old, new, row, 0) if old.ndim else new
    ),
    state.carry,
    carry,
  )
  copies = _copies(state.cache, len(state.layout.seeds), row)
  cache = cache_lib.put_rows(state.cache, copies, cache)
  return State(*replicate((carry, state.layout)), cache_lib.split(cache))
