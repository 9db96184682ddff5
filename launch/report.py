"""Writes an HTML report of runs: curves, samples, config differences.

python launch/report.py runs/tiny [runs/other ...] [--out report.html] \
  [--plan plan.json]

The report is one HTML file that loads no other file. The runs may still be
training; run the command again for newer curves. The report compares the
measured step time with a plan: the file of --plan, or plan.json in the work
directory of a run. `launch/plan.py --json` writes plans.
"""

import os
import sys

from absl import flags

from maskdiff import config
from maskdiff.errors import UserError, no_workdir, printable, writing
from maskdiff.files import atomic, outputs

flags.DEFINE_string(
  'out', None, 'Output file. Default: report.html in the first work directory.'
)
flags.DEFINE_string(
  'plan', None, 'File of launch/plan.py --json, for runs without a plan.json.'
)


def main(args, workdirs):
  if not workdirs:
    raise UserError('give one or more work directories of runs')
  for workdir in workdirs:
    if not os.path.isdir(workdir):
      raise no_workdir(workdir)
  from maskdiff.monitoring import history, report

  runs = history.read_runs(workdirs, args.plan)
  for run in runs:
    for warning in run.warnings:
      print(f'warning: {printable(warning)}', file=sys.stderr)
  path = args.out or os.path.join(workdirs[0], 'report.html')
  page = report.page(runs)
  if args.out:
    outputs.write('out', path, page)
  else:
    write(path, page)
  print(path)


def write(path, text):
  """Writes a file of a work directory, where a link may be planted."""
  with writing('out', path):
    atomic.write(path, text)


if __name__ == '__main__':
  config.run_script(main, positional=True)
