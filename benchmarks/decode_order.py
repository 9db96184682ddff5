r"""Plots the positions of the 10th, 50th and 100th committed token.

python benchmarks/decode_order.py --workdir runs/tiny \
  --out docs/decode_order.png

Continues held-out texts with a single block, one token per denoising step, and
draws histograms of the positions. Decoding from left to right would give single
bars at 10, 50 and 100. A uniformly random order would give a flat line. --out
needs matplotlib.
"""

import argparse
import itertools

import jax
import numpy as np

from maskdiff import config as config_lib
from maskdiff.evals import heldout
from maskdiff.interop import load
from maskdiff.sampling import layouts, sampler
from maskdiff.sampling.settings import sampler_config

PROMPT, KTH = 16, (10, 50, 100)
BINS = 8
# Remasking rule and temperature by label.
RULES = {
  'low_confidence, temperature 0': ('low_confidence', 0.0),
  'low_confidence, temperature 1': ('low_confidence', 1.0),
}


def positions(model, rule, temperature, num):
  """Returns positions in the order of commitment, [num, slots]."""
  config, tokenizer = model.config, model.tokenizer
  slots = config.data.length - PROMPT
  found = heldout.documents(config, tokenizer)
  long = [ids[:PROMPT] for ids in found if len(ids) >= PROMPT]
  prompts = list(itertools.islice(itertools.cycle(long), num))
  values = {'gen_length': slots, 'block_length': slots, 'remasking': rule}
  values |= {'temperature': temperature, 'stop_at_eos': False}
  c, settings = sampler_config(config_lib.with_settings(config, values))
  request = layouts.continue_prompts(prompts, slots, settings=settings)
  with jax.set_mesh(model.mesh):
    carry = sampler.complete(model.network, c, request)
  sampler.check(carry)
  return np.argsort(np.asarray(carry.filled_at)[:, PROMPT:], axis=1)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--num', type=int, default=32, help='texts')
  parser.add_argument('--out', help='file for the plot')
  args = parser.parse_args()
  model = load.Model(*load.load(args.workdir))
  found = {}
  for name, (rule, temperature) in RULES.items():
    found[name] = order = positions(model, rule, temperature, args.num) + 1
    steps = np.abs(np.diff(order, axis=1))
    medians = ', '.join(
      f'{k}th {np.median(order[:, k - 1]):.0f} '
      f'({np.percentile(order[:, k - 1], 10):.0f} to '
      f'{np.percentile(order[:, k - 1], 90):.0f})'
      for k in KTH
    )
    print(
      f'{name}: median position (10% to 90%) of the {medians} token, of '
      f'{order.shape[1]}; {(steps == 1).mean():.0%} of tokens are next to the '
      'previous one',
      flush=True,
    )
  if args.out:
    plot(found, args.out)


def plot(found, out):
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, all_axes = plt.subplots(
    1, len(KTH), figsize=(11, 3.2), layout='constrained', sharey=True
  )
  slots = next(iter(found.values())).shape[1]
  edges = np.linspace(0.5, slots + 0.5, BINS + 1)
  for axes, k in zip(all_axes, KTH, strict=True):
    for name, order in found.items():
      share = np.histogram(order[:, k - 1], edges)[0] / len(order)
      axes.stairs(share, edges, label=name, linewidth=1.5)
    grey = {'color': '#9aa5b1', 'linestyle': '--', 'linewidth': 1}
    axes.axvline(k, **grey, label='left to right')
    axes.axhline(1 / BINS, **{**grey, 'linestyle': ':'}, label='random')
    axes.set_title(f'{k}th token')
    axes.set_xlabel('position in the answer')
    axes.spines[['top', 'right']].set_visible(False)
  all_axes[0].set_ylabel('share of texts')
  all_axes[-1].legend(frameon=False, fontsize=8)
  figure.savefig(out, dpi=130)


if __name__ == '__main__':
  main()
