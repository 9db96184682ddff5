"""Every script with closed, broken and ASCII streams, and with odd names."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.stem for path in (ROOT / 'launch').glob('*.py'))
# Not UTF-8, a control sequence, a letter that ASCII lacks, a newline.
ODD = b'\xff\x1b[2J\xc5\x91\n'
# Arguments with a file or folder of this name, which does not exist.
ABSENT = {
  'chat': b'--workdir=ODD',
  'checkpoints': b'--workdir=ODD',
  'convert': b'--from=hf --source=ODD --out=ODD/new',
  'evaluate': b'--workdir=ODD --task=addition',
  'finetune': b'--config=ODD --workdir=ODD',
  'goodput': b'--workdir=ODD',
  'harness': b'--workdir=ODD --tasks=a',
  'instructions': b'--out=ODD/new',
  'plan': b'--config=ODD --topology=v5e:2x4',
  'preferences': b'--config=ODD --workdir=ODD',
  'prepare': b'--inspect=ODD',
  'pretrain': b'--config=ODD --workdir=ODD',
  'puzzles': b'--task=addition --out=ODD/new',
  'report': b'ODD',
  'rl': b'--config=ODD --workdir=ODD',
  'sample': b'--workdir=ODD',
  'serve': b'--workdir=ODD',
  'tasks': b'--task=addition --out=ODD/new',
}


def run(script, *arguments, redirect='', stdout=subprocess.PIPE, **changes):
  """Runs a script by a shell, which can close streams; returns the process."""
  return subprocess.run(
    ['bash', '-c', f'exec "$@" {redirect}', 'bash', sys.executable]
    + [f'launch/{script}.py', *arguments],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(ROOT), **changes},
    stdin=subprocess.DEVNULL,
    stdout=stdout,
    stderr=subprocess.PIPE,
  )


@pytest.mark.parametrize('script', SCRIPTS)
def test_closed_and_broken_streams_cause_no_traceback(script):
  assert run(script, '--help', redirect='<&- >&- 2>&-').returncode == 0
  reader, writer = os.pipe()
  os.close(reader)
  done = run(script, '--help', stdout=writer)
  os.close(writer)
  assert (done.returncode, done.stderr) == (141, b'')


@pytest.mark.parametrize('script', SCRIPTS)
def test_an_odd_name_is_reported_in_one_line(script):
  absent = [x.replace(b'ODD', ODD) for x in ABSENT[script].split()]
  for arguments in (absent, [b'--' + ODD + b'=1']):
    done = run(script, *arguments, PYTHONIOENCODING='ascii')
    assert (done.returncode, done.stdout) == (2, b''), done.stderr
    assert done.stderr.startswith(b'error: ')
    assert done.stderr.count(b'\n') == 1
    assert done.stderr.isascii() and b'\x1b' not in done.stderr


def test_a_full_disk_is_reported_in_one_line():
  done = run('sample', '--help', redirect='>/dev/full')
  assert done.returncode == 2
  assert done.stderr == (
    b'error: cannot write to standard output (No space left on device)\n'
  )
