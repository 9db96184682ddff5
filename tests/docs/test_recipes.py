"""Recipes are valid, and docs/recipes.md has the figures of the raw lines."""

import argparse
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
  # Differences -0.5, -0.5 and -2, -2.
  assert rows['bell'][:3] == ('2', '4.250', '-1.250 ± 0.750')
  assert rows['bell'][3:] == (f'{share:.2f}', f'{1.2 * share:.2f}')
  assert rows['plain'][3:] == ('not reached', 'not reached')


def test_trainings_that_have_a_line_are_skipped(tmp_path, monkeypatch):
  trained = []

  def train(config, workdir, values):
    trained.append((values['seed'], values['optimizer.name']))
    return {'evaluations': [[0, 8.0]]}

  monkeypatch.setattr(recipes, 'train', train)
  out = tmp_path / 'recipes.jsonl'
  args = argparse.Namespace(
    config='configs/tiny.py',
    set=['train.steps=10'],
    data=None,
    recipes=['uniform', 'muon'],
    seeds=[0, 1],
    runs=tmp_path,
    out=out,
  )
  recipes.run(args)
  assert trained == [(0, 'adamw'), (0, 'muon'), (1, 'adamw'), (1, 'muon')]
  first, *_ = lines = out.read_text().splitlines()
  out.write_text('\n'.join(lines[1:]) + '\n')
  recipes.run(args)
  assert trained[4:] == [(0, 'adamw')]
  assert out.read_text().splitlines()[-1] == first
  args.set = ['train.steps=20']
  recipes.run(args)
  assert len(trained) == 9


@pytest.mark.parametrize('pair', ['train.steps', 'optimizer.name=muon'])
def test_set_of_a_key_of_the_recipes_is_refused(pair):
  with pytest.raises(SystemExit, match='with a key that no recipe sets'):
    recipes.run(argparse.Namespace(set=[pair]))


def test_flops_of_muon_are_those_of_its_products():
  config = config_lib.default()
  config.optimizer.name = 'muon'
  config.update_from_flattened_dict(
    {
      'model.layers': 2,
      'model.embed': 8,
      'model.heads': 1,
      'model.kv_heads': 1,
      'model.head_dim': 8,
      'model.mlp': 16,
    }
  )
  # Two products of (m, m, n) and one of (m, m, m), of 2 FLOPs per multiply-add.
  square, wide = 2 * 3 * 8**3, 2 * (2 * 8 * 8 * 16 + 8**3)
  assert recipes.optimizer_flops(config) == 2 * 5 * (4 * square + 3 * wide)
  config.optimizer.name = 'adamw'
  assert recipes.optimizer_flops(config) == 0


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
