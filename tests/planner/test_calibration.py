"""Published step times, and the band of utilization that follows."""

import pytest

from maskdiff.distributed import chips
from maskdiff.planner import calibration

# Weights without the embedding, layers, width, length: of the published models.
MODELS = {
  'MaxText Llama-2-7B': (6_738_415_616 - 32_000 * 4096, 32, 4096, 4096),
  'MaxText Llama-3.1-8B': (8_030_261_248 - 128_256 * 4096, 32, 4096, 8192),
}


@pytest.mark.parametrize(
  'm', calibration.MEASURED, ids=lambda m: f'{m.chip}-{m.chips}'
)
def test_measured_time_gives_the_published_utilization(m):
  """6 FLOPs per weight and 12 per layer, pair and channel, per token."""
  weights, layers, width, length = MODELS[m.program]
  flops = m.tokens * (6 * weights + 12 * layers * width * length)
  peak = chips.parse_topology(f'{m.chip}:1x1' + 'x1' * (m.chip == 'v5p'))[0]
  found = flops / m.measured_s / peak.peak_flops
  assert found == pytest.approx(m.mfu, rel=0.015)


def test_estimates_are_within_six_percent_of_measurements():
  for m in calibration.MEASURED:
    assert 1.03 < m.predicted_s / m.measured_s < 1.06


def test_band_lies_around_the_estimate():
  low, high = calibration.band(0.76, 64)
  assert low == pytest.approx(0.76 * 0.824)  # 2.06 of 2.5 s
  assert high == pytest.approx(0.76 * 2.859 / 2.7)
  assert calibration.band(0.99, 64)[1] == 1.0


@pytest.mark.parametrize(
  'chips, left',
  [(1, 1), (256, 1), (1024, (52.4 / 63.0) ** 0.5), (4096, 52.4 / 63.0)],
)
def test_more_chips_lower_only_the_low_end(chips, left):
  low, high = calibration.band(0.7, chips)
  assert low == pytest.approx(0.7 * 0.824 * left)
  assert high == calibration.band(0.7, 1)[1]


def test_cell_has_the_band():
  plan = {'mfu': 0.7604, 'mfu_low': 0.6266, 'mfu_high': 0.8052}
  assert calibration.cell(plan) == '76.0% (63% to 81%)'
