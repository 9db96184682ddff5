"""Tests, messages, files and config keys that documents name exist."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCUMENTS = [
  *(ROOT / f'{name}.md' for name in ('README', 'WORKSPACE', 'CONTRIBUTING')),
  *ROOT.glob('docs/*.md'),
]


@pytest.mark.parametrize('page', ['reliability.md', 'conventions.md'])
def test_tests_named_as_proofs_exist(page):
  named = set(re.findall(r'`(test_\w+)`', (ROOT / 'docs' / page).read_text()))
  files = (ROOT / 'tests').rglob('test_*.py')
  existing = set(
    re.findall(
      r'^def (test_\w+)', '\n'.join(f.read_text() for f in files), re.M
    )
  )
  assert len(named) > 30
  assert not named - existing


def test_quoted_messages_are_in_the_code():
  """Each quote contains a string constant of the code."""
  text = (ROOT / 'docs' / 'troubleshooting.md').read_text()
  quotes = re.findall(r'^    (?:error: |warning: |step )(.*)', text, re.M)
  # Quotes with an ellipsis, except one of libtpu.
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
def test_named_files_exist(path):
  text = path.read_text()
  files = re.findall(
    r'(?<![\w/])(?:launch|configs|benchmarks|docs|tests|tokenizer|maskdiff)'
    r'/(?:\w+/)*\w+\.(?:py|sh|md|yaml|service)\b',
    text,
  )
  missing = [name for name in set(files) if not (ROOT / name).exists()]
  assert not missing


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_named_config_keys_exist(path):
  from maskdiff import config

  known = config.flatten(config.default())
  keys = re.findall(r'\bconfig\.(\w+\.\w+)', path.read_text())
  missing = [k for k in set(keys) if k not in known and not k.endswith('.py')]
  assert not missing


def test_map_names_every_module():
  """WORKSPACE.md lists the modules of each room below the name of the room."""
  text = (ROOT / 'WORKSPACE.md').read_text()
  block = re.search(r'<!-- rooms -->\n```text\n(.*?)```', text, re.S)[1]
  listed, room = set(), None
  for line in block.splitlines():
    if match := re.match(r'(\w+)/', line):
      room = match[1]
    elif 'one file per section:' in line:
      names = line.partition(':')[2].split()
      listed |= {(room, name) for name in names}
    elif line.startswith('  '):
      cells = line[2:22], line[65:85]
      listed |= {(room, c.strip()) for c in cells if c.strip()}
  modules = {
    (path.parent.name, path.stem)
    for path in (ROOT / 'maskdiff').glob('*/*.py')
    if path.stem != '__init__'
  }
  assert listed == modules
