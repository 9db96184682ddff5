"""docs/rl_8b.md has the settings of the configs and the plans in results."""

import pathlib
import re
import runpy
import sys

import pytest
from page_tables import cells

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'rl_8b.md').read_text()
sys.path.insert(0, str(ROOT / 'benchmarks'))

import json_lines  # noqa: E402
import plans_rl  # noqa: E402

CONFIG = runpy.run_path(str(ROOT / 'configs' / 'rl_8b.py'))
LINES = json_lines.read(plans_rl.RESULTS)


def published():
  """Yields (task, key, number) of the table of settings by task."""
  lines = PAGE[PAGE.index('| ESPO | key |') :].splitlines()
  head, rows = cells(lines[0])[2:], lines[2:]
  for line in rows[: rows.index('')]:
    _, key, *values = cells(line)
    for task, value in zip(head, values, strict=True):
      yield task, re.findall(r'`([\w.]+)`', key), float(value)


@pytest.mark.parametrize('suffix', ['', '_lora'])
def test_settings_are_those_of_the_configs(suffix):
  found = list(published())
  assert len(found) == 8 * 5
  for task, (key, *names), value in found:
    c = CONFIG['get_config'](task + suffix)
    if names:
      settings = dict(c.policy.settings)
      assert {settings[name] for name in names} == {value}
    else:
      assert c[key.split('.')[0]][key.split('.')[1]] == value


def test_answers_are_those_of_the_scripts():
  """8 processes, the batch of each, and its steps of accumulation."""
  batches = {'gsm8k': 3 * 4, 'math': 2 * 16, 'code': 20}
  for task in ('gsm8k', 'math', 'countdown', 'sudoku', 'code'):
    c = CONFIG['get_config'](task)
    assert c.train.batch == 8 * batches.get(task, 3 * 4)
    assert c.train.batch == c.policy.prompts * c.policy.group


def test_adapters_are_those_of_espo():
  c = CONFIG['get_config']('sudoku_lora')
  assert (c.lora.rank, c.lora.alpha, c.lora.targets) == (128, 64, ('all',))
  assert CONFIG['get_config']('sudoku').lora.rank == 0


@pytest.mark.parametrize('part', ['memory', 'rounds'])
def test_tables_of_plans(part):
  found = re.search(
    rf'<!-- benchmarks/plans_rl.py: {part} -->\n(.*?)\n<!-- end -->', PAGE, re.S
  )
  assert found[1] == getattr(plans_rl, part)(LINES)


def test_programs_are_of_the_configs():
  """A line has the shapes of its config, and of the tasks that share it."""
  keys = [(x['config'], x['topology'], x['program']) for x in LINES]
  assert len(set(keys)) == len(keys) > 0
  for line in LINES:
    for names, steps in plans_rl.tasks(line['config']):
      for name in names:
        c = CONFIG['get_config'](name)
        assert (c.train.batch, c.data.length) == (line['batch'], line['length'])
        assert c.train.microbatches == line['microbatches']
        assert c.model.remat == line['remat']
        assert (c.policy.inner_steps, 0) == (
          line['inner_steps'],
          c.policy.sampling_rows,
        )
        assert c.sample.steps == steps
    assert line['status'] == 'fits'
    assert line['hbm_total_gib'] <= line['hbm_capacity_gib']


def test_peaks_are_sums():
  """All arrays are in memory; the copy only while it is made, and samples."""
  for line in LINES:
    held = [line[f'hbm_{name}_gib'] for name in plans_rl.HELD]
    of_sampling = line['program'] in ('copy', 'sampling')
    total = sum(held if of_sampling else held[:3]) + line['hbm_buffers_gib']
    assert line['hbm_total_gib'] == pytest.approx(total)
