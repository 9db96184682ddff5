"""Recipes are valid, and docs/recipes.md has the figures of the raw lines."""

import pathlib
import sys

import numpy as np
import pytest

from maskdiff import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))
import recipes  # noqa: E402
import recipes_page as page  # noqa: E402


def line(recipe, seed, bounds, batches, flops=1.0):
  return {
    'config': 'tiny',
    'set': [],
    'corpus': 'made',
    'recipe': recipe,
    'seed': seed,
    'flops_per_token': flops,
    'evaluations': [[100 * i, x] for i, x in enumerate(bounds)],
    'heldout_batches': batches,
  }


@pytest.mark.parametrize('recipe', recipes.RECIPES)
def test_recipe_is_a_valid_config(recipe):
  config = config_lib.default()
  config.update_from_flattened_dict(recipes.RECIPES[recipe])
  config_lib.validate(config)


def test_table_has_the_tokens_and_flops_to_the_bound_of_the_first_recipe():
  lines = [
    line('uniform', 0, [8, 6, 5], [5.5, 4.5]),
    line('uniform', 1, [8, 7, 6], [6.5, 5.5]),
    # Seed 0 reaches 5 halfway between steps 100 and 200; seed 1 reaches 6 at
    # step 100.
    line('bell', 0, [8, 5.5, 4.5], [5.0, 4.0], flops=1.2),
    line('bell', 1, [8, 6, 4], [4.5, 3.5], flops=1.2),
    line('plain', 0, [8, 7, 6], [5.5, 4.5]),
  ]
  ((group, of),) = page.groups(lines).items()
  assert group == ('tiny', 'made')
  rows = {row[0]: row[1:] for row in page.table(of)}
  assert rows['uniform'] == ('2', '5.500', '', '1.00', '1.00')
  share = np.mean([0.75, 0.5])
  assert rows['bell'][:2] == ('2', '4.250')
  assert rows['bell'][3:] == (f'{share:.2f}', f'{1.2 * share:.2f}')
  assert rows['plain'][3:] == ('not reached', 'not reached')


def test_errors_of_seeds_and_batches_add_up():
  # Means of seeds: -1 and -2, of batches: -1 and -2. Each has the variance 1/2.
  assert page.with_error(np.array([[-0.5, -1.5], [-1.5, -2.5]])) == (
    '-1.500 ± 0.707'
  )
  # One seed: the error over the batches only.
  assert page.with_error(np.array([[-1.0, -2.0]])) == '-1.500 ± 0.500'


def test_page_has_the_tables_of_the_raw_lines():
  text = page.PAGE.read_text()
  assert page.filled(text, page.groups(recipes.read(page.RAW))) == text
