"""Sampling: fill the masked slots of a canvas in a number of denoising steps.

A canvas is a row of tokens in which some positions are to be filled: the end
of a prompt, or gaps anywhere in a text. The positions to fill are its slots.
Blocks of `block_length` slots are filled left to right (one block: pure
diffusion; several: semi-autoregressive); within a block every step predicts
all masked slots (candidates.py) and a commit rule (remasking.py) keeps some of
them. Committed tokens are never revised. This is `generate` of LLaDA (arXiv
2502.09992, section 2.4), with gaps in place of a suffix. A network trained
with the autoregressive objective is sampled by the same loop in blocks of one
slot.

Only the slots are filled: a mask that stands elsewhere is context that the
network is not told, and stays. LLaDA's code lets masks of the prompt take part
in the choice and may then return masks in the answer.

`complete` is one compiled loop, `generate` its tokens alone; `walk` runs the
same step from Python and yields what there is in between, `trace` its canvases
alone.
"""

import functools

import jax
import numpy as np

from maskdiff.distributed.mesh import whole
from maskdiff.errors import UserError
from maskdiff.sampling import passes
from maskdiff.sampling.commit import advance
from maskdiff.sampling.request import begin


def generate(network, c, request):
  """Fills the canvas.

  Args:
    network: Network.
    c: SamplerConfig.
    request: Request.

  Returns:
    [B, L] int32, the filled canvas, on device.

  Raises:
    UserError: see `begin`; or the network's logits were NaN or infinite.
  """
  carry = complete(network, c, request)
  check(carry)
  return carry.canvas


def complete(network, c, request):
  """Fills the canvas and says what it took; arguments as for `generate`.

  Returns:
    The last Carry, on device. Rows that are `broken` still have masks.

  Raises:
    UserError: see `begin`.
  """
  carry, layout, shapes = begin(network, c, request)
  return run(network, c, shapes, carry, layout)


def trace(network, c, request):
  """Yields the canvas as NumPy before every step and after the last.

  Arguments and errors as for `generate`, and the same final result.
  """
  for carry, _ in walk(network, c, request):
    yield np.asarray(carry.canvas)


def walk(network, c, request):
  """Like `trace`, with all that is known at each moment.

  Yields:
    Carry; and [B, L] float32 as NumPy, the confidence of the tokens that the
    last step committed and NaN elsewhere: before the first step, and at slots
    given up behind an eos.
  """
  carry, layout, shapes = begin(network, c, request)
  # Placed like what a step returns, so that one program serves all steps.
  carry, layout = jax.jit(whole)((carry, layout))
  sure = np.full(carry.canvas.shape, np.nan, np.float32)
  fresh = shape = cache = None
  while True:
    yield carry, np.asarray(sure)
    if not np.asarray(carry.masked).any():
      break
    if fresh is not None and np.asarray(fresh).any():
      carry, fresh, sure = _follow(
        network, c, shape, carry, fresh, cache, layout
      )
    else:
      shape = shapes[int(_choose_shape(c, shapes, carry, layout))]
      carry, fresh, sure, cache = _refresh(network, c, shape, carry, layout)
  check(carry)


def check(carry):
  """Raises UserError if rows were given up."""
  rows = np.flatnonzero(jax.device_get(carry.broken)).tolist()
  if rows:
    raise broken_error(rows)


def broken_error(rows):
  """The UserError that is raised when rows were given up."""
  return UserError(
    f'the logits of row(s) {rows} were NaN or infinite: the weights are '
    'damaged or the training diverged; take an older checkpoint'
  )


def round_of(network, c, shape, carry, layout):
  """A pass over the canvas and, with a cache, those over windows after it.

  The second kind goes on until every row needs a new cache: because its block
  is complete, or by c.refresh. Rows that need one sooner wait.

  Args:
    shape: one of request.shapes.

  Returns:
    The next Carry.
  """
  carry, fresh, _, cache = refresh(network, c, shape, carry, layout)
  if c.cache == 'none':
    return carry

  def next_pass(state):
    return follow(network, c, shape, *state, cache, layout)[:2]

  carry, _ = jax.lax.while_loop(
    lambda state: state[1].any(), next_pass, (carry, fresh)
  )
  return carry


def refresh(network, c, shape, carry, layout):
  """One step of all rows by a pass over the canvas.

  Returns:
    What `commit.advance` returns; and the cache, or None if there is none.
  """
  logits, needed, cache = passes.over_canvas(network, c, shape, carry, layout)
  turn = carry.masked.any((1, 2))
  return *advance(network, c, carry, layout, logits, turn, needed), cache


def follow(network, c, shape, carry, fresh, cache, layout):
  """One step of the rows that the cache serves, by a pass over windows.

  Args:
    fresh: [B] bool, those rows.
    cache: from `refresh`.

  Returns:
    What `commit.advance` returns.
  """
  logits, needed = passes.over_windows(network, c, shape, carry, cache, layout)
  return advance(network, c, carry, layout, logits, fresh, needed)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _refresh(*args):
  *found, cache = refresh(*args)
  return *whole(found), cache


@functools.partial(jax.jit, static_argnums=(1, 2))
def _follow(*args):
  return whole(follow(*args))


_choose_shape = jax.jit(passes.choose_shape, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(1, 2))
def run(network, c, shapes, carry, layout, until=0):
  """Goes on until no more than `until` rows are in progress after a round.

  Args:
    network: as for `generate`.
    c: as for `generate`.
    shapes: from `begin`.
    carry: from `begin`.
    layout: from `begin`.
    until: int.

  Returns:
    The last Carry, whole on every device.
  """
  rounds = [functools.partial(round_of, network, c, shape) for shape in shapes]

  def next_round(carry):
    if len(rounds) == 1:
      return rounds[0](carry, layout)
    index = passes.choose_shape(c, shapes, carry, layout)
    return jax.lax.switch(index, rounds, carry, layout)

  in_progress = lambda carry: carry.masked.any((1, 2)).sum()
  return whole(
    jax.lax.while_loop(
      lambda carry: in_progress(carry) > until, next_round, carry
    )
  )
