"""Plots the held-out bounds of runs and the unigram entropy.

python benchmarks/plot_learning_curve.py docs/tiny_curve.png \
  "configs/tiny.py=runs/tiny" "LLaDA's recipe=runs/uniform"

Reads the metrics of each run and the manifest of the data of the first. Needs
matplotlib, which is in requirements-test.txt.
"""

import math
import os
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from maskdiff.config import config_file
from maskdiff.monitoring import history
from maskdiff.training import inputs


def main(out, *labels_and_runs):
  figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
  pairs = [x.split('=', 1) for x in labels_and_runs]
  for label, workdir in pairs:
    run = history.read_run(workdir)
    tokens = run.config['train.batch'] * run.config['data.length'] / 1e6
    name = 'eval/loss_nats_per_token'
    points = [(r['step'] * tokens, r[name]) for r in run.rows if name in r]
    axes.plot(
      *zip(*points, strict=True),
      marker='o',
      markersize=4,
      label=f'held-out bound, {label}',
    )
  config = config_file.load(os.path.join(pairs[0][1], 'config.json'))
  (dataset,) = inputs.open_data(config, inputs.open_tokenizer(config))
  split = dataset.manifest.splits['heldout']
  bits_per_nat = split.tokens / split.text_bytes / math.log(2)
  axes.axhline(
    split.unigram_entropy_nats,
    color='#777777',
    linestyle='--',
    linewidth=1,
    label='unigram entropy of the held-out tokens',
  )
  axes.set_xlabel('training tokens (millions)')
  axes.set_ylabel('nats per token')
  axes.secondary_yaxis(
    'right', functions=(lambda x: x * bits_per_nat, lambda x: x / bits_per_nat)
  ).set_ylabel('bits per byte')
  axes.legend(frameon=False)
  axes.spines['top'].set_visible(False)
  figure.savefig(out, dpi=150)


if __name__ == '__main__':
  if len(sys.argv) < 3:
    sys.exit(__doc__)
  main(*sys.argv[1:])
