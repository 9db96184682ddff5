"""Requests from token lists, and the end of answers."""

import numpy as np
import pytest

from maskdiff import config as config_lib
from maskdiff.errors import UserError
from maskdiff.sampling import layouts

EOS = 2


def test_answer_ends_before_its_first_eos():
  canvas = np.array([[7, EOS, 8, EOS, 9, EOS], [7, EOS, 8, 9, 9, 9]])
  fill = np.arange(6) >= np.array([[2], [2]])
  cut = layouts.cut(canvas, fill, EOS)
  assert canvas[0, cut[0]].tolist() == [7, EOS, 8]
  assert canvas[1, cut[1]].tolist() == [7, EOS, 8, 9, 9, 9]


def test_context_limits_the_slots():
  prompts = [[7] * 3, [8], [9] * 9]
  request = layouts.continue_prompts(prompts, 6, context=8)
  assert request.fill.sum(axis=1).tolist() == [5, 6, 1]
  with pytest.raises(UserError, match='10 tokens together'):
    layouts.check_context(8, request.valid.sum(axis=1).max())


def test_answer_may_be_empty():
  cut = layouts.cut([[7, EOS, 8]], [[False, True, True]], EOS)
  assert cut.tolist() == [[True, False, False]]


def test_widen_pads_on_the_right():
  request = layouts.continue_prompts([[7, 8], [9]], 2, seeds=[3, 4])
  wide = layouts.widen(request, 6)
  assert wide.canvas.shape == (2, 6)
  assert wide.fill.sum(axis=1).tolist() == [2, 2]
  assert wide.valid.sum(axis=1).tolist() == [4, 3]
  np.testing.assert_array_equal(wide.canvas[:, :4], request.canvas)
  assert wide.seeds.tolist() == request.seeds.tolist() == [3, 4]


@pytest.mark.parametrize('layout', ['prompts', 'gaps'])
def test_no_texts_are_refused(layout):
  with pytest.raises(UserError, match='no prompts'):
    if layout == 'prompts':
      layouts.continue_prompts([], 4)
    else:
      layouts.fill_gaps([], list)


def test_rows_longer_than_the_context_are_refused():
  c = config_lib.default()
  row = layouts.prompt_row([7] * (c.data.length - 8), 8)
  layouts.check_context(c.data.length, len(row))
  with pytest.raises(UserError, match='257 tokens.*config.data.length=256'):
    layouts.check_context(c.data.length, len([7, *row]))
