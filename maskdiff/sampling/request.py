"""What a sampler is asked for: the settings, and canvases with slots to fill.

`begin` checks a request and divides its slots into blocks, in NumPy.
"""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from maskdiff.config.key import check_choice
from maskdiff.config.sample import SETTINGS
from maskdiff.errors import UserError
from maskdiff.objectives.table import OBJECTIVES

MAX_SHAPES = 5  # compile at most this many sequence lengths per program

# One field for each key of config.sample, with its type and default.
_Settings = dataclasses.make_dataclass(
  '_Settings',
  [(name, type(key.default), key.default) for name, key in SETTINGS.items()],
  frozen=True,
)


@dataclasses.dataclass(frozen=True)
class SamplerConfig(_Settings):
  """Settings of the sampler: the keys of config.sample, and `own_blocks`.

  maskdiff/config/sample.py declares the keys, with defaults and help. Two
  differ here. `gen_length` is the number of slots over which `steps` is
  divided. 0: those of the longest row; results then depend on the batch.
  `steps` may be 0 with own_blocks: one step per slot.

  Models tuned on answers padded with eos predict eos early. The published
  evaluations of LLaDA (EVAL.md) suppress eos in one of two ways. With
  `logits_eos_inf` (HumanEval) eos is never predicted. With
  `confidence_eos_eot_inf` (GSM8K, MATH, GPQA, MBPP) eos and the end of turn are
  predicted, but have confidence 0 and are committed last; the confidence of
  other tokens is normalized without these two. At temperatures above 0 LLaDA's
  code does the second to the end of turn only, by an oversight; here eos is
  treated alike at any temperature. Remasking rules that do not read the
  confidence ignore both.

  A `cache` stores keys and values of a forward pass over the whole canvas,
  which also commits the first tokens of a block, for the later steps of the
  block (Fast-dLLM, arXiv 2505.22618). `prefix` stores the positions before the
  block; later steps compute from the start of the block to the end of the row.
  `dual` stores all positions outside the block; later steps compute the block
  only. The cached values are as old as that pass, so results differ a little
  from those without a cache. With refresh=1 they are equal.

  Attributes:
    own_blocks: divide `steps` among the blocks of each row, at least one step
      per block, instead of the blocks of the longest request. Gaps need it,
      since their number of slots differs: results then do not depend on the
      batch.
  """

  gen_length: int = 0
  own_blocks: bool = False


class Request(NamedTuple):
  """Rows with slots to fill. Fields are NumPy arrays."""

  canvas: np.ndarray  # [B, L] int32; tokens at the slots are not read
  fill: np.ndarray  # [B, L] bool, True on slots
  valid: np.ndarray  # [B, L] bool, False on padding
  # [B] int in [0, 2^32), one per row. The result of a row depends on its own
  # seed and on no other row, if no row has more than gen_length slots or
  # own_blocks is set.
  seeds: np.ndarray


class Carry(NamedTuple):
  """State of the denoising loop. Rows go on by themselves."""

  block: jax.Array  # [B] int32, blocks done
  step: jax.Array  # [B] int32, steps done of the current block
  canvas: jax.Array  # [B, L] int32
  masked: jax.Array  # [B, blocks, S] bool, slots to be committed yet
  calls: jax.Array  # int32, how often the network was called
  # Of a row, whatever the other rows are, [B] int32 each: passes in which it
  # took part, and positions that they needed of it: those that are visible, or
  # in the window. More are computed, for padding and for few shapes. Guidance
  # takes two passes for one.
  forwards: jax.Array
  positions: jax.Array
  broken: jax.Array  # [B] bool, given up: logits were NaN or infinite


class Layout(NamedTuple):
  """What stays the same over the loop."""

  slots: jax.Array  # [B, blocks, S] int32, positions; L where a row has none
  num_slots: jax.Array  # [B, blocks] int32
  fill: jax.Array  # [B, L] bool, True on slots
  valid: jax.Array  # [B, L] bool, False on padding
  order: jax.Array  # [B, L] int32, the block of a slot; -1 on what is given
  steps: jax.Array  # [B] int32, of a block
  seeds: jax.Array  # [B] uint32


