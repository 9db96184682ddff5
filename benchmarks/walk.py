r"""Walks through pages as a newcomer would, in a fresh clone, and times it.

python benchmarks/walk.py docs/index.md

Clones the repository and runs the commands of the pages' ```bash blocks one
after the other, in one shell, as they are written: what a command activates or
changes holds for those that follow. Prints the seconds of each and ends at the
first that fails. Blocks that tests/pages.py says cannot be run on any machine
are passed over.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tests'))
import pages as pages_lib  # noqa: E402, what tests/docs/test_commands.py runs

DONE = 'walk.py: done with status '


def to_run(text):
  """The blocks of bash of a page that any machine can run."""
  found = filter(pages_lib.runs, pages_lib.blocks(text))
  return [block for block in found if block.language == 'bash']


def commands(block):
  """Splits a block into commands: lines, continued where they say so."""
  text = '\n'.join(block.lines).replace('\\\n', '')
  return [
    line
    for line in text.splitlines()
    if line.strip() and not line.startswith('#')
  ]


def main(pages):
  texts = [(ROOT / page).read_text() for page in pages]
  with tempfile.TemporaryDirectory() as folder:
    subprocess.run(['git', 'clone', '-q', ROOT, folder], check=True)
    shell = subprocess.Popen(
      ['bash'],
      cwd=folder,
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )
    walk = time.monotonic()
    for page, text in zip(pages, texts, strict=True):
      for command in (c for b in to_run(text) for c in commands(b)):
        began = time.monotonic()
        print(f'{page}: $ {command}', flush=True)
        status, output = run(shell, command)
        print('  ' + '\n  '.join(output[-3:]))
        print(f'  {time.monotonic() - began:.0f} s', flush=True)
        if status:
          sys.exit(f'ended with status {status}:\n' + '\n'.join(output))
    print(f'{(time.monotonic() - walk) / 60:.1f} minutes in all')
    shell.stdin.close()
    shell.wait()


def run(shell, command):
  """Has the shell run a command; returns its status and lines of output."""
  shell.stdin.write(f'{{ {command}\n}} < /dev/null\n')
  shell.stdin.write(f'status=$?; echo; echo "{DONE}$status"\n')
  shell.stdin.flush()
  output = []
  for line in shell.stdout:
    if line.startswith(DONE):
      return int(line.removeprefix(DONE)), [x for x in output if x]
    output.append(line.rstrip('\n'))
  sys.exit('the shell has ended:\n' + '\n'.join(output))


if __name__ == '__main__':
  if len(sys.argv) < 2:
    sys.exit(__doc__)
  main(sys.argv[1:])
