"""Prints the goodput of a run and where its wall time went.

python launch/goodput.py --workdir runs/tiny

Goodput is the share of wall time spent on steps and rollouts whose result was
used. The wall time runs from the first start to the last ledger entry, over all
restarts.
"""

import os
import sys

from absl import flags

from maskdiff import config
from maskdiff.errors import printable
from maskdiff.monitoring import ledger

flags.DEFINE_string('workdir', None, 'Work directory of the run.')
flags.mark_flag_as_required('workdir')


def main(args):
  path = os.path.join(args.workdir, 'ledger.jsonl')
  if warning := ledger.read_lines(path).warning(path):
    print(f'warning: {printable(warning)}', file=sys.stderr)
  print(ledger.format_goodput(ledger.goodput(path)))


if __name__ == '__main__':
  config.run_script(main)
