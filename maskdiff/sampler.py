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

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff import candidates, remasking
from maskdiff.commit import budget, choose, stop
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
  carry, layout, shapes = prepare(c, canvas, fill, valid, seeds)
  return run(model_config, c, shapes, params, carry, layout)


def trace(model_config, c, params, canvas, fill, valid, seeds):
  """Yields the canvas as NumPy before every step and after the last.

  Arguments and errors as for `generate`, and the same final result.
  """
  for carry, _ in walk(model_config, c, params, canvas, fill, valid, seeds):
    yield np.asarray(carry.canvas)


def walk(model_config, c, params, canvas, fill, valid, seeds):
  """Like `trace`, with all that is known at each moment.

  Yields:
    Carry; and [B, L] float32 as NumPy, the confidence of the tokens that the
    last step committed and NaN elsewhere: before the first step, and at slots
    given up behind an eos.
  """
  carry, layout, shapes = prepare(c, canvas, fill, valid, seeds)
  sure = np.full(carry.canvas.shape, np.nan, np.float32)
  fresh, shape, cache = np.zeros(len(sure), bool), None, None
  while True:
    yield carry, np.asarray(sure)
    if not np.asarray(carry.masked).any():
      break
    if np.asarray(fresh).any():
      carry, fresh, sure = _follow(
        model_config, c, shape, params, carry, fresh, cache, layout
      )
    else:
      shape = shapes[int(_choose_shape(c, shapes, carry, layout))]
      carry, fresh, sure, cache = _refresh(
        model_config, c, shape, params, carry, layout
      )
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


def round_of(model_config, c, shape, params, carry, layout):
  """A pass over the canvas and, with a cache, those over windows after it.

  The second kind goes on until every row needs a new cache: because its block
  is complete, or by c.refresh. Rows that need one sooner wait.

  Args:
    shape: one of request.shapes.

  Returns:
    The next Carry.
  """
  carry, fresh, _, cache = refresh(
    model_config, c, shape, params, carry, layout
  )
  if c.cache == 'none':
    return carry

  def next_pass(state):
    return follow(model_config, c, shape, params, *state, cache, layout)[:2]

  carry, _ = jax.lax.while_loop(
    lambda state: state[1].any(), next_pass, (carry, fresh)
  )
  return carry


def refresh(model_config, c, shape, params, carry, layout):
  """One step of all rows by a pass over the first shape[0] positions.

  Returns:
    What `advance` returns; and the cache, or None if there is none.
  """
  length, _ = shape
  slots = of_block(layout.slots, carry.block)
  tokens, valid = (x[:, :length] for x in view(c, carry, layout))
  model = bind(model_config, params)
  inputs, labels = show(c.objective, tokens, valid, c.bos_id)
  if c.cache == 'none':
    hidden, cache = model(inputs, labels), None
  else:
    hidden, cache = model.prefill(inputs, labels)
  logits = logits_at(c, model, hidden, slots)
  turn = carry.masked.any((1, 2))
  passed = valid.reshape(-1, *turn.shape, length).sum((0, 2), dtype=jnp.int32)
  return *advance(c, carry, layout, logits, turn, passed), cache


def follow(model_config, c, shape, params, carry, fresh, cache, layout):
  """One step of some rows by a pass over windows of shape[1] positions.

  Args:
    fresh: [B] bool, the rows that the cache serves.
    cache: from `refresh`.

  Returns:
    What `advance` returns.
  """
  length, size = shape
  slots = of_block(layout.slots, carry.block)
  tokens, valid = (x[:, :length] for x in view(c, carry, layout))
  first = slots[:, :1]
  where = slots if c.cache == 'dual' else first + jnp.arange(size)
  copies = len(tokens) // len(slots)
  where = jnp.tile(where, (copies, 1))
  rows = jnp.arange(len(tokens))[:, None]
  inside = jnp.minimum(where, length - 1)
  # An absent slot (position L) is not there, like what is not visible.
  there = (where < length) & valid[rows, inside]
  kept = valid.at[rows, jnp.where(there, where, length)].set(False, mode='drop')
  model = bind(model_config, params)
  hidden = model.extend(tokens[rows, inside], where, there, kept, cache)
  in_window = jnp.arange(slots.shape[1]) if c.cache == 'dual' else slots - first
  logits = logits_at(c, model, hidden, jnp.broadcast_to(in_window, slots.shape))
  passed = there.reshape(copies, *fresh.shape, -1).sum((0, 2), dtype=jnp.int32)
  return advance(c, carry, layout, logits, fresh, passed)


