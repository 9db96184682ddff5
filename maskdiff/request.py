"""What a sampler is asked for: the settings, and canvases with slots to fill.

`continue_prompts` and `fill_gaps` lay out text, `prepare` checks a request and
divides its slots into blocks, `cut` says where the answers end.
"""

import dataclasses
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maskdiff import candidates, remasking
from maskdiff.errors import UserError
from maskdiff.schedule import SCHEDULES

GAP = re.compile(r'\{\{(\d+)\}\}')


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
  """How to sample. What has a default is off by default.

  Of a model that ends short answers with many eos, the published evaluations
  of LLaDA (EVAL.md) suppress eos in one of two ways. `logits_eos_inf`
  (HumanEval): it is never predicted. `confidence_eos_eot_inf` (GSM8K, MATH,
  GPQA, MBPP): it is, and so is the end of turn, but they have confidence 0 and
  are committed last, and the confidence of other tokens is a share of what
  these two leave. At temperatures above 0 LLaDA's code does the second to the
  end of turn alone, by an oversight; here eos is treated alike at any
  temperature. Rules that do not look at confidence take no notice of it.
  """

  steps: int  # denoising steps in all, shared equally by the blocks
  block_length: int  # slots filled together
  temperature: float  # 0 takes the most probable token
  remasking: str  # a key of remasking.RULES
  objective: str  # that the network was trained with, of objective.OBJECTIVES
  predict_mask: bool  # whether the mask id may be predicted
  mask_id: int
  bos_id: int
  # Slots of the longest request there is, which share the steps; 0: of the
  # longest row of the batch, on which results then depend.
  gen_length: int = 0
  eos_id: int = -1  # end of text
  eot_id: int = -1  # end of turn; -1: none
  schedule: str = 'linear'  # of the number of masked slots: linear | cosine
  confidence: str = 'probability'  # a key of candidates.CONFIDENCES
  threshold: float = 0.9  # of the rule of that name
  factor: float = 1.0  # of the rule of that name
  top_k: int = 0  # most probable tokens that are drawn from; 0: all
  top_p: float = 1.0  # their probability in all
  guidance: float = 0.0  # scale of classifier-free guidance
  stop_at_eos: bool = False  # nothing after an eos matters: see `stop`
  logits_eos_inf: bool = False
  confidence_eos_eot_inf: bool = False


class Carry(NamedTuple):
  """State of the denoising loop."""

  block: jax.Array  # int32, blocks done
  step: jax.Array  # int32, steps done of the current block
  canvas: jax.Array  # [B, L] int32
  masked: jax.Array  # [B, blocks, S] bool, slots to be committed yet
  calls: jax.Array  # int32, how often the network was called
  # [B] int32, forward passes of a row while its block had slots to fill; two a
  # call with guidance. Unlike `calls`, the same whatever the other rows are.
  forwards: jax.Array
  broken: jax.Array  # [B] bool, given up: logits were NaN or infinite


class Layout(NamedTuple):
  """What stays the same over the loop."""

  slots: jax.Array  # [B, blocks, S] int32, positions; L where a row has none
  num_slots: jax.Array  # [B, blocks] int32
  fill: jax.Array  # [B, L] bool, True on slots
  valid: jax.Array  # [B, L] bool, False on padding
  keys: jax.Array  # [B] PRNG keys


