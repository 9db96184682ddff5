"""Runs programs with the real TPU compiler, on a machine without a TPU.

Each program runs in its own process, because libtpu reads its settings when
JAX starts.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from maskdiff.planner.environment import COMPILER_ENVIRONMENT

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Without the fake devices of conftest.py.
ENVIRONMENT = {
  **{k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
  'PYTHONPATH': str(ROOT),
}
needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None,
  reason='libtpu is not installed: pip install -r requirements-test.txt',
)


def run(program, *args):
  """Runs a Python program and returns its last line, parsed as JSON.

  Returns None if the program prints nothing.
  """
  result = subprocess.run(
    [sys.executable, '-c', program, *args],
    env=ENVIRONMENT | COMPILER_ENVIRONMENT,
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  lines = result.stdout.splitlines()
  return json.loads(lines[-1]) if lines else None
