"""Slots divided into blocks, and the shapes of forward passes."""

import dataclasses

import fake_networks
import pytest
import sampled
import tiny

from maskdiff.errors import UserError
from maskdiff.sampling import layouts

MASK = 4
NETWORK = fake_networks.network(tiny.MODEL, mask_id=MASK)
PLAIN = dict(
  steps=4,
  block_length=4,
  temperature=0.0,
  remasking='low_confidence',
)


def begin(request, **changes):
  return sampled.begin(NETWORK, {**PLAIN, **changes}, request)


def test_slots_are_divided_into_blocks_from_the_left():
  request = layouts.continue_prompts([[7, 8], [9]], 6)
  carry, laid, _ = begin(request)
  assert laid.slots[0].tolist() == [[2, 3, 4, 5], [6, 7, 8, 8]]
  assert laid.slots[1].tolist() == [[1, 2, 3, 4], [5, 6, 8, 8]]
  assert laid.num_slots.tolist() == [[4, 2], [4, 2]]
  assert carry.masked.sum() == 12
  assert carry.canvas.tolist()[1] == [9, *[MASK] * 6, 0]


def test_gen_length_sets_the_number_of_blocks():
  request = layouts.continue_prompts([[7, 8]], 3)
  carry, laid, _ = begin(request, gen_length=7)
  assert laid.slots.tolist() == [[[2, 3, 4, 5], [5, 5, 5, 5]]]
  assert laid.num_slots.tolist() == [[3, 0]]
  with pytest.raises(UserError, match='steps=3 .*multiple of 2'):
    begin(request, gen_length=7, steps=3)


def test_passes_have_few_shapes():
  request = layouts.continue_prompts([[7, 8], [9] * 30], 64)
  of = lambda **changes: begin(request, steps=64, **changes)[2]
  assert of() == ((94, 4),)
  assert of(cache='dual') == ((94, 4),)
  assert of(cache='prefix') == tuple((94, w) for w in (6, 12, 24, 47, 94))
  assert of(lookahead=0) == tuple((n, 4) for n in (6, 12, 24, 47, 94))
  assert of(lookahead=2, cache='prefix') == tuple(
    (n, 12) for n in (12, 24, 47, 94)
  )
  assert of(lookahead=99, cache='prefix') == ((94, 94),)


@pytest.mark.parametrize('changes', [dict(cache='prefix'), dict(lookahead=1)])
def test_shapes_do_not_depend_on_the_prompts(changes):
  """If they did, every batch of prompts would compile a program."""
  of = lambda *lengths: begin(
    layouts.continue_prompts([[7] * n for n in lengths], 64),
    steps=64,
    **changes,
  )[2]
  assert of(30, 3) == of(1, 30)


@pytest.mark.parametrize('seed', [-1, 2**32])
def test_seed_outside_uint32_is_refused(seed):
  request = layouts.continue_prompts([[7]], 4, seeds=[seed])
  with pytest.raises(UserError, match=f'seed {seed} '):
    begin(request)


def test_slots_on_padding_are_refused():
  request = layouts.continue_prompts([[7], [7, 8]], 4)
  with pytest.raises(UserError, match='row 0 has slots on its padding'):
    begin(request._replace(fill=request.fill | ~request.valid))


def test_delaying_the_end_of_turn_needs_its_id():
  network = dataclasses.replace(NETWORK, eos_id=3)
  request, c = layouts.continue_prompts([[7]], 4), PLAIN | {'steps': 4}
  delayed = c | {'confidence_eos_eot_inf': True}
  with pytest.raises(UserError, match='needs an end-of-turn token: set eot_id'):
    sampled.begin(network, delayed, request)
  sampled.begin(network, delayed | {'eot_id': 3}, request)
