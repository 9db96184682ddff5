"""Makes a page of one or several runs: curves, samples, what differs.

python launch/report.py runs/tiny [runs/other ...] [--out report.html] \
  [--plan plan.json]

One HTML file that needs no other and no network. A run may still be going on:
run it again for a newer page. A plan of `launch/plan.py --json` stands beside
the measured step time; a run's own is plan.json in its work directory.
"""

import os

from absl import flags

from maskdiff import config
from maskdiff.errors import UserError, writing

flags.DEFINE_string(
  'out', None, 'File to write; by default report.html in the first directory.'
)
flags.DEFINE_string(
  'plan', None, 'File of launch/plan.py --json, for runs without plan.json.'
)


def main(args, workdirs):
  if not workdirs:
    raise UserError('give one or more work directories of runs')
  from maskdiff.monitoring import history, report

  runs = history.read_runs(workdirs, args.plan)
  path = args.out or os.path.join(workdirs[0], 'report.html')
  write(path, report.page(runs))
  print(path)


def write(path, text):
  """Writes a file whole, so that a browser never loads half of it."""
  part = path + '.part'
  with writing('out', path):
    with open(part, 'w', encoding='utf-8') as f:
      f.write(text)
    os.replace(part, path)


if __name__ == '__main__':
  config.run_script(main, positional=True)
