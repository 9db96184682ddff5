"""What the documents say of the code is there."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / 'README.md', ROOT / 'WORKSPACE.md', *ROOT.glob('docs/*.md')]


@pytest.mark.parametrize('page', ['reliability.md', 'conventions.md'])
def test_every_test_that_a_page_names_as_a_proof_exists(page):
  named = set(re.findall(r'`(test_\w+)`', (ROOT / 'docs' / page).read_text()))
  files = (ROOT / 'tests').rglob('test_*.py')
  there = set(
    re.findall(
      r'^def (test_\w+)', '\n'.join(f.read_text() for f in files), re.M
    )
  )
  assert len(named) > 30
  assert not named - there


def test_messages_that_troubleshooting_quotes_are_in_the_code():
  """A quote must hold some words that the code has in one string."""
  text = (ROOT / 'docs' / 'troubleshooting.md').read_text()
  quotes = re.findall(r'^    (?:error: |warning: |step )(.*)', text, re.M)
  # Those that leave something out, but for one of a library.
  quotes += [q for q in re.findall(r'`([^`]*…[^`]*)`', text) if 'TPU' not in q]
  pieces = {
    ' '.join(node.value.split())
    for path in (ROOT / 'maskdiff').rglob('*.py')
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Constant) and isinstance(node.value, str)
  }
  pieces = {piece for piece in pieces if len(piece) > 9}
  assert len(quotes) > 12
  unknown = [q for q in quotes if not any(p in q for p in pieces)]
  assert not unknown


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_scripts_and_configs_that_are_named_exist(path):
  text = path.read_text()
  files = re.findall(
    r'(?<![\w/])(?:launch|configs|benchmarks|docs|tests|tokenizer|maskdiff)'
    r'/(?:\w+/)*\w+\.(?:py|sh|md|yaml|service)\b',
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
