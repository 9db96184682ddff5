"""A network trained on short rows finds needles in longer ones, if scaled."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))
import json_lines  # noqa: E402
import long_rows  # noqa: E402


@pytest.mark.parametrize('name', ['long_rows', 'long_rows_text'])
def test_page_has_the_results(name):
  lines = json_lines.read(ROOT / 'benchmarks' / 'results' / f'{name}.jsonl')
  page = (ROOT / 'docs' / 'long_rows.md').read_text()
  assert long_rows.table(lines) in page


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
