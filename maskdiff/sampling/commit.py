"""What a denoising step commits, given the logits of a block's slots."""

import jax
import jax.numpy as jnp

from maskdiff.objectives.schedule import Schedule
from maskdiff.sampling import candidates, remasking
from maskdiff.sampling.request import Carry


def advance(network, c, carry, layout, logits, turn, needed):
  """Commits some of the predictions for the masked slots of a block.

  A block that is complete before its steps are over gives them up.

  Args:
    network: Network.
    c: SamplerConfig.
    carry: Carry.
    layout: Layout.
    logits: [B, S, V] float32, of each row's current block.
    turn: [B] bool, the rows that take a step; the others stay as they are.
    needed: [B] int32, positions of a row that the pass was about.

  Returns:
    The next Carry; [B] bool, the rows of `turn` that have steps of this block
    left before they need a new cache; and [B, L] float32, the confidence of
    what was committed, NaN elsewhere.
  """
  block, step = carry.block, carry.step
  slots = of_block(layout.slots, block)
  masked = of_block(carry.masked, block) & turn[:, None]  # [B, S]
  fold = jax.vmap(jax.random.fold_in)
  keys = fold(fold(jax.vmap(jax.random.key)(layout.seeds), block), step)
  draw_keys, keep_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
  token, confidence = choose(network, c, logits, draw_keys)
  bad = jnp.any(masked & jnp.isnan(confidence), axis=1)
  num_slots, num_masked = of_block(layout.num_slots, block), masked.sum(axis=1)
  allowed = budget(c, num_slots, num_masked, step, layout.steps)
  keep = remasking.RULES[c.remasking](confidence, masked, allowed, keep_keys)
  keep &= ~bad[:, None]

  batch, length = carry.canvas.shape
  rows = jnp.arange(batch)[:, None]
  kept = jnp.where(keep, slots, length)
  canvas = carry.canvas.at[rows, kept].set(token, mode='drop')
  sure = jnp.full(canvas.shape, jnp.nan)
  sure = sure.at[rows, kept].set(confidence, mode='drop')
  left = of_block(carry.masked, block) & ~keep
  left = carry.masked.at[rows[:, 0], block].set(left, mode='drop')
  left &= ~bad[:, None, None]
  if c.stop_at_eos:
    canvas, left = stop(network.eos_id, canvas, left, layout)
  done = turn & ~of_block(left, block).any(axis=1)
  step = jnp.where(done, 0, step + turn)
  carry = Carry(
    block=block + done,
    step=step,
    canvas=canvas,
    masked=left,
    calls=carry.calls + 1,
    forwards=carry.forwards + turn * (2 if c.guidance else 1),
    positions=carry.positions + turn * needed,
    broken=carry.broken | bad,
  )
  again = turn & ~done & left.any((1, 2))
  if c.refresh:
    again &= step % c.refresh != 0
  return carry, again & (c.cache != 'none'), sure


def of_block(x, block):
  """[B, ...], each row's own block of [B, blocks, ...]."""
  rows = jnp.arange(len(x))
  return x[rows, jnp.minimum(block, x.shape[1] - 1)]


def choose(network, c, logits, keys):
  """Draws a token per slot and says how sure the network is.

  Args:
    network: Network.
    c: SamplerConfig.
    logits: [B, S, V] float32.
    keys: [B] PRNG keys.

  Returns:
    token [B, S] int32, and confidence [B, S] float32.
  """
  never = () if network.predict_mask else (network.mask_id,)
  never += (network.eos_id,) if c.logits_eos_inf else ()
  logits = candidates.suppress(logits, never)
  token = candidates.draw(logits, c.temperature, c.top_k, c.top_p, keys)
  if not c.confidence_eos_eot_inf:
    return token, candidates.CONFIDENCES[c.confidence](logits, token)
  last = tuple(i for i in (network.eos_id, c.eot_id) if i >= 0)
  logits = candidates.suppress(logits, last)
  confidence = candidates.CONFIDENCES[c.confidence](logits, token)
  return token, jnp.where(jnp.isin(token, jnp.array(last)), 0.0, confidence)


def budget(c, num_slots, num_masked, step, steps):
  """What the commit rule is given for a step of a block.

  Args:
    c: SamplerConfig.
    num_slots: [B] int32, slots of the block.
    num_masked: [B] int32, of them masked now.
    step: [B] int32, 0-based step within the block.
    steps: [B] int32, steps for the block.

  Returns:
    [B] int32 tokens, or the number that the rule asks for.
  """
  if c.remasking in ('threshold', 'factor'):
    return getattr(c, c.remasking)
  ratio = Schedule(c.schedule).mask_ratio
  before, after = 1 - step / steps, 1 - (step + 1) / steps  # times t
  if c.remasking == 'ancestral':
    return 1 - ratio(after) / ratio(before)
  if c.schedule == 'linear':
    return remasking.quota(num_slots, step, steps)
  return remasking.quota_to(ratio(after), num_slots, num_masked)


def stop(eos_id, canvas, masked, layout):
  """Ends rows whose text is complete up to its first eos.

  Exact: what stands before the eos is never revised, and what would stand
  after it is cut (see layouts.cut). Slots after it that are open become eos.

  Args:
    eos_id: int.
    canvas: [B, L] int32.
    masked: [B, blocks, S] bool.
    layout: Layout.

  Returns:
    canvas and masked, with the slots of rows that ended no longer masked.
  """
  batch, length = canvas.shape
  slots = layout.slots.reshape(batch, -1)
  is_open = masked.reshape(batch, -1)
  rows = jnp.arange(batch)[:, None]
  eos = canvas[rows, jnp.minimum(slots, length - 1)] == eos_id
  past = jnp.cumsum(eos & (slots < length) & ~is_open, axis=1) > 0
  ended = past.any(axis=1) & ~jnp.any(is_open & ~past, axis=1)
  give_up = is_open & ended[:, None]
  canvas = canvas.at[rows, jnp.where(give_up, slots, length)].set(
    eos_id, mode='drop'
  )
  return canvas, masked & ~ended[:, None, None]
