"""The tables of docs/policy_methods.md are those of the raw lines."""

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))
import json_lines  # noqa: E402
import policy_methods as methods  # noqa: E402
import policy_methods_page as page  # noqa: E402

LINES = json_lines.read(page.RAW)
CASES = [(task, method) for task in methods.TASKS for method in methods.METHODS]


def test_page_has_the_tables_of_the_raw_lines():
  text = page.PAGE.read_text()
  assert page.filled(text, LINES) == text


@pytest.mark.parametrize('task, method', CASES)
def test_each_method_has_three_seeds_at_its_best_rate(task, method):
  found = methods.select(LINES, kind='training', task=task, method=method)
  assert [line['seed'] for line in found] == [1, 2, 3]
  rate = methods.best_rate(LINES, task, method)
  assert {line['rate'] for line in found} == {rate}


@pytest.mark.parametrize('task, method', CASES)
def test_each_training_spends_both_budgets(task, method):
  ends = methods.budgets(LINES, task, method)
  for line in methods.select(LINES, kind='training', task=task, method=method):
    assert line['correct'][-1][0] >= max(ends)


def test_shares_are_interpolated():
  assert page.at([[0, 0.2], [10, 0.4], [20, 0.0]], 15) == pytest.approx(0.2)
  with pytest.raises(ValueError):
    page.at([[0, 0.2], [10, 0.4]], 11)
