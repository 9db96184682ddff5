"""maskdiff.__version__ is the version; other files agree with it."""

import pathlib
import re
import tomllib

import maskdiff

ROOT = pathlib.Path(__file__).parents[2]


def test_pyproject_reads_the_version_of_the_package():
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
  assert 'version' in project['project']['dynamic']
  source = project['tool']['setuptools']['dynamic']['version']
  assert source == {'attr': 'maskdiff.__version__'}


def test_changelog_and_citation_have_the_version():
  changelog = (ROOT / 'CHANGELOG.md').read_text()
  assert re.findall(r'^## \[(\d\S*)\]', changelog, re.M)[0] == (
    maskdiff.__version__
  )
  citation = (ROOT / 'CITATION.cff').read_text()
  assert f'\nversion: {maskdiff.__version__}\n' in citation
