"""Says where the time of a run went, over all its restarts.

python launch/goodput.py --workdir runs/tiny

Goodput is the share of the time from the first start to the last sign of life
that was spent on steps whose result was used.
"""

import os

from absl import flags

from maskdiff import config
from maskdiff.monitoring import ledger

flags.DEFINE_string('workdir', None, 'The run to look at.')
flags.mark_flag_as_required('workdir')


def main(args):
  path = os.path.join(args.workdir, 'ledger.jsonl')
  print(ledger.format_goodput(ledger.goodput(path)))


if __name__ == '__main__':
  config.run_script(main)
