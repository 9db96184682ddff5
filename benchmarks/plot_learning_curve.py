"""Plots the held-out bound of a run and the unigram entropy.

python benchmarks/plot_learning_curve.py runs/tiny docs/tiny_curve.png

Reads the run's metrics.jsonl and the manifest of its data. Needs matplotlib,
which is in requirements-test.txt.
"""

import json
import math
import os
import sys

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from maskdiff import config as config_lib
from maskdiff.monitoring import metrics
from maskdiff.training import inputs


def main(workdir, out):
  rows = metrics.read(os.path.join(workdir, 'metrics.jsonl'))
  with open(os.path.join(workdir, 'config.json')) as f:
    config = config_lib.from_dict(json.load(f))
  tokenizer = inputs.open_tokenizer(config)
  (dataset,) = inputs.open_data(config, tokenizer)
  split = dataset.manifest.splits['heldout']
  bits_per_nat = split.tokens / split.text_bytes / math.log(2)
  tokens = config.train.batch * config.data.length / 1e6

  def curve(name):
    return zip(
      *((r['step'] * tokens, r[name]) for r in rows if name in r), strict=True
    )

  figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
  axes.plot(
    *curve('train/loss_nats_per_token'),
    color='#9aa5b1',
    linewidth=0.8,
    label='training loss (one draw of noise)',
  )
  axes.plot(
    *curve('eval/loss_nats_per_token'),
    color='#1f5fbf',
    marker='o',
    markersize=4,
    label='held-out bound (fixed noise)',
  )
  axes.axhline(
    split.unigram_entropy_nats,
    color='#c0392b',
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
  os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
  figure.savefig(out, dpi=150)


if __name__ == '__main__':
  if len(sys.argv) != 3:
    sys.exit(__doc__)
  main(*sys.argv[1:])
