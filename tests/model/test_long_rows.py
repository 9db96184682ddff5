"""A network trained on short rows finds needles in longer ones, if scaled."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'benchmarks'))
import long_rows  # noqa: E402


@pytest.mark.slow
def test_scaling_keeps_the_bound_at_four_times_the_training_length():
  """Picking one of the two needles by chance costs ln 2 nats.

  docs/long_rows.md compares the two ways to count a length, with three seeds.
  """
  lines = long_rows.on_needles(*long_rows.train(0), lengths=(256,))
  found = {
    (x['length'], x['lengths_count']): x['nats_per_token'] for x in lines
  }
  assert found[64, 'none'] < 0.05
  assert found[256, 'none'] > 1.5
  assert found[256, 'two-sided'] < 0.5
