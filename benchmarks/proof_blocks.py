r"""Makes the table and the picture of the runs of docs/block_diffusion.md.

python benchmarks/proof_blocks.py
python benchmarks/proof_blocks.py --run blocks_16=runs/blocks_16

The raw metrics are in benchmarks/results/proof/, one folder per run, beside
those of the runs of docs/proof.md, whose script this one shares. The second
command first replaces the metrics of a run by those of another. Compute is
counted in FLOPs per token (objectives/table.py), relative to those of the
autoregressive run. Needs matplotlib, which is in requirements-test.txt.
"""

import argparse
import pathlib

import page_parts  # files beside this one
import proof
from proof import LOSS, RAW, ROOT, STDERR

from maskdiff import config as config_lib
from maskdiff.objectives import table
from maskdiff.training import step

PAGE = ROOT / 'docs' / 'block_diffusion.md'
BASE = 'autoregressive'
CONVERTED = 'converted'  # begins the names of runs that start from BASE
# Name -> name in the table, color.
RUNS = {
  BASE: ('autoregressive', '#c07a2b'),
  'blocks_4': ('blocks of 4', '#3a8f5c'),
  'blocks_16': ('blocks of 16', '#7a52a8'),
  'masked': ('masked diffusion', '#1f5fbf'),
  'blocks_4_half': ('blocks of 4, half of the tokens', '#3a8f5c'),
  'blocks_16_half': ('blocks of 16, half of the tokens', '#7a52a8'),
  'converted_own': (
    'autoregressive run converted to blocks of 16, outputs predict their own '
    'token',
    '#b03060',
  ),
  'converted_next': ('the same, outputs predict the next token', '#b03060'),
  'converted_causal': (
    'the same, with a causal clean copy and 0.3 of the autoregressive loss',
    '#b03060',
  ),
  'converted_plan': (
    'outputs predict the next token, in blocks of 1, 4, then 16',
    '#b03060',
  ),
}


def flops(run):
  """Returns FLOPs per token of the training of a history.Run."""
  config = config_lib.default()
  config.update_from_flattened_dict(run.config)
  c = step.step_config(config)
  return table.flops_per_token(c.objective, c.model, c.length)


def rows(runs):
  """Returns a row per run: name, tokens, relative FLOPs, loss, error, bits."""
  total = lambda run: proof.curve(run, LOSS)[0][-1] * flops(run.run)
  base = total(runs[BASE])
  found = []
  for name, run in runs.items():
    tokens, losses = proof.curve(run, LOSS)
    error = proof.curve(run, STDERR)[1][-1]
    bits = proof.curve(run, proof.BITS)[1][-1]
    found.append((name, tokens[-1], total(run) / base, losses[-1], error, bits))
  return found


def markdown(runs):
  """Returns the table of the page."""
  heads = 'run', 'tokens', 'FLOPs', 'held-out nats per token', 'bits per byte'
  found = [heads]
  for name, tokens, share, loss, error, bits in rows(runs):
    added = '+' if name.startswith(CONVERTED) else ''
    found.append(
      [
        RUNS[name][0],
        f'{added}{tokens / 1e6:.2f}M',
        f'{added}{share:.2f}',
        f'{loss:.3f} ± {error:.3f}',
        f'{bits:.3f}',
      ]
    )
  return page_parts.table(found)


def plot(runs, out):
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  base = runs[BASE]
  unit = proof.curve(base, LOSS)[0][-1] * flops(base.run)
  figure, axes = plt.subplots(figsize=(7, 4.2), layout='constrained')
  for name, run in runs.items():
    label, color = RUNS[name]
    tokens, losses = proof.curve(run, LOSS)
    compute = tokens * flops(run.run) / unit
    if name.startswith(CONVERTED):
      if name != f'{CONVERTED}_own':
        continue
      compute, label = 1 + compute, 'the autoregressive run, converted'
    half = name.endswith('_half')
    axes.plot(
      compute[1:],
      losses[1:],
      color=color,
      linestyle=':' if half else '-',
      marker='o',
      markersize=4,
      label=None if half else label,
    )
  axes.set_xlabel('training FLOPs (1: all of the autoregressive run)')
  axes.set_ylabel('held-out nats per token')
  axes.legend(
    frameon=False, title='dotted: half of the tokens', loc='upper right'
  )
  axes.set_ylim(top=5.6)
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(out, dpi=150)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument(
    '--run', action='append', default=[], metavar='NAME=WORKDIR'
  )
  for text in parser.parse_args().run:
    name, workdir = text.split('=', 1)
    proof.gather(pathlib.Path(workdir), RAW / name)
  runs = {name: proof.read(RAW / name) for name in RUNS}
  plot(runs, ROOT / 'docs' / 'blocks.png')
  parts = {'table': markdown(runs)}
  PAGE.write_text(
    page_parts.fill(PAGE.read_text(), 'proof_blocks', parts.__getitem__)
  )


if __name__ == '__main__':
  main()
