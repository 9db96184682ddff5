"""Takes a screenshot of a page that launch/sample.py or report.py wrote.

python launch/sample.py --workdir runs/tiny --infill "$TEXT" --html replay.html
python benchmarks/plot_replay.py replay.html docs/replay.png --step 18
python launch/report.py runs/masked runs/autoregressive --out report.html
python benchmarks/plot_replay.py report.html docs/report.png --size 1280,960
"""

import argparse
import pathlib
import subprocess
import tempfile


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('page', type=pathlib.Path)
  parser.add_argument('picture', type=pathlib.Path)
  parser.add_argument('--step', type=int, default=0)
  parser.add_argument(
    '--size', default='900,900', help='width,height in pixels'
  )
  parser.add_argument('--browser', default='chromium')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as profile:
    subprocess.run(
      [
        *(args.browser, '--headless', '--no-sandbox', '--disable-gpu'),
        *('--no-first-run', '--disable-background-networking'),
        *('--hide-scrollbars', f'--user-data-dir={profile}'),
        *(f'--window-size={args.size}', f'--screenshot={args.picture}'),
        f'{args.page.resolve().as_uri()}#{args.step}',
      ],
      check=True,
      capture_output=True,
    )


if __name__ == '__main__':
  main()
