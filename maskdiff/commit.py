"""What a denoising step commits, given the logits of a block's slots."""

import jax.numpy as jnp

from maskdiff import candidates, remasking
from maskdiff.schedule import Schedule


def choose(c, logits, keys):
  """Draws a token per slot and says how sure the network is.

  Args:
    c: SamplerConfig.
    logits: [B, S, V] float32.
    keys: [B] PRNG keys.

  Returns:
    token [B, S] int32, and confidence [B, S] float32.
  """
  never = () if c.predict_mask else (c.mask_id,)
  never += (c.eos_id,) if c.logits_eos_inf else ()
  logits = candidates.suppress(logits, never)
  token = candidates.draw(logits, c.temperature, c.top_k, c.top_p, keys)
  if not c.confidence_eos_eot_inf:
    return token, candidates.CONFIDENCES[c.confidence](logits, token)
  last = tuple(i for i in (c.eos_id, c.eot_id) if i >= 0)
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
    steps: steps for the block.

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
  after it is cut (see request.cut). The slots after it become eos.

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
