r"""Makes the figures of README.md and docs/proof.md from raw metrics.

python benchmarks/proof.py
python benchmarks/proof.py --masked runs/masked \
  --autoregressive runs/autoregressive

The raw metrics of the two runs of configs/proof.py are in
benchmarks/results/proof/, one folder per run, beside those of two runs with
LLaDA's recipe (`uniform` of recipes.py). The second command first replaces the
metrics of the two runs by those of other runs. The script draws docs/proof.png.
It rewrites the parts of README.md and docs/proof.md between comments that name
the script. docs/proof.md lists all commands. Needs matplotlib, which is in
requirements-test.txt.
"""

import argparse
import json
import math
import pathlib
import re
import shutil
import statistics
from typing import NamedTuple

import page_parts  # the file beside this one

from maskdiff import config as config_lib
from maskdiff.monitoring import history
from maskdiff.training import inputs

ROOT = pathlib.Path(__file__).parents[1]
RAW = ROOT / 'benchmarks' / 'results' / 'proof'
NAMES = {
  'masked': 'masked diffusion (a bound)',
  'autoregressive': 'autoregressive',
  'masked_before': "masked diffusion, LLaDA's recipe (a bound)",
  'autoregressive_before': "autoregressive, LLaDA's recipe",
}
BEFORE = '_before'  # ends the names of runs with LLaDA's recipe
LOSS, STDERR = 'eval/loss_nats_per_token', 'eval/stderr_nats_per_token'
TRAIN_LOSS = 'train/loss_nats_per_token'
BITS = 'eval/bits_per_byte'


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  now = [name for name in NAMES if not name.endswith(BEFORE)]
  for name in now:
    parser.add_argument(f'--{name}', type=pathlib.Path, metavar='WORKDIR')
  args = parser.parse_args()
  for name in now:
    if vars(args)[name]:
      gather(vars(args)[name], RAW / name)
  runs = {name: read(RAW / name) for name in NAMES}
  plot(runs, ROOT / 'docs' / 'proof.png')
  for path in (ROOT / 'README.md', ROOT / 'docs' / 'proof.md'):
    path.write_text(filled(path.read_text(), runs))


def gather(workdir, folder):
  """Copies the metrics of a run, and describes its data in data.json."""
  folder.mkdir(parents=True, exist_ok=True)
  for name in ('metrics.jsonl', 'config.json', 'ledger.jsonl'):
    shutil.copy(workdir / name, folder / name)
  config = config_lib.from_dict(
    json.loads((folder / 'config.json').read_text())
  )
  (data,) = inputs.open_data(config, inputs.open_tokenizer(config))
  split = data.manifest.splits['heldout']
  description = {
    'source': data.manifest.source,
    'heldout_tokens': split.tokens,
    'heldout_text_bytes': split.text_bytes,
    'heldout_unigram_entropy_nats': split.unigram_entropy_nats,
    'training_tokens': data.manifest.splits['train'].tokens,
  }
  (folder / 'data.json').write_text(json.dumps(description, indent=2) + '\n')


class Proof(NamedTuple):
  """Raw metrics of a run, and data.json, which describes its data."""

  run: history.Run
  data: dict


def read(folder):
  """Reads a folder of raw metrics."""
  data = json.loads((folder / 'data.json').read_text())
  return Proof(history.read_run(folder), data)


def curve(proof, name):
  """Returns two arrays: training tokens, and values of a metric."""
  steps, values = history.series(proof.run, name)
  return history.tokens_at(proof.run, steps), values


def tokens_until(run, loss, window=5):
  """Returns the tokens until the mean loss of `window` rows is below `loss`."""
  tokens, losses = curve(run, TRAIN_LOSS)
  for i in range(window, len(losses) + 1):
    if statistics.mean(losses[i - window : i]) < loss:
      return tokens[i - 1]
  return None


