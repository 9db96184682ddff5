"""Layouts of text, and where answers end."""

import numpy as np
import pytest

from maskdiff import config as config_lib
from maskdiff.errors import UserError
from maskdiff.sampling import layouts

EOS = 2


def test_an_answer_ends_before_its_first_eos():
  canvas = np.array([[7, EOS, 8, EOS, 9, EOS], [7, EOS, 8, 9, 9, 9]])
  fill = np.arange(6) >= np.array([[2], [2]])
  cut = layouts.cut(canvas, fill, EOS)
  assert canvas[0, cut[0]].tolist() == [7, EOS, 8]
  assert canvas[1, cut[1]].tolist() == [7, EOS, 8, 9, 9, 9]


def test_answers_may_be_given_the_room_that_a_context_leaves():
  prompts = [[7] * 3, [8], [9] * 9]
  request = layouts.continue_prompts(prompts, 6, context=8)
  assert request.fill.sum(axis=1).tolist() == [5, 6, 1]
  with pytest.raises(UserError, match='10 tokens together'):
    layouts.check_context(8, request.valid)


def test_an_answer_may_be_empty():
  cut = layouts.cut([[7, EOS, 8]], [[False, True, True]], EOS)
  assert cut.tolist() == [[True, False, False]]


def test_rows_can_be_widened_with_padding():
  request = layouts.continue_prompts([[7, 8], [9]], 2, seeds=[3, 4])
  wide = layouts.widen(request, 6)
  assert wide.canvas.shape == (2, 6)
  assert wide.fill.sum(axis=1).tolist() == [2, 2]
  assert wide.valid.sum(axis=1).tolist() == [4, 3]
  np.testing.assert_array_equal(wide.canvas[:, :4], request.canvas)
  assert wide.seeds.tolist() == request.seeds.tolist() == [3, 4]


@pytest.mark.parametrize('layout', ['prompts', 'gaps'])
def test_no_text_at_all_is_refused(layout):
  with pytest.raises(UserError, match='no prompts'):
    if layout == 'prompts':
      layouts.continue_prompts([], 4)
    else:
      layouts.fill_gaps([], list)


def test_rows_may_be_as_long_as_those_of_the_training_and_no_longer():
  c = config_lib.default()
  fits = layouts.continue_prompts([[7] * (c.data.length - 8), [7]], 8)
  layouts.check_context(c.data.length, fits.valid)
  longer = layouts.continue_prompts([[7] * (c.data.length - 7)], 8)
  with pytest.raises(UserError, match='257 tokens.*config.data.length=256'):
    layouts.check_context(c.data.length, longer.valid)


def test_padding_does_not_count_as_context():
  c = config_lib.default()
  request = layouts.widen(layouts.continue_prompts([[7], [7]], 8), 300)
  layouts.check_context(c.data.length, request.valid)