def begin(network, c, request):
  """Checks a request and divides its slots into blocks.

  Args:
    network: Network.
    c: SamplerConfig.
    request: Request.

  Returns:
    The first Carry, the Layout, and the shapes of passes, see `shapes`.

  Raises:
    UserError: shapes differ, steps cannot be shared by the blocks, there is
      nothing to fill, a name is unknown, there is no eos_id that is needed,
      an autoregressive network is asked for what it cannot do, a row goes on
      after slots that are not to be seen, slots stand on padding, or a seed is
      no uint32.
  """
  canvas = np.asarray(request.canvas, np.int32)
  fill, valid = np.asarray(request.fill, bool), np.asarray(request.valid, bool)
  if canvas.ndim != 2 or not canvas.shape == fill.shape == valid.shape:
    raise UserError(
      f'canvas {canvas.shape}, fill {fill.shape} and valid {valid.shape} must '
      'have one shape [B, L]'
    )
  _check_settings(network, c)
  for row in np.flatnonzero(np.any(fill & ~valid, axis=1)):
    raise UserError(f'row {row} has slots on its padding: fill needs valid')
  for seed in request.seeds:
    if not 0 <= seed < 2**32:
      raise UserError(f'seed {seed} is not from 0 to {2**32 - 1}')
  most = int(fill.sum(axis=1).max(initial=0))
  if most == 0:
    raise UserError('nothing to fill: ask for gen_length of at least 1')
  most = max(most, c.gen_length)
  if c.block_length < 1:
    raise UserError(f'block_length={c.block_length} must be at least 1')
  size = min(c.block_length, most)
  blocks = -(-most // size)
  if c.steps < 0 or (not c.own_blocks and (not c.steps or c.steps % blocks)):
    raise UserError(
      f'steps={c.steps} cannot be shared equally by {blocks} block(s) of '
      f'{size} tokens; choose a multiple of {blocks}'
    )
  batch, length = canvas.shape
  slots = np.full((batch, blocks * size), length, np.int32)
  for row, filled in enumerate(fill):
    (where,) = np.nonzero(filled)
    slots[row, : len(where)] = where
  order = np.where(fill, np.cumsum(fill, axis=1) - 1, -size) // size
  if c.lookahead >= 0 and np.any(valid[:, 1:] & fill[:, :-1] & ~fill[:, 1:]):
    raise UserError(
      f'lookahead={c.lookahead} hides slots at the end of a row, and here text '
      'follows a gap: leave it at -1'
    )
  slots = slots.reshape(batch, blocks, size)
  has = np.full(batch, most)
  if c.own_blocks:
    has = np.maximum(fill.sum(axis=1), 1)
  sizes = np.minimum(size, has)
  steps = -(-c.steps // -(-has // sizes)) if c.steps else sizes
  zeros = np.zeros(batch, np.int32)
  carry = Carry(
    block=zeros,
    step=zeros,
    canvas=np.where(fill, np.int32(network.mask_id), canvas),
    masked=slots < length,
    calls=np.int32(0),
    forwards=zeros,
    positions=zeros,
    broken=np.zeros(batch, bool),
  )
  layout = Layout(
    slots=slots,
    num_slots=(slots < length).sum(axis=2, dtype=np.int32),
    fill=fill,
    valid=valid,
    order=order.astype(np.int32),
    steps=steps.astype(np.int32),
    seeds=np.asarray(request.seeds, np.uint32),
  )
  return carry, layout, shapes(c, length, size)


def _check_settings(network, c):
  objective = OBJECTIVES[network.objective]
  causal = objective.left_to_right
  if causal and c.block_length != 1:
    raise UserError(
      f'block_length={c.block_length}: a model trained with the autoregressive '
      'objective fills one token at a time; set block_length=1'
    )
  if c.guidance and not objective.can_guide:
    raise UserError(
      f'guidance={c.guidance}: a model trained with the autoregressive '
      'objective has not learned to do without a prompt that is masked'
    )
  if causal and (c.cache, c.lookahead) != ('none', -1):
    raise UserError(
      f'cache={c.cache!r} and lookahead={c.lookahead} are for networks that '
      'see both sides, and one trained with the autoregressive objective does '
      "not: leave them at 'none' and -1"
    )
  if c.refresh < 0 or (c.refresh and c.cache == 'none'):
    raise UserError(
      f'refresh={c.refresh} is how often a cache is made anew: choose '
      "cache='dual' or 'prefix' too, or 0"
    )
  for name, key in SETTINGS.items():
    check_choice(name, key, getattr(c, name))
  for key in ('stop_at_eos', 'logits_eos_inf', 'confidence_eos_eot_inf'):
    if getattr(c, key) and network.eos_id < 0:
      raise UserError(f'{key}=True needs an eos_id')


def shapes(c, length, size):
  """How much of the rows the passes of a round may cover: a few choices.

  A round takes the smallest that covers what is visible of all its rows. They
  do not depend on the prompts, so that a program serves all of a length.

  Args:
    c: SamplerConfig.
    length: L.
    size: slots of a block.

  Returns:
    Tuple of (length, window), rising: positions of the pass over the canvas,
    and of those after it, which a cache serves. At most MAX_SHAPES.
  """
  if c.lookahead < 0 and c.cache != 'prefix':
    return ((length, size),)
  if c.lookahead < 0:
    return tuple((length, window) for window in halves(length, size))
  ahead = min((1 + c.lookahead) * size, length)
  window = ahead if c.cache == 'prefix' else size
  return tuple((n, window) for n in halves(length, ahead))


def halves(most, least):
  """`most`, half of it and so on, not below `least`, rising."""
  sizes = [most]
  while len(sizes) < MAX_SHAPES and -(-sizes[-1] // 2) >= least:
    sizes.append(-(-sizes[-1] // 2))
  return sizes[::-1]


def sampler_config(config):
  """Returns the SamplerConfig of a run's config.

  Left-to-right networks get blocks of one slot and one step per token.
  """
  settings = {name: config.sample[name] for name in SETTINGS}
  if OBJECTIVES[config.objective.name].left_to_right:
    settings |= dict(steps=settings['gen_length'], block_length=1)
  return SamplerConfig(**settings)


def describe(network, c):
  """Returns the settings that sampling depends on, a dict for reports.

  Args:
    network: Network.
    c: SamplerConfig.
  """
  keys = ('objective', 'predict_mask', 'mask_id', 'bos_id', 'eos_id')
  return dataclasses.asdict(c) | {key: getattr(network, key) for key in keys}
