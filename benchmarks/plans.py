"""Prints the table of plans in docs/speed.md.

python benchmarks/plans.py [--only 1b] > table.md

Compiles the train step of each config for TPUs with launch/plan.py and prints
a Markdown table. Takes an hour on one core.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from maskdiff.planner import calibration

ROOT = pathlib.Path(__file__).resolve().parent.parent
PLANS = [
  # config, note, topology, slices
  ('8b.py', '', 'v5p:4x4x4', 1),
  ('8b.py:v5e-256', '', 'v5e:16x16', 1),
  ('8b.py:v6e-256', '', 'v6e:16x16', 1),
  ('8b.py:tpu7x-128', '', 'tpu7x:4x4x4', 1),
  ('8b.py:illada', ' (7.62B)', 'v5p:4x4x4', 1),
  ('8b.py:illada-v6e-256', ' (7.62B)', 'v6e:16x16', 1),
  ('8b.py:32k', '', 'v5p:4x4x4', 1),
  ('8b.py:128k', '', 'v5p:4x4x4', 1),
  ('8b_multislice.py', '', 'v5p:4x4x4', 2),
  ('8b_blocks.py', '', 'v5p:4x4x4', 1),
  ('32b.py', ' (32.5B)', 'v5p:4x4x4', 1),
  ('1b.py', '', 'v5e:2x4', 1),
  ('1b.py:v6e-8', '', 'v6e:2x4', 1),
  ('1b.py:v6e-1', '', 'v6e:1x1', 1),
  ('1b.py:v5e-1', ' (0.91B)', 'v5e:1x1', 1),
  ('1b.py:tpu', ' (1.51B)', 'v6e:2x4', 1),
  ('150m.py', '', 'v5e:1x1', 1),
  ('150m.py:v6e-1', '', 'v6e:1x1', 1),
]
HEAD = (
  '| `configs/` | topology, chips | rows per step | HBM per chip, GiB '
  '| step, s | tokens/s | MFU | days, chip-hours | compiled in |'
)


def plan(config, topology, slices):
  """Returns the plan of a config, a dict; see planner/fields.py."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'plan.json'
    result = subprocess.run(
      [
        *(sys.executable, 'launch/plan.py', '--config', f'configs/{config}'),
        *('--topology', topology, '--num_slices', str(slices)),
        *('--json', path),
      ],
      cwd=ROOT,
      stdout=subprocess.DEVNULL,
    )
    if result.returncode:
      sys.exit(f'{config} on {topology}: launch/plan.py failed')
    return json.loads(path.read_text())


def row(p, config, note):
  """Formats a plan as a row of the table."""
  slices = f'{p["num_slices"]} x ' if p['num_slices'] > 1 else ''
  chips = f'{p["chips"]} chip{"s" if p["chips"] > 1 else ""}'
  days, hours = (
    f'{x:,.0f}' if x >= 10 else f'{x:.3g}' for x in (p['days'], p['chip_hours'])
  )
  return (
    f'| {config}{note} | {slices}{p["topology"]}, {chips} | {p["batch"]:,} '
    f'| {p["hbm_total_gib"]:.1f} of {p["hbm_capacity_gib"]} '
    f'| {p["step_s"]:.2f} | {p["tokens_per_s"]:,.0f} | {calibration.cell(p)} '
    f'| {days}, {hours} | {p["compile_s"]:.0f} s |'
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--only', default='', help='only configs whose name starts with this'
  )
  only = parser.parse_args().only
  print(HEAD + '\n|---|---|---|---|---|---|---|---|---|')
  for config, note, topology, slices in PLANS:
    if config.startswith(only):
      print(row(plan(config, topology, slices), config, note), flush=True)


if __name__ == '__main__':
  main()
