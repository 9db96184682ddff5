"""What the documents say of the code is there."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / 'README.md', ROOT / 'WORKSPACE.md', *ROOT.glob('docs/*.md')]


def test_every_test_that_a_fault_is_said_to_have_exists():
  text = (ROOT / 'docs' / 'reliability.md').read_text()
  named = set(re.findall(r'`(test_\w+)`', text.partition('## Faults')[2]))
  files = (ROOT / 'tests').rglob('test_*.py')
  there = set(
    re.findall(
      r'^def (test_\w+)', '\n'.join(f.read_text() for f in files), re.M
    )
  )
  assert len(named) > 30
  assert not named - there


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_scripts_and_configs_that_are_named_exist(path):
  text = path.read_text()
  files = re.findall(
    r'\b(?:launch|configs|benchmarks|docs|tests|tokenizer)/\w+\.(?:py|sh|md|yaml|service)\b',
    text,
  )
  missing = [name for name in set(files) if not (ROOT / name).exists()]
  assert not missing


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_config_keys_that_are_named_exist(path):
  from maskdiff import config

  known = config.flatten(config.default())
  keys = re.findall(r'\bconfig\.(\w+\.\w+)', path.read_text())
  missing = [k for k in set(keys) if k not in known and not k.endswith('.py')]
  assert not missing
