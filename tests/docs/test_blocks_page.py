"""The tables of docs/block_diffusion.md are those of the raw results."""

import json
import pathlib
import re
import runpy
import sys

import pytest

from maskdiff import config

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'block_diffusion.md').read_text()
sys.path.insert(0, str(ROOT / 'benchmarks'))

import proof  # noqa: E402
import proof_blocks  # noqa: E402
import throughput_page  # noqa: E402


def part(script, name):
  """Returns the part of the page that a script writes."""
  return re.search(
    rf'<!-- benchmarks/{script}.py: {name} -->\n(.*?)\n<!-- end -->', PAGE, re.S
  )[1]


def test_table_of_the_runs():
  runs = {name: proof.read(proof.RAW / name) for name in proof_blocks.RUNS}
  assert part('proof_blocks', 'table') == proof_blocks.markdown(runs)


def test_tables_of_speed():
  canvases = throughput_page.by_canvas(throughput_page.read('throughput.jsonl'))
  assert part('throughput_page', 'speed') == throughput_page.speed_table(
    canvases
  )
  lines = throughput_page.read('equal_quality.jsonl')
  assert part('throughput_page', 'quality') == throughput_page.quality_table(
    lines
  )


@pytest.mark.parametrize('name', [n for n in proof_blocks.RUNS if '_' in n])
def test_runs_have_the_recipe_of_the_proof_run(name):
  """They differ from it in the keys of the commands of the page only."""
  wanted = runpy.run_path(str(ROOT / 'configs' / 'proof.py'))['get_config']()
  raw = json.loads((proof.RAW / name / 'config.json').read_text())
  found, wanted = (config.flatten(c) for c in (config.from_dict(raw), wanted))
  changed = {key for key in found if found[key] != wanted[key]}
  assert found['objective.name'] == 'block_diffusion'
  converted = {
    'init_from',
    'data.skip_samples',
    'model.predict_next',
    'objective.clean_attention',
    'objective.autoregressive_weight',
    'objective.block_plan',
    'eval.every_steps',
  }
  assert changed <= {
    'objective.name',
    'objective.block_length',
    'train.steps',
    'optimizer.decay_steps',
    'checkpoint.every_steps',
    'checkpoint.keep_every_steps',
    *(converted if name.startswith('converted') else ()),
  }
