"""Sampling: fills the masked slots of a canvas in a number of denoising steps.

A canvas is a row of tokens in which some positions, the slots, are to be
filled: after a prompt, or in gaps anywhere in a text. Slots are filled in
blocks of `block_length`, left to right. One block is pure diffusion; several
are semi-autoregressive. A network trained left to right is sampled by the same
loop in blocks of one slot, and a network trained on blocks in its own blocks,
or in parts of them. If it predicts windows, a step commits several slots of a
window, mostly from left to right. Committed tokens are never revised.

This is `generate` of LLaDA (arXiv 2502.09992, section 2.4), which continues
prompts, extended to gaps. A mask token outside of the slots is context and
stays. In LLaDA's code masks in the prompt compete with the slots, so that masks
may remain in the answer.

The file reads top to bottom:

1. `generate` and `complete`: request.begin divides the slots into blocks, and
   `run` compiles one loop over rounds.
2. `run_round`: a denoising step with a forward pass over the canvas and, with a
   cache, more steps with passes over a window (passes.py).
3. `denoise`: one denoising step, given the logits of the current block. The
   network predicts a token and a confidence for each slot (commit.predict,
   candidates.py), the remasking rule selects some of the predictions
   (remasking.py), and their tokens are committed.

The last Carry has the step and the confidence of every slot; recording.py reads
them. state.py defines the state of the loop, Carry and Layout, and explains the
letters in shapes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.distributed.mesh import replicate
from maskdiff.errors import UserError
from maskdiff.model import cache as cache_lib
from maskdiff.sampling import commit, drafts, passes, speculation, windows
from maskdiff.sampling.block_window import over_blocks
from maskdiff.sampling.request import begin
from maskdiff.sampling.state import (
  Carry,
  Draft,
  current,
  has_leading_slot,
  in_progress,
  index_in_step,
  put_slots_of_step,
  slots_of_step,
)


def generate(network, c, request):
  """Returns the canvas with its slots filled, [B, L] int32 on device.

  Args:
    network: Network.
    c: SamplerConfig.
    request: Request, with the settings of its rows.

  Raises:
    UserError: see `request.begin`; or logits were NaN or infinite.
  """
  carry = complete(network, c, request)
  check(carry)
  return carry.canvas


def complete(network, c, request):
  """Fills the slots and counts the work; arguments as for `generate`.

  Returns:
    The last Carry, on device. `broken` rows still have masks.

  Raises:
    UserError: see `request.begin`.
  """
  carry, layout, shapes = begin(network, c, request)
  return run(network, c, shapes, carry, layout)[0]


MOST = np.int32(2**31 - 1)  # no limit of `calls`


class Limits(NamedTuple):
  """Conditions under which `run` returns; int32 each."""

  active: jax.Array = np.int32(0)  # at most this many rows are in progress
  calls: jax.Array = MOST  # `carry.calls` has reached this number


@functools.partial(jax.jit, static_argnums=(1, 2), donate_argnames='cache')
def run(network, c, shapes, carry, layout, cache=None, limits=None):
  """Runs rounds until a limit is reached, by default until all rows have ended.

  Args:
    network: Network.
    c: SamplerConfig.
    shapes: from `request.begin`.
    carry: Carry.
    layout: Layout.
    cache: Cache of all rows and positions, which is donated. None: a new one;
      `cached` must then be False in all rows of the Carry.
    limits: Limits.

  Returns:
    The last Carry, replicated on all devices; and the Cache, None if c.cache is
    'none'.
  """
  limits = limits or Limits()
  if c.cache != 'none' and cache is None:
    cache = passes.empty_cache(network, c, layout)
  rounds = [
    functools.partial(run_round, network, c, shape, layout, limits)
    for shape in shapes
  ]

  def next_round(state):
    if len(rounds) == 1:
      return rounds[0](*state)
    index = passes.choose_shape(network, c, shapes, state[0], layout)
    return jax.lax.switch(index, rounds, *state)

  carry, cache = jax.lax.while_loop(
    lambda state: _below_limits(state[0], limits), next_round, (carry, cache)
  )
  return replicate(carry), cache and cache_lib.split(cache)


def _below_limits(carry, limits):
  many = in_progress(carry).sum() > limits.active
  return many & (carry.calls < limits.calls)


def run_round(network, c, shape, layout, limits, carry, cache):
  """Runs a step over the canvas, then steps over windows that use its cache.

  If the cache can be used by some rows already, the step over the canvas is
  skipped. Steps over windows are repeated until every row needs a pass over the
  canvas; rows that need it earlier wait for the others. The round also ends
  when a limit is reached, or when a longer shape is needed.

  Args:
    network: Network.
    c: SamplerConfig.
    shape: one of passes.shapes.
    layout: Layout.
    limits: Limits.
    carry: Carry.
    cache: Cache of all positions, or None.

  Returns:
    The next Carry and Cache.
  """
  over_canvas = functools.partial(canvas_step, network, c, shape, layout)
  over_window = functools.partial(window_step, network, c, shape, layout)
  if cache is None:
    return over_canvas(carry, cache)

  def window_is_next(state):
    carry, _ = state
    fits = passes.covers(network, c, shape, carry, layout)
    return uses_cache(carry).any() & _below_limits(carry, limits) & fits

  first_places = cache_lib.first_places(cache, shape[0])
  state = jax.lax.cond(
    uses_cache(carry).any(),
    lambda *state: state,
    over_canvas,
    *(carry, first_places),
  )
  carry, first_places = jax.lax.while_loop(
    window_is_next, lambda state: over_window(*state), state
  )
  return carry, cache_lib.replace_first_places(cache, first_places)


def uses_cache(carry):
  """Returns [B] bool, rows whose next step is a pass over a window."""
  return carry.cached & in_progress(carry)


def canvas_step(network, c, shape, layout, carry, cache):
  """Runs a denoising step of all rows in progress, by a pass over the canvas.

  Args:
    network: as for `run_round`.
    c: as for `run_round`.
    shape: as for `run_round`.
    layout: as for `run_round`.
    carry: as for `run_round`.
    cache: Cache of shape[0] positions, which is replaced; or None.

  Returns:
    The next Carry and Cache.
  """
  del cache
  over = windows.over_canvas if network.window_length else passes.over_canvas
  over = drafts.over_canvas if network.draft_length else over
  outputs, num_positions, cache = over(network, c, shape, carry, layout)
  active = in_progress(carry)
  carry = denoise(network, c, carry, layout, outputs, active, num_positions)
  return carry, cache


def window_step(network, c, shape, layout, carry, cache):
  """Runs a denoising step of the rows that can use the cache.

  Arguments and results as for `canvas_step`.
  """
  over = over_blocks if network.block_length else passes.over_window
  over = windows.over_cache if network.window_length else over
  over = drafts.over_cache if network.draft_length else over
  outputs, num_positions, cache = over(network, c, shape, carry, cache, layout)
  active = uses_cache(carry)
  carry = denoise(network, c, carry, layout, outputs, active, num_positions)
  return carry, cache


@jax.named_scope('part(sampling: choice of tokens)')
def denoise(network, c, carry, layout, outputs, active, num_positions):
  """Runs one denoising step: commits some of the predictions for a block.

  A block that is complete early skips its remaining steps.

  Args:
    network: Network.
    c: SamplerConfig.
    carry: Carry.
    layout: Layout.
    outputs: logits [B, S, V] float32 of each row's current block; or hidden
      states [B, W, D, E] of windows; or the drafter.Pass of a network that has
      a drafter.
    active: [B] bool, the rows that take a step; other rows do not change.
    num_positions: [B] int32, number of positions computed for each row.

  Returns:
    The next Carry.
  """
  block, step, settings = carry.block, carry.step, layout.settings
  masked = slots_of_step(network, carry.masked, block)
  choice = _choose(network, c, carry, layout, outputs, masked & active[:, None])

  # Some tokens are committed; the other slots stay masked.
  total, committed = carry.total_steps + active, choice.committed
  if network.ahead and network.eos_id >= 0:
    committed = commit.up_to_eos(network, settings, choice.token, committed)
  is_open = masked & ~committed
  index = index_in_step(network, layout, block)
  at_positions = lambda x: commit.at_positions(x, index)
  is_new = at_positions(committed)
  canvas = jnp.where(is_new, at_positions(choice.token), carry.canvas)
  filled_at = jnp.where(is_new, total[:, None], carry.filled_at)
  masked = put_slots_of_step(network, carry.masked, block, is_open)
  masked &= ~choice.broken[:, None, None]
  if network.eos_id >= 0:  # else request.begin refuses stop_at_eos
    canvas, masked, filled_at = jax.lax.cond(
      settings.stop_at_eos.any(),
      functools.partial(commit.end_at_eos, network.eos_id, layout, total),
      lambda *unchanged: unchanged,
      *(canvas, masked, filled_at),
    )

  # A row without masks in its block moves on to the next block.
  complete = active & ~current(masked, block).any(axis=1)
  advance = complete
  if network.ahead:
    advance = active * windows.num_complete(network, layout, block, is_open)
  step = jnp.where(complete, 0, step + (active & ~choice.leads))
  confidence = jnp.where(
    is_new, at_positions(choice.confidence), carry.confidence
  )
  after = Carry(
    block=block + advance,
    step=step,
    total_steps=total,
    canvas=canvas,
    masked=masked,
    filled_at=filled_at,
    confidence=confidence,
    calls=carry.calls + 1,
    forwards=carry.forwards + active * jnp.where(settings.guidance > 0, 2, 1),
    positions=carry.positions + active * num_positions,
    cached=carry.cached,
    broken=carry.broken | choice.broken,
    draft=carry.draft,
  )
  if choice.draft is not None:
    draft = windows.keep_draft(carry, after, layout, choice.draft, active)
    after = after._replace(draft=draft)
  next_uses_cache = _next_uses_cache(network, c, carry, after, layout, complete)
  return after._replace(cached=jnp.where(active, next_uses_cache, carry.cached))


class _Choice(NamedTuple):
  """The predictions of a step for its S slots, and which are committed."""

  token: jax.Array  # [B, S] int32
  confidence: jax.Array  # [B, S] float32
  committed: jax.Array  # [B, S] bool
  leads: jax.Array  # [B] bool, rows that commit a leading slot
  broken: jax.Array  # [B] bool, rows whose logits are NaN or infinite
  draft: Draft | None = None  # of the slots after the committed ones


def _choose(network, c, carry, layout, outputs, masked):
  """Returns the _Choice of a step.

  Args:
    network: Network.
    c: SamplerConfig.
    carry: Carry before the step.
    layout: Layout.
    outputs: as for `denoise`.
    masked: [B, S] bool, slots that may be committed.
  """
  settings, keys = layout.settings, commit.noise_of_step(layout, carry)
  if network.ahead:  # up to given tokens
    masked &= windows.in_first_run(network, layout, carry.block)
  if carry.draft is not None:
    logits, propose = (
      drafts.proposals(network, carry, layout, outputs)
      if network.draft_length
      else windows.proposals(network, outputs)
    )
    token, confidence, number, draft = speculation.verify(
      network, c, settings, carry.draft, logits, propose, keys
    )
    committed = masked & (jnp.arange(masked.shape[1]) < number[:, None])
    broken = jnp.any(committed & jnp.isnan(confidence), axis=1)
    leads = jnp.zeros_like(broken)
    committed &= ~broken[:, None]
    return _Choice(token, confidence, committed, leads, broken, draft)
  # The network's predictions.
  logits = outputs
  if network.window_length:
    logits = windows.logits(network, outputs)
  token, confidence = commit.predict(network, c, settings, logits, keys[0])
  broken = jnp.any(masked & jnp.isnan(confidence), axis=1)
  # The remasking rule selects some of them.
  committed, leads = commit.select(
    network, c, layout, carry, confidence, masked, keys[1]
  )
  committed &= ~broken[:, None]
  return _Choice(token, confidence, committed, leads, broken)


def _next_uses_cache(network, c, carry, after, layout, complete):
  """Returns [B] bool, whether the next step of a row can use the cache.

  Args:
    network: Network.
    c: SamplerConfig.
    carry: Carry before the step.
    after: Carry after the step, except `cached`.
    layout: Layout.
    complete: [B] bool, rows whose block is complete.
  """
  if c.cache == 'none':
    return jnp.zeros_like(complete)
  if network.ahead:
    return windows.continues(carry, after, layout)
  slots = current(layout.slots, carry.block)  # [B, S]
  next_slot = current(layout.slots, after.block)[:, 0]
  if network.block_length:
    # A window reaches from the block before to the end of the block.
    # A leading slot needs the block before only.
    size = network.block_length
    step = next_slot // size - slots[:, 0] // size
    if network.config.predict_next:
      leads = has_leading_slot(network, layout, after.block)
      return (step == 0) | ((step == 1) & leads)
    return step <= 1
  if passes.exact_cache(network):
    # Given tokens between two slots are not in the cache yet.
    return next_slot == slots[:, -1] + 1
  if not c.refresh:
    return ~complete
  return ~complete & (after.step % c.refresh != 0)


def check(carry):
  """Raises a UserError if rows were abandoned."""
  rows = np.flatnonzero(jax.device_get(carry.broken)).tolist()
  if rows:
    raise broken_error(f'row(s) {rows}')


def broken_error(rows):
  """Returns the UserError for abandoned rows, which `rows` names."""
  return UserError(
    f'the logits of {rows} were NaN or infinite: the weights are damaged or '
    'the training diverged; use an older checkpoint'
  )