def prepare(c, canvas, fill, valid, seeds):
  """Checks the request and lays out its blocks.

  Returns:
    The first Carry, and the Layout.

  Raises:
    UserError: shapes differ, steps cannot be shared by the blocks, there is
      nothing to fill, a name is unknown, there is no eos_id that is needed, or
      an autoregressive network is asked for what it cannot do.
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
  if c.objective == 'autoregressive' and c.guidance:
    raise UserError(
      f'guidance={c.guidance}: a model trained with the autoregressive '
      'objective has not learned to do without a prompt that is masked'
    )
  for key, known in (
    ('remasking', remasking.RULES),
    ('confidence', candidates.CONFIDENCES),
    ('schedule', SCHEDULES),
  ):
    if getattr(c, key) not in known:
      raise UserError(
        f'{key}={getattr(c, key)!r} is unknown; choose one of {sorted(known)}'
      )
  for key in ('stop_at_eos', 'logits_eos_inf', 'confidence_eos_eot_inf'):
    if getattr(c, key) and c.eos_id < 0:
      raise UserError(f'{key}=True needs an eos_id')
  most = int(fill.sum(axis=1).max(initial=0))
  if most == 0:
    raise UserError('nothing to fill: ask for gen_length of at least 1')
  most = max(most, c.gen_length)
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
  zero = jnp.zeros((), jnp.int32)
  carry = Carry(
    block=zero,
    step=zero,
    canvas=jnp.asarray(np.where(fill, c.mask_id, canvas)),
    masked=jnp.asarray(slots < length),
    calls=zero,
    forwards=jnp.zeros(batch, jnp.int32),
    broken=jnp.zeros(batch, bool),
  )
  layout = Layout(
    slots=jnp.asarray(slots),
    num_slots=jnp.asarray((slots < length).sum(axis=2), jnp.int32),
    fill=jnp.asarray(fill),
    valid=jnp.asarray(valid),
    keys=jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32)),
  )
  return carry, layout


def continue_prompts(prompts, gen_length):
  """Lays out prompts of any lengths with room for an answer after each.

  Args:
    prompts: list of token lists.
    gen_length: slots after each prompt.

  Returns:
    canvas, fill and valid for `generate`; short rows are padded on the right.

  Raises:
    UserError: there are no prompts.
  """
  return _layout([[*p, *[None] * gen_length] for p in prompts])


def cut(canvas, fill, eos_id):
  """What is left of rows whose text ends at the first eos among the slots.

  Args:
    canvas: [B, L] int32, filled.
    fill: [B, L] bool, the slots.
    eos_id: int; one that stands in a prompt ends nothing.

  Returns:
    [B, L] bool, True before that eos.
  """
  ends = np.asarray(fill) & (np.asarray(canvas) == eos_id)
  return np.cumsum(ends, axis=1) == 0


def fill_gaps(texts, encode):
  """Lays out texts in which {{n}} stands for a gap of n tokens.

  Args:
    texts: list of str, e.g. 'def area(r): return {{4}} * r ** 2'.
    encode: from text to a list of tokens.

  Returns:
    canvas, fill and valid for `generate`.

  Raises:
    UserError: a text has no gap, or none but empty ones, or one of a million
      tokens; or there is no text.
  """
  rows = []
  for text in texts:
    parts = GAP.split(text)  # text, n, text, n, ..., text
    row = []
    for i, part in enumerate(parts):
      if i % 2 and len(part.lstrip('0')) > 6:
        raise UserError(f'a gap of {part[:20]} tokens is too long: no row is')
      row += [None] * int(part[-7:]) if i % 2 else encode(part)
    if None not in row:
      raise UserError(
        f'no gap in {text!r}: write {{{{n}}}} where n tokens are to be filled'
      )
    rows.append(row)
  return _layout(rows)


def widen(layout, length):
  """The same rows with padding on the right, [B, length].

  What is sampled for a row does not depend on it, but a program is compiled
  for every length.

  Args:
    layout: canvas, fill and valid.
    length: at least theirs.
  """
  more = length - layout[0].shape[1]
  return tuple(np.pad(x, ((0, 0), (0, more))) for x in layout)


def check_context(context, valid):
  """Checks that rows to sample are not longer than those of the training.

  Args:
    context: tokens of those, config.data.length.
    valid: [B, L] bool, False on padding.

  Raises:
    UserError: a row is too long.
  """
  longest = int(valid.sum(axis=1).max())
  if longest > context:
    raise UserError(
      f'prompt and answer have {longest} tokens together, but the model was '
      f'trained on rows of config.data.length={context}: shorten the prompt or '
      'ask for fewer tokens'
    )


def _layout(rows):
  """Pads rows of tokens, None where a slot is, to one length."""
  if not rows:
    raise UserError('nothing to sample from: there are no prompts')
  length = max(map(len, rows))
  canvas = np.zeros((len(rows), length), np.int32)
  fill, valid = np.zeros(canvas.shape, bool), np.zeros(canvas.shape, bool)
  for i, row in enumerate(rows):
    canvas[i, : len(row)] = [0 if t is None else t for t in row]
    fill[i, : len(row)] = [t is None for t in row]
    valid[i, : len(row)] = True
  return canvas, fill, valid
