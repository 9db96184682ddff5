"""A config for pods, compiled by the TPU compiler.

No TPU is needed: libtpu compiles for a topology by name. The test compiles the
train step of launch/pretrain.py in its own process, because libtpu reads its
settings when JAX is imported. Compiling 1B takes longer, because of Muon;
benchmarks/plans.py plans it. The figures in the docstrings of configs/ come
from launch/plan.py; these tests assert properties of the same programs.
"""

import json
import re

import pytest
import tpu_compiler
from tpu_compiler import ROOT, needs_libtpu

pytestmark = [pytest.mark.slow, needs_libtpu]

COMPILE = """
import json, runpy, sys
from maskdiff.planner import plan

path, topology, overrides = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
config = runpy.run_path(path)['get_config']()
config.update_from_flattened_dict(overrides)
texts = []
compile_train = plan.compile_train

def keep_text(config, target):
  compiled = compile_train(config, target)
  texts.append(compiled.executable.as_text())
  return compiled

plan.compile_train = keep_text
# Only the train step: test_launch_plan.py plans an evaluation.
plan._evaluation = lambda *args: {}
print(json.dumps({'plan': plan.plan(config, topology), 'hlo': texts[0]}))
"""


def compile_for(topology, config, **overrides):
  """Returns the plan of a config and the HLO text of the train step."""
  path = str(ROOT / 'configs' / config)
  compiled = tpu_compiler.run(COMPILE, path, topology, json.dumps(overrides))
  return compiled['plan'], compiled['hlo']


def test_8b_fits_64_chips_of_v5p():
  plan, hlo = compile_for('v5p:4x4x4', '8b.py')
  assert plan['fits'] and plan['chips'] == 64 and plan['rows_per_chip'] == 4
  parts = plan['microbatches']
  # Parameters and two moments in float32, split over all chips.
  assert plan['hbm_arguments_gib'] < 1.05 * 3 * 4 * 8.016e9 / 64 / 2**30
  assert plan['mfu'] > 0.70

  # No logits of a microbatch: 4 rows of 4096 tokens, 126464 wide.
  assert not re.search(r'\[(4,4096|16384),126464\]', hlo)
  # No attention scores.
  assert '4096,4096,4096]' not in hlo and '[4,32,4096,4096]' not in hlo
  # Each layer runs its attention kernel once forward and once backward.
  kernels = [o for o in plan['operations'] if 'attention kernel' in o['part']]
  assert sorted((o['part'], o['count']) for o in kernels) == [
    ('attention kernel backward', 32 * parts),
    ('attention kernel forward', 32 * parts),
  ]

  # Gradients are reduce-scattered and weights gathered during the products.
  moved = {}
  for c in plan['collectives']:
    assert c['axes'] == 'fsdp', c
    of_kind = moved.setdefault(c['kind'], {'gb': 0, 'sync': 0})
    of_kind['gb'] += c['gb']
    of_kind['sync'] += c['sync_count']
    if c['kind'] == 'reduce-scatter' and c['dtype'] == 'f32':
      # In every microbatch: the loop carries no unreduced gradient.
      assert c['count'] == 2 * parts
  assert moved['all-gather']['sync'] == moved['reduce-scatter']['sync'] == 0
  assert moved['all-reduce']['gb'] < 0.01 * parts
  # Each weight once in bfloat16; the two vocabulary matrices in float32.
  vocabulary = 2 * 126_464 * 4096
  inner = plan['parameters'] - vocabulary
  expected = parts * (2 * inner + 4 * vocabulary) * 63 / 64 / 1e9
  assert moved['reduce-scatter']['gb'] == pytest.approx(expected, rel=0.02)
  assert plan['exposed_ici_s'] < 0.02 * plan['step_s']
