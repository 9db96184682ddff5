"""The tables of docs/policy_gradients.md are those of the raw lines."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))
import json_lines  # noqa: E402
import policy_gradients  # noqa: E402
import policy_gradients_page as page  # noqa: E402
import policy_training  # noqa: E402

LINES = json_lines.read(page.RAW)


def test_page_has_the_tables_of_the_raw_lines():
  text = page.PAGE.read_text()
  assert page.filled(text, LINES) == text


def test_each_line_is_a_case_that_is_not_computed_again():
  cases = policy_gradients.cases() + policy_training.cases()
  cases += policy_training.start_cases()
  for line in LINES:
    assert sum(case.items() <= line.items() for case in cases) == 1, line
