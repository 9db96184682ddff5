"""Runs of earlier versions load and resume (tests/golden/run_of_0.1)."""

import json
import pathlib
import shutil

import pytest

from maskdiff import config as config_lib
from maskdiff.errors import UserError
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
    # One batch gives no standard error. The old version wrote 0.
    for name, value in before.items():
      if 'stderr' not in name and name.startswith(
        ('train/loss', 'train/grad_norm', 'eval/')
      ):
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


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(old_run):
  larger = pathlib.Path(__file__).parents[2] / 'tokenizer' / 'stdlib_4k.model'
  shutil.copy(larger, old_run / 'tokenizer.model')
  with pytest.raises(UserError, match='4096 ids, but the model has'):
    load.load(str(old_run))


def test_another_tokenizer_than_that_of_the_run_is_refused(old_run):
  path = old_run / 'tokenizer.model'
  # An unknown field of the format: the pieces are the same, the file is not.
  path.write_bytes(path.read_bytes() + b'\x82\x7d\x00')
  with pytest.raises(UserError, match='not the file that the model was'):
    load.load(str(old_run))
