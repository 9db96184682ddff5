"""Sampling: fills the masked slots of a canvas in a number of denoising steps.

A canvas is a row of tokens in which some positions, the slots, are to be
filled: after a prompt, or in gaps anywhere in a text. Slots are filled in
blocks of `block_length`, left to right. One block is pure diffusion; several
are semi-autoregressive. A network trained left to right is sampled by the same
loop in blocks of one slot. Committed tokens are never revised.

This is `generate` of LLaDA (arXiv 2502.09992, section 2.4), which continues
prompts, extended to gaps. A mask token outside of the slots is context and
stays. In LLaDA's code masks in the prompt compete with the slots, so that masks
may remain in the answer.

The file reads top to bottom:

1. `generate` and `complete`: request.begin divides the slots into blocks, and
   `run` compiles one loop over rounds.
2. `run_round`: a denoising step by a forward pass over the canvas and, with a
   cache, further steps by passes over a window (passes.py).
3. `denoise`: one denoising step, given the logits of the current block. The
   network predicts a token and a confidence for each slot (commit.predict,
   candidates.py), the remasking rule selects some of the predictions
   (remasking.py), and their tokens are committed.

The last Carry has the step and the confidence of every slot; recording.py reads
them. state.py defines the state of the loop, Carry and Layout, and explains the
letters in shapes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.distributed.mesh import replicate
from maskdiff.errors import UserError
from maskdiff.sampling import commit, passes, remasking
from maskdiff.sampling.request import begin
from maskdiff.sampling.state import Carry, current, in_progress


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
  return run(network, c, shapes, carry, layout)


@functools.partial(jax.jit, static_argnums=(1, 2))
def run(network, c, shapes, carry, layout, max_active=0, max_calls=2**31 - 1):
  """Runs rounds until at most `max_active` rows are in progress.

  Args:
    network: Network.
    c: SamplerConfig.
    shapes: from `request.begin`.
    carry: Carry.
    layout: Layout.
    max_active: int.
    max_calls: int; ends too when carry.calls has reached this number.

  Returns:
    The last Carry, replicated on all devices.
  """
  rounds = [functools.partial(run_round, network, c, shape) for shape in shapes]

  def next_round(carry):
    if len(rounds) == 1:
      return rounds[0](carry, layout)
    index = passes.choose_shape(c, shapes, carry, layout)
    return jax.lax.switch(index, rounds, carry, layout)

  def goes_on(carry):
    many = in_progress(carry).sum() > max_active
    return many & (carry.calls < max_calls)

  return replicate(jax.lax.while_loop(goes_on, next_round, carry))


def run_round(network, c, shape, carry, layout):
  """Runs a step by a pass over the canvas, then the steps its cache serves.

  Passes over a window are repeated until every row needs a new cache, because
  its block is complete or c.refresh steps are done. Rows that need a new cache
  sooner wait for the others.

  Args:
    network: Network.
    c: SamplerConfig.
    shape: one of passes.shapes.
    carry: Carry.
    layout: Layout.

  Returns:
    The next Carry.
  """
  carry, use_cache, cache = canvas_step(network, c, shape, carry, layout)
  if c.cache == 'none':
    return carry

  def next_step(state):
    return window_step(network, c, shape, *state, cache, layout)

  carry, _ = jax.lax.while_loop(
    lambda state: state[1].any(), next_step, (carry, use_cache)
  )
  return carry


def canvas_step(network, c, shape, carry, layout):
  """Runs a denoising step of all rows in progress, by a pass over the canvas.

  Returns:
    The results of `denoise`; and the cache, None if c.cache is 'none'.
  """
  logits, num_positions, cache = passes.over_canvas(
    network, c, shape, carry, layout
  )
  active = in_progress(carry)
  return *denoise(
    network, c, carry, layout, logits, active, num_positions
  ), cache


def window_step(network, c, shape, carry, use_cache, cache, layout):
  """Runs a denoising step by a pass over a window, with cached keys.

  Args:
    network: as for `run_round`.
    c: as for `run_round`.
    shape: as for `run_round`.
    carry: as for `run_round`.
    layout: as for `run_round`.
    use_cache: [B] bool, the rows that take the step.
    cache: from `canvas_step`.

  Returns:
    The results of `denoise`.
  """
  logits, num_positions = passes.over_window(
    network, c, shape, carry, cache, layout
  )
  return denoise(network, c, carry, layout, logits, use_cache, num_positions)


@jax.named_scope('part(sampling: choice of tokens)')
def denoise(network, c, carry, layout, logits, active, num_positions):
  """Runs one denoising step: commits some of the predictions for a block.

  A block that is complete early skips its remaining steps.

  Args:
    network: Network.
    c: SamplerConfig.
    carry: Carry.
    layout: Layout.
    logits: [B, S, V] float32, of each row's current block.
    active: [B] bool, the rows that take a step; other rows do not change.
    num_positions: [B] int32, number of positions computed for each row.

  Returns:
    The next Carry; and [B] bool, active rows whose next step can use the cache.
  """
  block, step, settings = carry.block, carry.step, layout.settings
  slots = current(layout.slots, block)  # [B, S]
  masked = current(carry.masked, block) & active[:, None]
  draw_keys, rule_keys = commit.step_keys(layout.seeds, block, step)

  # The network's predictions.
  token, confidence = commit.predict(network, c, settings, logits, draw_keys)
  broken = jnp.any(masked & jnp.isnan(confidence), axis=1)

  # The remasking rule selects some of them.
  num_slots, num_masked = current(layout.num_slots, block), masked.sum(axis=1)
  budget = commit.budget(c, settings, num_slots, num_masked, step, layout.steps)
  rule = remasking.RULES[c.remasking]
  committed = rule(confidence, masked, budget, rule_keys) & ~broken[:, None]

  # Their tokens are committed; the other slots stay masked.
  total = carry.total_steps + active
  write = lambda array, value: commit.write(array, slots, committed, value)
  canvas = write(carry.canvas, token)
  filled_at = write(carry.filled_at, total[:, None])
  still_masked = current(carry.masked, block) & ~committed
  masked = carry.masked.at[jnp.arange(len(block)), block].set(
    still_masked, mode='drop'
  )
  masked &= ~broken[:, None, None]
  if network.eos_id >= 0:  # else request.begin refuses stop_at_eos
    canvas, masked, filled_at = jax.lax.cond(
      settings.stop_at_eos.any(),
      functools.partial(commit.end_at_eos, network.eos_id, layout, total),
      lambda *unchanged: unchanged,
      *(canvas, masked, filled_at),
    )

  # A row without masks in its block moves on to the next block.
  complete = active & ~current(masked, block).any(axis=1)
  step = jnp.where(complete, 0, step + active)
  carry = Carry(
    block=block + complete,
    step=step,
    total_steps=total,
    canvas=canvas,
    masked=masked,
    filled_at=filled_at,
    confidence=write(carry.confidence, confidence),
    calls=carry.calls + 1,
    forwards=carry.forwards + active * jnp.where(settings.guidance > 0, 2, 1),
    positions=carry.positions + active * num_positions,
    broken=carry.broken | broken,
  )
  use_cache = active & ~complete & in_progress(carry)
  if c.refresh:
    use_cache &= step % c.refresh != 0
  return carry, use_cache & (c.cache != 'none')


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
