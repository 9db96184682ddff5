"""Parses the flags of many commands without running them.

python tests/parse_flags.py < COMMANDS

COMMANDS is a JSON list of [script, arguments]. Prints a JSON list with the
error of each, '' for none. The script itself parses its flags, in a fork of a
process that has imported the package.
"""

import argparse
import json
import os
import runpy
import sys
import tempfile

import forked

from maskdiff import config

# Imported once for all forks.
for module in forked.MODULES:
  __import__(module)


def parse(script, arguments):
  """Runs a script until its flags are parsed, then exits."""
  run_script, parse_args = config.run_script, argparse.ArgumentParser.parse_args

  def check(args, rest=()):
    if 'config' in args:
      config.validate(args.config)

  def ended(*args, **kwargs):
    parse_args(*args, **kwargs)
    sys.exit(0)

  config.run_script = lambda main, **how: run_script(check, **how)
  argparse.ArgumentParser.parse_args = ended
  with open(script) as f:
    source = f.read()
  if 'run_script(' in source or 'ArgumentParser(' in source:
    sys.argv = [script, *arguments]
    sys.path.insert(0, os.path.dirname(script))
    runpy.run_path(script, run_name='__main__')


def problem(script, arguments):
  """Returns the error of a script that cannot parse its flags, or ''."""
  with tempfile.TemporaryFile('w+') as printed:
    child = os.fork()
    if not child:
      status = 1
      try:
        os.dup2(printed.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        parse(script, arguments)
        status = 0
      except SystemExit as ended:
        status = ended.code or 0
      except BaseException as error:
        os.write(2, f'{type(error).__name__}: {error}'.encode())
      finally:
        sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(child, 0)
    printed.seek(0)
    return printed.read() or f'status {status}' if status else ''


if __name__ == '__main__':
  print(json.dumps([problem(*command) for command in json.load(sys.stdin)]))
