"""What is asked for: slots in blocks, and the shapes of passes."""

import dataclasses

import pytest

from maskdiff.errors import UserError
from maskdiff.sampling import layouts, request
from maskdiff.sampling.request import SamplerConfig

MASK, EOS = 4, 2
PLAIN = SamplerConfig(
  steps=4,
  block_length=4,
  temperature=0.0,
  remasking='low_confidence',
  objective='masked_diffusion',
  predict_mask=False,
  mask_id=MASK,
  bos_id=1,
)


def prepare(layout, **changes):
  seeds = range(len(layout[0]))
  return request.prepare(dataclasses.replace(PLAIN, **changes), *layout, seeds)


def test_slots_are_divided_into_blocks_from_the_left():
  layout = layouts.continue_prompts([[7, 8], [9]], 6)
  carry, laid, _ = prepare(layout)
  assert laid.slots[0].tolist() == [[2, 3, 4, 5], [6, 7, 8, 8]]
  assert laid.slots[1].tolist() == [[1, 2, 3, 4], [5, 6, 8, 8]]
  assert laid.num_slots.tolist() == [[4, 2], [4, 2]]
  assert carry.masked.sum() == 12
  assert carry.canvas.tolist()[1] == [9, *[MASK] * 6, 0]


def test_more_slots_to_come_make_more_blocks():
  layout = layouts.continue_prompts([[7, 8]], 3)
  carry, laid, _ = prepare(layout, gen_length=7)
  assert laid.slots.tolist() == [[[2, 3, 4, 5], [5, 5, 5, 5]]]
  assert laid.num_slots.tolist() == [[3, 0]]
  with pytest.raises(UserError, match='steps=3 .*multiple of 2'):
    prepare(layout, gen_length=7, steps=3)


def test_a_round_covers_what_is_visible_in_few_shapes():
  layout = layouts.continue_prompts([[7, 8], [9] * 30], 64)
  of = lambda **changes: prepare(layout, steps=64, **changes)[2]
  assert of() == ((94, 4),)
  assert of(cache='dual') == ((94, 4),)
  assert of(cache='prefix') == tuple((94, w) for w in (6, 12, 24, 47, 94))
  assert of(lookahead=0) == tuple((n, 4) for n in (6, 12, 24, 47, 94))
  assert of(lookahead=2, cache='prefix') == tuple(
    (n, 12) for n in (12, 24, 47, 94)
  )
  assert of(lookahead=99, cache='prefix') == ((94, 94),)


@pytest.mark.parametrize('changes', [dict(cache='prefix'), dict(lookahead=1)])
def test_the_shapes_do_not_depend_on_the_prompts(changes):
  """Or a program would be compiled for every batch of them."""
  of = lambda *lengths: prepare(
    layouts.continue_prompts([[7] * n for n in lengths], 64),
    steps=64,
    **changes,
  )[2]
  assert of(30, 3) == of(1, 30)


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_a_seed_that_is_no_uint32_is_refused(seed):
  layout = layouts.continue_prompts([[7]], 4)
  with pytest.raises(UserError, match=f'seed {seed} '):
    request.prepare(PLAIN, *layout, [seed])


def test_slots_on_padding_are_refused():
  canvas, fill, valid = layouts.continue_prompts([[7], [7, 8]], 4)
  with pytest.raises(UserError, match='row 0 has slots on its padding'):
    request.prepare(PLAIN, canvas, fill | ~valid, valid, [0, 1])
