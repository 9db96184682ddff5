"""What is asked for: layouts of text, and where answers end."""

import dataclasses

import numpy as np
import pytest

from maskdiff import config as config_lib
from maskdiff import request, run
from maskdiff.errors import UserError
from maskdiff.request import SamplerConfig

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
  layout = request.continue_prompts([[7, 8], [9]], 6)
  carry, laid, _ = prepare(layout)
  assert laid.slots[0].tolist() == [[2, 3, 4, 5], [6, 7, 8, 8]]
  assert laid.slots[1].tolist() == [[1, 2, 3, 4], [5, 6, 8, 8]]
  assert laid.num_slots.tolist() == [[4, 2], [4, 2]]
  assert carry.masked.sum() == 12
  assert carry.canvas.tolist()[1] == [9, *[MASK] * 6, 0]


def test_more_slots_to_come_make_more_blocks():
  layout = request.continue_prompts([[7, 8]], 3)
  carry, laid, _ = prepare(layout, gen_length=7)
  assert laid.slots.tolist() == [[[2, 3, 4, 5], [5, 5, 5, 5]]]
  assert laid.num_slots.tolist() == [[3, 0]]
  with pytest.raises(UserError, match='steps=3 .*multiple of 2'):
    prepare(layout, gen_length=7, steps=3)


def test_a_round_covers_what_is_visible_in_few_shapes():
  layout = request.continue_prompts([[7, 8], [9] * 30], 64)
  of = lambda **changes: prepare(layout, steps=64, **changes)[2]
  assert of() == ((94, 4),)
  assert of(cache='dual') == ((94, 4),)
  assert of(cache='prefix') == tuple((94, w) for w in (4, 8, 16, 32, 64))
  assert of(lookahead=0) == tuple((n, 4) for n in (6, 12, 24, 47, 94))
  assert of(lookahead=2, cache='prefix')[0] == (24, 12)


def test_an_answer_ends_before_its_first_eos():
  canvas = np.array([[7, EOS, 8, EOS, 9, EOS], [7, EOS, 8, 9, 9, 9]])
  fill = np.arange(6) >= np.array([[2], [2]])
  cut = request.cut(canvas, fill, EOS)
  assert canvas[0, cut[0]].tolist() == [7, EOS, 8]
  assert canvas[1, cut[1]].tolist() == [7, EOS, 8, 9, 9, 9]


def test_an_answer_may_be_empty():
  cut = request.cut([[7, EOS, 8]], [[False, True, True]], EOS)
  assert cut.tolist() == [[True, False, False]]


def test_rows_can_be_widened_with_padding():
  layout = request.continue_prompts([[7, 8], [9]], 2)
  canvas, fill, valid = request.widen(layout, 6)
  assert canvas.shape == (2, 6)
  assert fill.sum(axis=1).tolist() == [2, 2]
  assert valid.sum(axis=1).tolist() == [4, 3]
  np.testing.assert_array_equal(canvas[:, :4], layout[0])


@pytest.mark.parametrize('layout', ['prompts', 'gaps'])
def test_no_text_at_all_is_refused(layout):
  with pytest.raises(UserError, match='no prompts'):
    if layout == 'prompts':
      request.continue_prompts([], 4)
    else:
      request.fill_gaps([], list)


def test_rows_may_be_as_long_as_those_of_the_training_and_no_longer():
  c = config_lib.default()
  fits = request.continue_prompts([[7] * (c.data.length - 8), [7]], 8)
  run.check_context(c, fits[2])
  _, _, longer = request.continue_prompts([[7] * (c.data.length - 7)], 8)
  with pytest.raises(UserError, match='257 tokens.*config.data.length=256'):
    run.check_context(c, longer)


def test_padding_does_not_count_as_context():
  c = config_lib.default()
  _, _, valid = request.continue_prompts([[7], [7]], 8)
  run.check_context(c, np.pad(valid, ((0, 0), (300, 0))))
