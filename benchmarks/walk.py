r"""Runs the commands of documentation pages in a fresh clone and times them.

python benchmarks/walk.py docs/index.md

Clones the repository and runs the commands of the ```bash blocks of the pages,
unchanged and in order, in a single shell, so that later commands see the
environment that earlier ones set. Prints the seconds of each command and stops
at the first that fails. Skips blocks that tests/pages.py marks as not runnable
on every machine.
"""

import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'tests'))
import pages as pages_lib  # noqa: E402, shared with tests/docs/test_commands.py

DONE = 'walk.py: done with status '


def to_run(text):
  """Returns the bash blocks of a page that every machine can run."""
  found = filter(pages_lib.runs, pages_lib.blocks(text))
  return [block for block in found if block.language == 'bash']


def commands(block):
  """Splits a block into commands; joins lines that end with a backslash."""
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
    print(f'{(time.monotonic() - walk) / 60:.1f} minutes in total')
    shell.stdin.close()
    shell.wait()


def run(shell, command):
  """Runs a command in the shell; returns its status and lines of output."""
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
