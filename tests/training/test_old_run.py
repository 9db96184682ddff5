"""Runs of earlier versions load and resume (tests/golden/run_of_0.1)."""

import json
import pathlib
import shutil

import pytest

from maskdiff import config as config_lib
from maskdiff.interop import load
from maskdiff.training import loop

OLD = pathlib.Path(__file__).parents[1] / 'golden' / 'run_of_0.1'


@pytest.fixture
def old_run(tmp_path, monkeypatch):
  """Copies the old work directory; its config has a relative data path."""
  shutil.copytree(OLD, tmp_path / 'old')
  monkeypatch.chdir(tmp_path / 'old')
  return tmp_path / 'old' / 'run'


@pytest.mark.slow
def test_old_run_resumes_with_the_same_losses(old_run):
  config = config_lib.from_dict(
    json.loads((old_run / 'config.json').read_text())
  )
  config.mesh.fsdp = 4  # of the 8 devices; the run was made on one
  config.mesh.sequence = 2
  loop.run(config, str(old_run))
  rows = [json.loads(x) for x in (old_run / 'metrics.jsonl').open()]
  expected = [json.loads(x) for x in (OLD / 'resumed.jsonl').open()]
  compared = 0
  for before in expected:
    for name, value in before.items():
      if name.startswith(('train/loss', 'train/grad_norm', 'eval/')):
        found = [
          r[name] for r in rows if r['step'] == before['step'] and name in r
        ]
        assert found == [pytest.approx(value, rel=1e-4)], name
        compared += 1
  assert compared >= 6


def test_old_run_loads(old_run):
  config, tokenizer, params, _ = load.load(str(old_run))
  assert config.model.embed == params['embed'].shape[1] == 8
  assert tokenizer.decode(tokenizer.encode('def read')) == 'def read'
