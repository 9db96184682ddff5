"""Runs scripts of launch/ for a benchmark."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def launch(script, *flags):
  """Runs a script of launch/; ends this program if it fails.

  Args:
    script: path of the script below launch/.
    *flags: words of the command, as text or as values with a text.
  """
  done = subprocess.run(
    [sys.executable, ROOT / 'launch' / script, *map(str, flags)],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )
  if done.returncode:
    sys.exit(f'{script}: {done.stderr[-2000:]}')
