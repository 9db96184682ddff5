"""Requests, and the first state of the loop.

`begin` checks a request and divides its slots into blocks, in NumPy. state.py
explains the letters in shapes.
"""

from typing import NamedTuple

import numpy as np

from maskdiff.config.key import check_choice
from maskdiff.config.sample import PER_REQUEST, SETTINGS, check_prefix_rule
from maskdiff.errors import UserError
from maskdiff.objectives.table import OBJECTIVES
from maskdiff.sampling import passes
from maskdiff.sampling.settings import DEFAULT, Settings, per_row
from maskdiff.sampling.state import Carry, Draft, Layout


class Request(NamedTuple):
  """Rows with slots to fill; layouts.py makes them. Fields are NumPy arrays.

  The sampled tokens of a row depend on its own slots, seed and settings, and
  not on the other rows.
  """

  canvas: np.ndarray  # [B, L] int32; tokens at slots are not read
  fill: np.ndarray  # [B, L] bool, True on slots
  valid: np.ndarray  # [B, L] bool, False on padding
  seeds: np.ndarray  # [B] int in [0, 2^32)
  settings: Settings = DEFAULT  # each field a value for all rows, or [B]


def begin(network, c, request, num_slots=0):
  """Checks a request and divides its slots into blocks.

  Args:
    network: Network.
    c: SamplerConfig.
    request: Request.
    num_slots: number of slots per row for which the Layout has blocks; rows
      with fewer slots have empty blocks. 0: the largest number of slots or
      gen_length among the rows. Batches with the same number of rows, positions
      and blocks share a program.

  Returns:
    The first Carry, the Layout, and passes.shapes of the request.

  Raises:
    UserError: shapes differ; the steps cannot be divided equally among the
      blocks; there are no slots; a setting is not valid, does not fit the
      network, or needs another program; text follows a gap while lookahead
      hides slots; slots are on padding; or a seed is not in [0, 2^32).
  """
  canvas, fill, valid = _arrays(request)
  batch, length = canvas.shape
  settings = per_row(request.settings, batch)
  _check_settings(network, c, settings)
  _check_rows(c, fill, valid, request.seeds)
  max_slots = num_slots or max(
    int(fill.sum(axis=1).max(initial=0)),
    int(settings.gen_length.max(initial=0)),
  )
  if network.window_length and network.bos_id < 0 and fill[:, 0].any():
    raise UserError(
      'a row begins with a slot, and the model has no bos token to predict it '
      'from: give a prompt'
    )
  by_position = network.block_length > 0
  size = c.block_length if by_position else min(c.block_length, max_slots)
  block_of, index_of = divide(fill, size, by_position)
  blocks = -(-max_slots // size)
  if by_position:  # a prompt may end within a block
    blocks = min(blocks + 1, -(-length // size))
  # The slots of a step, beginning with any slot.
  blocks = max(blocks, block_of.max() + 1) + network.ahead
  slots = np.full((batch, blocks, size), length, np.int32)
  rows, positions = np.nonzero(fill)
  slots[rows, block_of[fill], index_of[fill]] = positions
  zeros = np.zeros(batch, np.int32)
  carry = Carry(
    block=zeros,
    step=zeros,
    total_steps=zeros,
    canvas=np.where(fill, np.int32(network.mask_id), canvas),
    masked=slots < length,
    filled_at=np.zeros(canvas.shape, np.int32),
    confidence=np.full(canvas.shape, np.nan, np.float32),
    calls=np.int32(0),
    forwards=zeros,
    positions=zeros,
    cached=np.zeros(batch, bool),
    broken=np.zeros(batch, bool),
    draft=_no_draft(network, batch) if c.remasking == 'speculative' else None,
  )
  layout = Layout(
    slots=slots,
    num_slots=(slots < length).sum(axis=2, dtype=np.int32),
    fill=fill,
    valid=valid,
    block_of=block_of,
    index_of=index_of,
    steps=_steps_per_block(c, settings, fill.sum(axis=1)),
    seeds=np.asarray(request.seeds, np.uint32),
    settings=settings,
  )
  return carry, layout, passes.shapes(network, c, length, slots)


def _no_draft(network, batch):
  """Returns the Draft of rows before their first step."""
  shape = batch, network.ahead - 1
  return Draft(
    np.full(shape, -1, np.int32),
    np.zeros((*shape, network.config.vocab_size), np.float32),
  )


def divide(fill, block_length, by_position):
  """Divides the slots of rows into blocks.

  Args:
    fill: [..., L] bool, True on slots.
    block_length: slots of a block.
    by_position: whether a block is the slots among `block_length` positions,
      counted from the start of the row, as in training on blocks; otherwise
      slots are counted.

  Returns:
    [..., L] int32: the block of each slot, counted from 0, and -1 elsewhere;
    and its index in the block, 0 elsewhere.
  """
  fill = np.asarray(fill)
  number = np.cumsum(fill, axis=-1) - 1
  if by_position:
    unit = np.where(fill, np.arange(fill.shape[-1]) // block_length, -1)
    # The largest unit so far, before this position.
    last = np.maximum.accumulate(unit, axis=-1)
    before = np.concatenate([np.full_like(last[..., :1], -1), last], axis=-1)
    is_first = fill & (unit > before[..., :-1])
  else:
    is_first = fill & (number % block_length == 0)
  block = np.cumsum(is_first, axis=-1) - 1
  start = np.maximum.accumulate(np.where(is_first, number, 0), axis=-1)
  return (
    np.where(fill, block, -1).astype(np.int32),
    np.where(fill, number - start, 0).astype(np.int32),
  )


def _arrays(request):
  canvas = np.asarray(request.canvas, np.int32)
  fill, valid = np.asarray(request.fill, bool), np.asarray(request.valid, bool)
  if canvas.ndim != 2 or not canvas.shape == fill.shape == valid.shape:
    raise UserError(
      f'canvas {canvas.shape}, fill {fill.shape} and valid {valid.shape} must '
      'have one shape [B, L]'
    )
  return canvas, fill, valid


def _steps_per_block(c, settings, num_slots):
  """Returns denoising steps per block, [B] int32.

  Args:
    c: SamplerConfig.
    settings: Settings with arrays.
    num_slots: [B] int, slots of each row.

  Raises:
    UserError: the steps of a row with a gen_length cannot be divided equally.
  """
  steps = settings.steps
  num_slots = np.maximum(num_slots, np.maximum(settings.gen_length, 1))
  sizes = np.minimum(c.block_length, num_slots)
  blocks = -(-num_slots // sizes)
  unequal = (steps == 0) | (steps % blocks != 0)
  for row in np.flatnonzero(
    (steps < 0) | ((settings.gen_length > 0) & unequal)
  ):
    raise UserError(
      f'steps={steps[row]} cannot be shared equally by {blocks[row]} block(s) '
      f'of {sizes[row]} tokens; choose a multiple of {blocks[row]}'
    )
  return np.where(steps, -(-steps // blocks), sizes).astype(np.int32)


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


def _check_settings(network, c, settings):
  """Checks settings against each other and against the network.

  Args:
    network: Network.
    c: SamplerConfig.
    settings: Settings with arrays, from `per_row`.

  Raises:
    UserError: a setting has an unknown value, does not fit the network, needs
      eos_id or eot_id, which is missing, or needs another program.
  """
  objective = OBJECTIVES[network.objective]
  if c.block_length < 1:
    raise UserError(f'block_length={c.block_length} must be at least 1')
  if objective.left_to_right and c.block_length != 1:
    raise UserError(
      f'block_length={c.block_length}: a model trained with objective '
      f'{network.objective} fills one token at a time; set block_length=1'
    )
  if network.block_length and network.block_length % c.block_length:
    raise UserError(
      f'block_length={c.block_length} does not divide the blocks of '
      f'{network.block_length} tokens that the model was trained on; set '
      f'block_length={network.block_length}'
    )
  if network.block_length and c.lookahead >= 0:
    raise UserError(
      f'lookahead={c.lookahead}: a model trained with objective '
      f'{network.objective} sees its own block and none after it; set '
      'lookahead=-1'
    )
  threshold = settings.threshold.max(initial=0)
  check_prefix_rule(
    c.remasking, threshold, network.window_length > 0, network.draft_length > 0
  )
  guidance = settings.guidance.max(initial=0)
  if (c.guided or guidance) and not objective.can_guide:
    raise UserError(
      f'guidance={guidance} needs a model trained with masked prompts, and '
      f'objective {network.objective} masks none; set guidance=0'
    )
  if guidance and not c.guided:
    raise _another_program('guidance', guidance, 'guided=False')
  if objective.exact_cache and (c.cache == 'dual' or c.refresh):
    raise UserError(
      f'cache={c.cache}, refresh={c.refresh}: a network trained with objective '
      f'{network.objective} sees no later positions, so that its cache is '
      'exact; set cache=prefix and refresh=0'
    )
  if c.refresh < 0 or (c.refresh and c.cache == 'none'):
    raise UserError(
      f'refresh={c.refresh} is the number of steps between cache refreshes: '
      'set cache=dual or cache=prefix, or set refresh=0'
    )
  for name, key in SETTINGS.items():
    if not key.per_request:
      check_choice(name, key, getattr(c, name))
  for name in ('stop_at_eos', 'logits_eos_inf', 'confidence_eos_eot_inf'):
    if getattr(settings, name).any() and network.eos_id < 0:
      raise UserError(
        f'{name}=True needs an eos token, and the tokenizer has none; set '
        f'{name}=False'
      )
  if np.any(settings.confidence_eos_eot_inf & (settings.eot_id < 0)):
    raise UserError(
      'confidence_eos_eot_inf=True needs an end-of-turn token: set eot_id to '
      f'its id, or to the id of eos, {network.eos_id}, if there is none'
    )


def _another_program(name, value, program):
  """Returns the UserError for a setting that the program does not have.

  Args:
    name: name of the setting.
    value: its value in the request.
    program: the setting of the program, as NAME=VALUE.
  """
  return UserError(
    f"{name}={value} needs another program than this sampler's ({program}); "
    f'settings that may differ by request: {", ".join(PER_REQUEST)}'
  )
