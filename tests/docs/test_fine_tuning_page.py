"""The tables of docs/fine_tuning.md are those of raw results and plans."""

import pathlib
import re
import runpy
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'fine_tuning.md').read_text()
sys.path.insert(0, str(ROOT / 'benchmarks'))

import fine_tuning  # noqa: E402
import json_lines  # noqa: E402
import lengths  # noqa: E402

CONFIG = runpy.run_path(str(ROOT / 'configs' / 'sft_8b.py'))
LINES = json_lines.read(fine_tuning.RESULTS)


def test_table_of_exact_match():
  script = '<!-- benchmarks/fine_tuning.py: table -->'
  part = re.search(rf'{script}\n(.*?)\n<!-- end -->', PAGE, re.S)[1]
  assert part == fine_tuning.table(LINES)


@pytest.mark.parametrize('name', ['lengths', 'lengths_long'])
def test_tables_of_lengths(name):
  lines = json_lines.read(ROOT / 'benchmarks' / 'results' / f'{name}.jsonl')
  page = (ROOT / 'docs' / 'chat_data.md').read_text()
  assert lengths.table(lines) in page


def test_every_training_solves_nine_of_ten_puzzles():
  runs = {(x['task'], x['objective'], x['seed']) for x in LINES}
  assert len(runs) == len(LINES) == 12
  assert all(x['exact_match'][-1][1] > 0.9 for x in LINES)


def test_table_of_plans_has_the_machines_of_the_config():
  rows = re.findall(
    r'\| (v\w+-8(?:-lora)?) \| (adapters|all) \|.*\| ([\d.]+) \| ([\d,]+) \|',
    PAGE,
  )
  assert {name for name, *_ in rows} == set(CONFIG['MACHINES'])
  for name, trained, step, speed in rows:
    c = CONFIG['get_config'](name)
    assert (c.lora.rank > 0) == (trained == 'adapters')
    assert c.checkpoint.every_steps * float(step) < 3600
    tokens = c.train.batch * c.data.length
    assert abs(tokens / float(step) - int(speed.replace(',', ''))) < 20