def table(runs):
  """Returns a Markdown table of final held-out losses with standard errors."""
  rows = []
  for name, run in runs.items():
    tokens, losses = curve(run, LOSS)
    bits = curve(run, BITS)[1][-1]
    error = curve(run, STDERR)[1][-1]
    rows.append(
      [
        NAMES[name],
        f'{losses[-1]:.3f} ± {error:.3f}',
        f'{bits:.3f} ± {error * bits / losses[-1]:.3f}',
      ]
    )
  data = runs['masked'].data
  entropy = data['heldout_unigram_entropy_nats']
  bits = entropy * data['heldout_tokens'] / data['heldout_text_bytes']
  bits /= math.log(2)
  rows.append(['entropy of single tokens', f'{entropy:.3f}', f'{bits:.3f}'])
  heads = [
    f'held-out text, after {tokens[-1] / 1e6:.1f}M tokens',
    'nats per token',
    'bits per byte',
  ]
  return page_parts.table([heads, *rows])


def verdict(runs):
  """Returns two sentences that compare the bound with the baseline's loss."""
  _, losses = curve(runs['masked'], LOSS)
  tokens = tokens_until(runs['autoregressive'], losses[-1])
  final = curve(runs['autoregressive'], LOSS)[1][-1]
  text = (
    f'The bound is {losses[-1] - final:.2f} nats per token above the loss of '
    'the baseline.'
  )
  if tokens is None:
    return text
  share = curve(runs['masked'], LOSS)[0][-1] / tokens
  return (
    f'{text} The training loss of the baseline fell below the bound after '
    f'{tokens / 1e6:.2f}M tokens, 1/{share:.0f} of all tokens.'
  )


def samples(runs):
  """Returns the last samples of the two runs as a block of text."""
  texts = []
  for name in ('masked', 'autoregressive'):
    proof = runs[name]
    found = history.samples(proof.run).values()
    prompts = proof.run.config['sample.prompts']
    for prompt, pairs in zip(prompts, found, strict=True):
      texts.append(f'[{name}, {prompt!r}]\n{pairs[-1][1]}')
  return fenced(texts)


def infilled():
  """Returns the texts whose gaps the masked diffusion model filled."""
  with open(RAW / 'masked' / 'infill.jsonl') as f:
    lines = [json.loads(line) for line in f]
  return fenced([bracketed(line['infill'], line['text']) for line in lines])


def bracketed(infill, text):
  """Puts the contents of the gaps of a text in brackets."""
  given = re.split(r'\{\{\d+\}\}', infill)
  gaps = re.fullmatch('(.*)'.join(map(re.escape, given)), text, re.S).groups()
  return given[0] + ''.join(
    f'[{gap}]{after}' for gap, after in zip(gaps, given[1:], strict=True)
  )


def fenced(texts):
  return '```text\n' + '\n\n'.join(texts) + '\n```'


PARTS = {
  'table': table,
  'verdict': verdict,
  'samples': samples,
  'infilled': lambda runs: infilled(),
}


def filled(text, runs):
  """Replaces the parts of a page between comments of this script."""
  return page_parts.fill(text, 'proof', lambda name: PARTS[name](runs))


def plot(runs, out):
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  data = runs['masked'].data
  bits_per_nat = (
    data['heldout_tokens'] / data['heldout_text_bytes'] / math.log(2)
  )
  figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
  for name, run in runs.items():
    before = name.endswith(BEFORE)
    color = '#1f5fbf' if name.startswith('masked') else '#c07a2b'
    if not before:
      tokens, losses = curve(run, TRAIN_LOSS)
      axes.plot(tokens / 1e6, losses, color=color, lw=0.7, alpha=0.4)
    tokens, losses = curve(run, LOSS)
    axes.errorbar(
      tokens[1:] / 1e6,
      losses[1:],
      curve(run, STDERR)[1][1:],
      color=color,
      alpha=0.5 if before else 1,
      linestyle=':' if before else '-',
      marker='o',
      markersize=4,
      capsize=2,
      label=NAMES[name],
    )
  entropy = data['heldout_unigram_entropy_nats']
  axes.axhline(
    entropy,
    color='#777777',
    linestyle='--',
    linewidth=1,
    label='entropy of single tokens',
  )
  axes.set_ylim(top=entropy * 1.15)
  axes.set_xlabel('training tokens (millions)')
  axes.set_ylabel('nats per token')
  axes.secondary_yaxis(
    'right', functions=(lambda x: x * bits_per_nat, lambda x: x / bits_per_nat)
  ).set_ylabel('bits per byte')
  axes.legend(
    frameon=False, title='held-out text (dots); training, one draw (thin)'
  )
  axes.spines['top'].set_visible(False)
  figure.savefig(out, dpi=150)


if __name__ == '__main__':
  main()
