"""The figures of the proof run follow from its raw metrics."""

import json
import pathlib
import runpy
import sys

import pytest

from maskdiff import config
from maskdiff.monitoring import history

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'benchmarks'))
import proof  # noqa: E402
from recipes import RECIPES  # noqa: E402


def run_of(train, evaluations):
  """Returns a Proof with made-up metrics; a step has 1,000 tokens."""
  rows = [{'step': s, proof.TRAIN_LOSS: x} for s, x in train.items()]
  for step, (loss, error) in evaluations.items():
    row = {proof.LOSS: loss, proof.STDERR: error, proof.BITS: loss / 2}
    rows.append({'step': step, **row, 'sample/0': f'text at {step}'})
  config = {
    'train.batch': 10,
    'data.length': 100,
    'sample.prompts': ['te'],
  }
  data = {
    'heldout_unigram_entropy_nats': 6.0,
    'heldout_tokens': 100,
    'heldout_text_bytes': 300,
  }
  return proof.Proof(history.Run('made', 'made', rows, config), data)


@pytest.fixture
def runs():
  train = {s: 8 - s / 1000 for s in range(100, 4001, 100)}
  return {
    'masked': run_of({}, {0: (8.0, 0.1), 4000: (5.0, 0.04)}),
    'autoregressive': run_of(train, {0: (8.0, 0.1), 4000: (4.0, 0.02)}),
  }


def test_table_has_the_last_evaluations_with_their_errors(runs):
  lines = proof.table(runs).splitlines()
  assert '4.0M tokens' in lines[0]
  assert lines[2].endswith('| 5.000 ± 0.040 | 2.500 ± 0.020 |')
  assert lines[3].endswith('| 4.000 ± 0.020 | 2.000 ± 0.010 |')
  # 6 nats of 3 bytes: 6 / 3 / ln 2 bits per byte.
  assert lines[4].endswith('| 6.000 | 2.885 |')


def test_baseline_passes_the_bound_when_five_rows_are_below_it(runs):
  # The mean of steps s - 400 to s is 8 - (s - 200) / 1000.
  assert proof.tokens_until(runs['autoregressive'], 5.05) == 3_200_000
  assert proof.tokens_until(runs['autoregressive'], 1.0) is None
  assert '1.00 nats' in proof.verdict(runs)
  assert '3.30M tokens, 1/1 of all tokens' in proof.verdict(runs)


def test_samples_are_the_last_ones(runs):
  assert 'text at 4000' in proof.samples(runs)
  assert 'text at 0' not in proof.samples(runs)


def test_filled_gaps_are_in_brackets():
  infill, text = 'for {{2}} in a[{{1}}]:', 'for x, y in a[0]:'
  assert proof.bracketed(infill, text) == 'for [x, y] in a[[0]]:'


@pytest.mark.parametrize('page', ['README.md', 'docs/proof.md'])
def test_pages_have_the_figures_of_the_raw_metrics(page):
  runs = {name: proof.read(proof.RAW / name) for name in proof.NAMES}
  text = (ROOT / page).read_text()
  assert '<!-- benchmarks/proof.py: table -->' in text
  assert text == proof.filled(text, runs)


@pytest.mark.parametrize('name', proof.NAMES)
def test_raw_metrics_come_from_the_named_config(name):
  path = ROOT / 'configs' / 'proof.py'
  wanted = runpy.run_path(str(path))['get_config']()
  if name.endswith(proof.BEFORE):
    wanted.update_from_flattened_dict(RECIPES['uniform'])
  if name.startswith('autoregressive'):
    wanted.objective.name = 'autoregressive'
  raw = json.loads((proof.RAW / name / 'config.json').read_text())
  assert config.flatten(config.from_dict(raw)) == config.flatten(wanted)