def view(c, carry, layout):
  """What the network is shown: tokens [R, L] int32, and which of them, bool.

  With guidance R is 2 B, otherwise B: the network also sees the canvas with all
  but the slots masked, as in LLaDA's generate.py; tokens committed so far are
  seen by both.
  """
  canvas, valid = carry.canvas, layout.valid
  if c.lookahead >= 0:
    valid &= layout.order <= carry.block[:, None] + c.lookahead
  if not c.guidance:
    return canvas, valid
  nothing = jnp.where(layout.fill, canvas, c.mask_id)
  return jnp.concatenate([canvas, nothing]), jnp.concatenate([valid, valid])


def logits_at(c, model, hidden, slots):
  """Logits of the slots of a block, [B, S, V] float32.

  Only those are projected onto the vocabulary.

  Args:
    hidden: [R, L, D]; see `view`.
    slots: [B, S] int32; what is read for those that are absent does not matter.
  """
  copies, (_, length) = len(hidden) // len(slots), hidden.shape[:2]
  rows = jnp.arange(len(hidden))[:, None]
  slots = jnp.minimum(jnp.tile(slots, (copies, 1)), length - 1)
  logits = model.logits(hidden[rows, slots])
  if not c.guidance:
    return logits
  return candidates.guide(*jnp.split(logits, 2), c.guidance)


def of_block(x, block):
  """[B, ...], each row's own block of [B, blocks, ...]."""
  rows = jnp.arange(len(x))
  return x[rows, jnp.minimum(block, x.shape[1] - 1)]


def advance(c, carry, layout, logits, turn, passed):
  """Commits some of the predictions for the masked slots of a block.

  A block that is complete before its steps are over gives them up.

  Args:
    c: SamplerConfig.
    carry: Carry.
    layout: Layout.
    logits: [B, S, V] float32, of each row's current block.
    turn: [B] bool, the rows that take a step; the others stay as they are.
    passed: [B] int32, positions computed for a row.

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
  token, confidence = choose(c, logits, draw_keys)
  bad = jnp.any(masked & jnp.isnan(confidence), axis=1)
  steps = c.steps // layout.slots.shape[1]  # per block
  allowed = budget(
    c, of_block(layout.num_slots, block), masked.sum(axis=1), step, steps
  )
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
    canvas, left = stop(c.eos_id, canvas, left, layout)
  done = turn & ~of_block(left, block).any(axis=1)
  step = jnp.where(done, 0, step + turn)
  carry = Carry(
    block=block + done,
    step=step,
    canvas=canvas,
    masked=left,
    calls=carry.calls + 1,
    forwards=carry.forwards + turn * (2 if c.guidance else 1),
    positions=carry.positions + turn * passed,
    broken=carry.broken | bad,
  )
  again = turn & ~done & left.any((1, 2))
  if c.refresh:
    again &= step % c.refresh != 0
  return carry, again & (c.cache != 'none'), sure


def choose_shape(c, shapes, carry, layout):
  """Index of the smallest of the shapes that covers all rows in progress."""
  _, valid = view(dataclasses.replace(c, guidance=0.0), carry, layout)
  length = valid.shape[1]
  end = jnp.where(valid, jnp.arange(length) + 1, 0).max(axis=1)
  window = end - of_block(layout.slots, carry.block)[:, 0]
  if c.cache != 'prefix':
    window = jnp.zeros_like(window)
  busy = carry.masked.any((1, 2))
  most = jnp.max(jnp.where(busy, jnp.stack([end, window]), 0), axis=1)
  return jnp.argmax((jnp.array(shapes) >= most).all(axis=1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _refresh(*args):
  *found, cache = refresh(*args)
  return *whole(found), cache


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _follow(*args):
  return whole(follow(*args))


_choose_shape = jax.jit(choose_shape, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(model_config, c, shapes, params, carry, layout, until=0):
  """Goes on until no more than `until` rows are in progress.

  Args:
    model_config, c, params: as for `generate`.
    carry, layout, shapes: from `prepare`.
    until: int.

  Returns:
    The last Carry, whole on every device.
  """
  rounds = [
    functools.partial(round_of, model_config, c, shape, params)
    for shape in shapes
  ]

  def next_round(carry):
    if len(rounds) == 1:
      return rounds[0](carry, layout)
    index = choose_shape(c, shapes, carry, layout)
    return jax.lax.switch(index, rounds, carry, layout)

  in_progress = lambda carry: carry.masked.any((1, 2)).sum()
  return whole(
    jax.lax.while_loop(
      lambda carry: in_progress(carry) > until, next_round, carry
    )
  )
