"""Settings of the sampler, requests, and the first state of the loop.

`begin` checks a request and divides its slots into blocks, in NumPy. state.py
explains the letters in shapes.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from maskdiff.config.key import check_choice
from maskdiff.config.sample import SETTINGS
from maskdiff.errors import UserError
from maskdiff.objectives.table import OBJECTIVES
from maskdiff.sampling import passes
from maskdiff.sampling.state import Carry, Layout

# One field for each key of config.sample, with its type and default.
_Settings = dataclasses.make_dataclass(
  '_Settings',
  [(name, type(key.default), key.default) for name, key in SETTINGS.items()],
  frozen=True,
)


@dataclasses.dataclass(frozen=True)
class SamplerConfig(_Settings):
  """Settings of the sampler: the keys of config.sample, and `own_blocks`.

  maskdiff/config/sample.py declares the keys, with defaults and help. Two keys
  have one more value here. `gen_length` is the number of slots over which
  `steps` is divided. 0: the number of slots of the longest row; results then
  depend on the batch. With own_blocks, steps=0 means one step per slot.

  Models tuned on answers padded with eos predict eos early. The published
  evaluations of LLaDA (EVAL.md) suppress eos in one of two ways. With
  `logits_eos_inf` (HumanEval) eos is never predicted. With
  `confidence_eos_eot_inf` (GSM8K, MATH, GPQA, MBPP) eos and the end-of-turn
  token are predicted, but have confidence 0 and are committed last. The
  confidence of other tokens is normalized without these two. At temperatures
  above 0, a bug in LLaDA's code applies `confidence_eos_eot_inf` to the
  end-of-turn token only. This package applies it to both tokens at any
  temperature. Remasking rules that do not read the confidence ignore it.

  A `cache` stores the keys and values of the first forward pass of a block,
  which covers the whole canvas. Later steps of the block reuse them (Fast-dLLM,
  arXiv 2505.22618). `prefix` stores the positions before the block; later steps
  compute from the start of the block to the end of the row. `dual` stores all
  positions outside the block; later steps compute the block only. Cached values
  do not reflect tokens committed since that pass, so results differ a little
  from results without a cache. With refresh=1 they are equal.

  Attributes:
    own_blocks: divide `steps` among the blocks of each row, at least one step
      per block, instead of the blocks of the longest request. Texts with gaps
      need it, because they differ in their number of slots: with own_blocks,
      results do not depend on the batch.
  """

  gen_length: int = 0
  own_blocks: bool = False


class Request(NamedTuple):
  """Rows with slots to fill; layouts.py makes them. Fields are NumPy arrays.

  The sampled tokens of a row depend on its own seed and on no other row,
  provided that c.own_blocks is set or no row has more than c.gen_length slots.
  """

  canvas: np.ndarray  # [B, L] int32; tokens at slots are not read
  fill: np.ndarray  # [B, L] bool, True on slots
  valid: np.ndarray  # [B, L] bool, False on padding
  seeds: np.ndarray  # [B] int in [0, 2^32)


def begin(network, c, request):
  """Checks a request and divides its slots into blocks.

  Args:
    network: Network.
    c: SamplerConfig.
    request: Request.

  Returns:
    The first Carry, the Layout, and passes.shapes of the request.

  Raises:
    UserError: shapes differ; the steps cannot be divided equally among the
      blocks; there are no slots; a setting has an unknown value; a setting
      needs eos_id, which is missing; a setting does not fit a left-to-right
      network; text follows a gap while lookahead hides slots; slots are on
      padding; or a seed is not in [0, 2^32).
  """
  canvas, fill, valid = _arrays(request)
  _check_settings(network, c)
  _check_rows(c, fill, valid, request.seeds)
  max_slots = max(int(fill.sum(axis=1).max(initial=0)), c.gen_length)
  size = min(c.block_length, max_slots)
  blocks = -(-max_slots // size)
  if c.steps < 0 or (not c.own_blocks and (not c.steps or c.steps % blocks)):
    raise UserError(
      f'steps={c.steps} cannot be shared equally by {blocks} block(s) of '
      f'{size} tokens; choose a multiple of {blocks}'
    )
  batch, length = canvas.shape
  slots = np.full((batch, blocks * size), length, np.int32)
  for row, is_slot in enumerate(fill):
    (positions,) = np.nonzero(is_slot)
    slots[row, : len(positions)] = positions
  slots = slots.reshape(batch, blocks, size)
  block_of = np.where(fill, np.cumsum(fill, axis=1) - 1, -size) // size
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
    block_of=block_of.astype(np.int32),
    steps=_steps_per_block(c, fill, size, max_slots),
    seeds=np.asarray(request.seeds, np.uint32),
  )
  return carry, layout, passes.shapes(c, length, size)


def _arrays(request):
  canvas = np.asarray(request.canvas, np.int32)
  fill, valid = np.asarray(request.fill, bool), np.asarray(request.valid, bool)
  if canvas.ndim != 2 or not canvas.shape == fill.shape == valid.shape:
    raise UserError(
      f'canvas {canvas.shape}, fill {fill.shape} and valid {valid.shape} must '
      'have one shape [B, L]'
    )
  return canvas, fill, valid


def _steps_per_block(c, fill, size, max_slots):
  """Returns denoising steps per block, [B] int32."""
  num_slots = np.full(len(fill), max_slots)
  if c.own_blocks:
    num_slots = np.maximum(fill.sum(axis=1), 1)
  sizes = np.minimum(size, num_slots)
  blocks = -(-num_slots // sizes)
  steps = -(-c.steps // blocks) if c.steps else sizes
  return steps.astype(np.int32)


def _check_rows(c, fill, valid, seeds):
  for row in np.flatnonzero(np.any(fill & ~valid, axis=1)):
    raise UserError(
      f'row {row} has slots on its padding: set valid wherever fill is set'
    )
  for seed in seeds:
    if not 0 <= seed < 2**32:
      raise UserError(f'seed {seed} must be between 0 and {2**32 - 1}')
  if not fill.any():
    raise UserError('nothing to fill: set gen_length to at least 1')
  if c.lookahead >= 0 and np.any(valid[:, 1:] & fill[:, :-1] & ~fill[:, 1:]):
    raise UserError(
      f'lookahead={c.lookahead} hides slots at the end of a row, but text '
      'follows a gap in this request: set lookahead=-1'
    )


def _check_settings(network, c):
  objective = OBJECTIVES[network.objective]
  if c.block_length < 1:
    raise UserError(f'block_length={c.block_length} must be at least 1')
  if objective.left_to_right and c.block_length != 1:
    raise UserError(
      f'block_length={c.block_length}: a model trained with objective '
      f'{network.objective} fills one token at a time; set block_length=1'
    )
  if c.guidance and not objective.can_guide:
    raise UserError(
      f'guidance={c.guidance} needs a model trained with masked prompts, and '
      f'objective {network.objective} masks none; set guidance=0'
    )
  if objective.left_to_right and (c.cache, c.lookahead) != ('none', -1):
    raise UserError(
      f'cache={c.cache} and lookahead={c.lookahead} need a bidirectional '
      f'network, and objective {network.objective} trains a left-to-right one; '
      'set cache=none and lookahead=-1'
    )
  if c.refresh < 0 or (c.refresh and c.cache == 'none'):
    raise UserError(
      f'refresh={c.refresh} is the number of steps between cache refreshes: '
      'set cache=dual or cache=prefix, or set refresh=0'
    )
  for name, key in SETTINGS.items():
    check_choice(name, key, getattr(c, name))
  for key in ('stop_at_eos', 'logits_eos_inf', 'confidence_eos_eot_inf'):
    if getattr(c, key) and network.eos_id < 0:
      raise UserError(
        f'{key}=True needs an eos token, and the tokenizer has none; set '
        f'{key}=False'
      )


def sampler_config(config):
  """Returns the SamplerConfig of a run's config.

  For a left-to-right network, each block has one slot and takes one step.
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
