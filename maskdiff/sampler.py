"""Sampling: fill the masked slots of a canvas in a number of denoising steps.

A canvas is a row of tokens in which some positions are to be filled: the end
of a prompt, or gaps anywhere in a text. The positions to fill are its slots.
Blocks of `block_length` slots are filled left to right (one block: pure
diffusion; several: semi-autoregressive); within a block every step predicts
all masked slots and a commit rule of remasking.py keeps some of them. Committed
tokens are never revised. This is `generate` of LLaDA (arXiv 2502.09992,
section 2.4), with gaps in place of a suffix. A network trained with the
autoregressive objective is sampled by the same loop in blocks of one slot.

`generate` is one compiled loop; `trace` runs the same step from Python and
yields every canvas in between.
"""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff.errors import UserError
from maskdiff.mesh import whole
from maskdiff.model import bind
from maskdiff.objective import show
from maskdiff.remasking import RULES, quota

GAP = re.compile(r'\{\{(\d+)\}\}')


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  steps: int  # denoising steps in all, shared equally by the blocks
  block_length: int  # slots filled together
  temperature: float  # 0 takes the most probable token
  remasking: str  # a key of remasking.RULES
  objective: str  # that the network was trained with, of objective.OBJECTIVES
  predict_mask: bool  # whether the mask id may be predicted
  mask_id: int
  bos_id: int


class Carry(NamedTuple):
  """State of the denoising loop."""

  step: jax.Array  # int32, steps done
  canvas: jax.Array  # [B, L] int32
  masked: jax.Array  # [B, blocks, S] bool, slots not committed yet


