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
import jax.numpy as jnp
import numpy as np

from maskdiff import candidates, remasking
from maskdiff.errors import UserError
from maskdiff.mesh import whole
from maskdiff.model import bind
from maskdiff.objective import show
from maskdiff.request import (  # noqa: F401, for the callers of this file
  Carry,
  Layout,
  SamplerConfig,
  continue_prompts,
  cut,
  fill_gaps,
  prepare,
)
from maskdiff.schedule import Schedule


def generate(model_config, c, params, canvas, fill, valid, seeds):
  """Fills the canvas.

  Args:
    model_config: model.TransformerConfig.
    c: SamplerConfig.
    params: parameter tree.
    canvas: [B, L] int32; what stands at the slots does not matter.
    fill: [B, L] bool, the slots.
    valid: [B, L] bool, False on the padding of short rows.
    seeds: [B] int >= 0, one per row; a row's result depends on its own alone,
      not on the other rows, if these have no more than c.gen_length slots.

  Returns:
    [B, L] int32, the filled canvas, on device.

  Raises:
    UserError: see `prepare`; or the network's logits were NaN or infinite.
  """
  carry = complete(model_config, c, params, canvas, fill, valid, seeds)
  check(carry)
  return carry.canvas


def complete(model_config, c, params, canvas, fill, valid, seeds):
  """Fills the canvas and says what it took; arguments as for `generate`.

  Returns:
    The last Carry, on device. Rows that are `broken` still have masks.

  Raises:
    UserError: see `prepare`.
  """
  carry, layout = prepare(c, canvas, fill, valid, seeds)
  return _generate(model_config, c, params, carry, layout)


def trace(model_config, c, params, canvas, fill, valid, seeds):
  """Yields the canvas as NumPy before every step and after the last.

  Arguments and errors as for `generate`, and the same final result.
  """
  for carry, _ in walk(model_config, c, params, canvas, fill, valid, seeds):
    yield np.asarray(carry.canvas)


def walk(model_config, c, params, canvas, fill, valid, seeds):
  """Like `trace`, with all that is known at each moment.

  Yields:
    Carry, on device; and [B, L] float32 as NumPy, the confidence of the tokens
    that the last step committed and NaN elsewhere: before the first step, and
    at slots given up behind an eos.
  """
  carry, layout = prepare(c, canvas, fill, valid, seeds)
  sure = np.full(carry.canvas.shape, np.nan, np.float32)
  while True:
    yield carry, np.asarray(sure)
    if not carry.masked.any():
      break
    carry, sure = _one_step(model_config, c, params, carry, layout)
  check(carry)


def check(carry):
  """Raises UserError if rows were given up."""
  rows = np.flatnonzero(jax.device_get(carry.broken)).tolist()
  if rows:
    raise UserError(
      f'the logits of row(s) {rows} were NaN or infinite: the weights are '
      'damaged or the training diverged; take an older checkpoint'
    )


def denoise(model_config, c, params, carry, layout):
  """One step: predict the current block's masked slots and keep some.

  A block that is complete before its steps are over gives them up.

  Returns:
    The next Carry; and [B, L] float32, the confidence of what was committed,
    NaN elsewhere.
  """
  block, step = carry.block, carry.step
  of_block = lambda x: jax.lax.dynamic_index_in_dim(x, block, 1, False)
  slots, masked = of_block(layout.slots), of_block(carry.masked)  # [B, S]
  logits = predict(model_config, c, params, carry.canvas, slots, layout)
  fold = jax.vmap(jax.random.fold_in, (0, None))
  keys = fold(fold(layout.keys, block), step)
  draw_keys, keep_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
  token, confidence = choose(c, logits, draw_keys)
  bad = jnp.any(masked & jnp.isnan(confidence), axis=1)
  steps = c.steps // layout.slots.shape[1]  # per block
  allowed = budget(
    c, of_block(layout.num_slots), masked.sum(axis=1), step, steps
  )
  keep = remasking.RULES[c.remasking](confidence, masked, allowed, keep_keys)
  keep &= ~bad[:, None]

  batch, length = carry.canvas.shape
  rows = jnp.arange(batch)[:, None]
  kept = jnp.where(keep, slots, length)
  canvas = carry.canvas.at[rows, kept].set(token, mode='drop')
  sure = jnp.full(canvas.shape, jnp.nan)
  sure = sure.at[rows, kept].set(confidence, mode='drop')
  left = jax.lax.dynamic_update_index_in_dim(
    carry.masked, masked & ~keep, block, 1
  )
  left &= ~bad[:, None, None]
  if c.stop_at_eos:
    canvas, left = stop(c.eos_id, canvas, left, layout)
  busy = masked.any(axis=1)
  done = ~of_block(left).any()
  after = Carry(
    block=block + done,
    step=jnp.where(done, 0, step + 1),
    canvas=canvas,
    masked=left,
    calls=carry.calls + 1,
    forwards=carry.forwards + busy * (2 if c.guidance else 1),
    broken=carry.broken | bad,
  )
  return after, sure


def predict(model_config, c, params, canvas, slots, layout):
  """The network's logits for the slots of a block, [B, S, V] float32.

  Only those are projected onto the vocabulary. With guidance the network also
  sees the canvas with all but the slots masked, as in LLaDA's generate.py;
  tokens committed so far are seen by both.
  """
  batch, length = canvas.shape
  valid = layout.valid
  if c.guidance:
    nothing = jnp.where(layout.fill, canvas, c.mask_id)
    canvas = jnp.concatenate([canvas, nothing])
    valid, slots = (jnp.concatenate([x, x]) for x in (valid, slots))
  model = bind(model_config, params)
  hidden = model(*show(c.objective, canvas, valid, c.bos_id))
  rows = jnp.arange(len(canvas))[:, None]
  # An absent slot (position L) reads the last position and is never kept.
  logits = model.logits(hidden[rows, jnp.minimum(slots, length - 1)])
  if not c.guidance:
    return logits
  return candidates.guide(logits[:batch], logits[batch:], c.guidance)


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
    step: int32, 0-based step within the block.
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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one_step(model_config, c, params, carry, layout):
  return whole(denoise(model_config, c, params, carry, layout))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(model_config, c, params, carry, layout):
  carry = jax.lax.while_loop(
    lambda carry: carry.masked.any(),
    lambda carry: denoise(model_config, c, params, carry, layout)[0],
    carry,
  )
  return whole(carry)