class Layout(NamedTuple):
  """What stays the same over the loop."""

  slots: jax.Array  # [B, blocks, S] int32, positions; L where a row has none
  num_slots: jax.Array  # [B, blocks] int32
  valid: jax.Array  # [B, L] bool, False on padding
  keys: jax.Array  # [B] PRNG keys


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
      among rows with equally many slots.

  Returns:
    [B, L] int32, the filled canvas, on device.

  Raises:
    UserError: see `prepare`.
  """
  carry, layout = prepare(c, canvas, fill, valid, seeds)
  return _generate(model_config, c, params, carry, layout)


def trace(model_config, c, params, canvas, fill, valid, seeds):
  """Yields the canvas as NumPy before every step and after the last.

  Arguments and errors as for `generate`, and the same final result.
  """
  carry, layout = prepare(c, canvas, fill, valid, seeds)
  while True:
    yield np.asarray(carry.canvas)
    if not carry.masked.any():
      return
    carry = _one_step(model_config, c, params, carry, layout)


def prepare(c, canvas, fill, valid, seeds):
  """Checks the request and lays out its blocks.

  Returns:
    The first Carry, and the Layout.

  Raises:
    UserError: shapes differ, steps cannot be shared by the blocks, there is
      nothing to fill, or the rule is unknown.
  """
  canvas = np.asarray(canvas, np.int32)
  fill, valid = np.asarray(fill, bool), np.asarray(valid, bool)
  if canvas.ndim != 2 or not canvas.shape == fill.shape == valid.shape:
    raise UserError(
      f'canvas {canvas.shape}, fill {fill.shape} and valid {valid.shape} must '
      'have one shape [B, L]'
    )
  if c.objective == 'autoregressive' and c.block_length != 1:
    raise UserError(
      f'block_length={c.block_length}: a model trained with the autoregressive '
      'objective fills one token at a time; set block_length=1'
    )
  if c.remasking not in RULES:
    raise UserError(
      f'remasking={c.remasking!r} is unknown; choose one of {sorted(RULES)}'
    )
  most = int(fill.sum(axis=1).max(initial=0))
  if most == 0:
    raise UserError('nothing to fill: ask for gen_length of at least 1')
  if c.block_length < 1:
    raise UserError(f'block_length={c.block_length} must be at least 1')
  size = min(c.block_length, most)
  blocks = -(-most // size)
  if c.steps < 1 or c.steps % blocks:
    raise UserError(
      f'steps={c.steps} cannot be shared equally by {blocks} block(s) of '
      f'{size} tokens; choose a multiple of {blocks}'
    )
  batch, length = canvas.shape
  slots = np.full((batch, blocks * size), length, np.int32)
  for row, filled in enumerate(fill):
    (where,) = np.nonzero(filled)
    slots[row, : len(where)] = where
  slots = slots.reshape(batch, blocks, size)
  carry = Carry(
    step=jnp.zeros((), jnp.int32),
    canvas=jnp.asarray(np.where(fill, c.mask_id, canvas)),
    masked=jnp.asarray(slots < length),
  )
  layout = Layout(
    slots=jnp.asarray(slots),
    num_slots=jnp.asarray((slots < length).sum(axis=2), jnp.int32),
    valid=jnp.asarray(valid),
    keys=jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)),
  )
  return carry, layout


def denoise(model_config, c, params, carry, layout):
  """One step: predict the current block's masked slots and keep some.

  Only the slots of the block are projected onto the vocabulary. A block that
  is complete before its steps are over gives them up.

  Returns:
    The next Carry.
  """
  num_blocks = layout.slots.shape[1]
  steps = c.steps // num_blocks  # per block
  block, step = carry.step // steps, carry.step % steps
  of_block = lambda x: jax.lax.dynamic_index_in_dim(x, block, 1, False)
  slots = of_block(layout.slots)  # [B, S]
  masked = of_block(carry.masked)
  budget = quota(of_block(layout.num_slots), step, steps)

  batch, length = carry.canvas.shape
  rows = jnp.arange(batch)[:, None]
  model = bind(model_config, params)
  hidden = model(*show(c.objective, carry.canvas, layout.valid, c.bos_id))
  # An absent slot (position L) reads the last position and is never kept.
  logits = model.logits(hidden[rows, jnp.minimum(slots, length - 1)])
  if not c.predict_mask:
    logits = logits.at[..., c.mask_id].set(-jnp.inf)

  keys = jax.vmap(jax.random.fold_in, (0, None))(layout.keys, carry.step)
  draw_keys, keep_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
  token, confidence = predict(c.temperature, logits, draw_keys)
  keep = RULES[c.remasking](confidence, masked, budget, keep_keys)
  masked &= ~keep
  return Carry(
    step=jnp.where(masked.any(), carry.step + 1, (block + 1) * steps),
    canvas=carry.canvas.at[rows, jnp.where(keep, slots, length)].set(
      token, mode='drop'
    ),
    masked=jax.lax.dynamic_update_index_in_dim(carry.masked, masked, block, 1),
  )


def predict(temperature, logits, keys):
  """Draws a token per slot.

  Gumbel noise is added in log space and float32: lower precision biases the
  draw (arXiv 2409.02908).

  Args:
    temperature: 0 for the most probable token.
    logits: [B, S, V] float32.
    keys: [B] PRNG keys.

  Returns:
    token: [B, S] int32.
    confidence: [B, S] float32, its probability at temperature 1.
  """
  noisy = logits
  if temperature > 0:
    gumbel = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:]))(keys)
    noisy = logits / temperature + gumbel
  token = jnp.argmax(noisy, axis=-1)
  chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
  confidence = jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1))
  return token.astype(jnp.int32), confidence


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one_step(model_config, c, params, carry, layout):
  return whole(denoise(model_config, c, params, carry, layout))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(model_config, c, params, carry, layout):
  carry = jax.lax.while_loop(
    lambda carry: carry.masked.any(),
    lambda carry: denoise(model_config, c, params, carry, layout),
    carry,
  )
  return whole(carry.canvas)


def continue_prompts(prompts, gen_length):
  """Lays out prompts of any lengths with room for an answer after each.

  Args:
    prompts: list of token lists.
    gen_length: slots after each prompt.

  Returns:
    canvas, fill and valid for `generate`; short rows are padded on the right.
  """
  return _layout([[*p, *[None] * gen_length] for p in prompts])


def fill_gaps(texts, encode):
  """Lays out texts in which {{n}} stands for a gap of n tokens.

  Args:
    texts: list of str, e.g. 'def area(r): return {{4}} * r ** 2'.
    encode: from text to a list of tokens.

  Returns:
    canvas, fill and valid for `generate`.

  Raises:
    UserError: a text has no gap, or none but empty ones.
  """
  rows = []
  for text in texts:
    parts = GAP.split(text)  # text, n, text, n, ..., text
    row = []
    for i, part in enumerate(parts):
      row += [None] * int(part) if i % 2 else encode(part)
    if None not in row:
      raise UserError(
        f'no gap in {text!r}: write {{{{n}}}} where n tokens are to be filled'
      )
    rows.append(row)
  return _layout(rows)


def _layout(rows):
  """Pads rows of tokens, None where a slot is, to one length."""
  length = max(map(len, rows))
  canvas = np.zeros((len(rows), length), np.int32)
  fill, valid = np.zeros(canvas.shape, bool), np.zeros(canvas.shape, bool)
  for i, row in enumerate(rows):
    canvas[i, : len(row)] = [0 if t is None else t for t in row]
    fill[i, : len(row)] = [t is None for t in row]
    valid[i, : len(row)] = True
  return canvas, fill, valid
