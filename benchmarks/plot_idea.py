"""Draws the three figures of docs/idea.md.

python benchmarks/plot_idea.py --workdir runs/masked

The figures show the forward process on a line of Python, the noise of the loss,
and how the model of the work directory fills gaps in a text. The model on the
page was trained with configs/proof.py. Needs matplotlib, which is in
requirements-test.txt.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from maskdiff import config as config_lib
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.data.rows import Rows
from maskdiff.interop import load
from maskdiff.objectives import masked_diffusion
from maskdiff.sampling import layouts, recording, sampler
from maskdiff.sampling.settings import sampler_config
from maskdiff.training import step as step_lib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

TEXT = 'with open(path) as f: return f.read()'
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
GAPPED = 'class Stack:\n    def __init__({{6}}):\n        self{{6}}\n'
BLUE, RED, GREY, PALE = '#1f5fbf', '#c0392b', '#9aa5b1', '#e4e7eb'
# Inches. A page on a phone is this wide, so that letters stay legible.
WIDTH, DPI = 5.2, 150
LENGTH = 128


def objective_config(**changes):
  """Returns an ObjectiveConfig with these changes to the defaults."""
  c = config_lib.default()
  for key, value in changes.items():
    c.objective[key] = value
  return step_lib.step_config(c).objective


def piece(tokenizer, i):
  """Returns the text of a token with visible spaces and newlines."""
  text = tokenizer.pieces[i].decode('utf-8', 'replace')
  return text.replace('\n', '⏎').replace(' ', '·') or '<eos>'


def forward(out):
  """Draws a line of text at several times, with the same noise."""
  tokenizer = tokenizer_lib.load('tokenizer/stdlib_4k.model')
  ids = tokenizer.encode(TEXT)
  noise = np.random.default_rng(4).random(len(ids))
  c = objective_config()
  rows = len(TIMES)
  canvas = masked_diffusion.corrupt(
    c,
    Rows(jnp.tile(jnp.array(ids), (rows, 1))),
    (jnp.array(TIMES) - c.eps) / (1 - c.eps),
    jnp.tile(jnp.array(noise, jnp.float32), (rows, 1)),
    jnp.full(rows, len(ids)),
  )
  figure, axes = plt.subplots(figsize=(WIDTH, 5.0))
  axes.axis('off')
  y = 0.0
  for t, shown, weights in zip(
    TIMES, np.asarray(canvas.inputs), np.asarray(canvas.weights), strict=True
  ):
    masked = weights > 0
    label = (
      f't = {t:g}: {masked.sum()} of {len(ids)} hidden, each counts {1 / t:.1f}'
    )
    axes.text(0, y, label, fontsize=11, va='center', color='#333')
    x, y = 0.0, y - 1
    for i, hidden in zip(shown, masked, strict=True):
      text = piece(tokenizer, ids[len(axes.patches) % len(ids)])
      width = 0.55 * len(text) + 0.5
      if x + width > 17:
        x, y = 0.0, y - 1
      box = plt.Rectangle(
        (x + 0.05, y - 0.42),
        width - 0.1,
        0.84,
        facecolor='#4a5560' if hidden else '#d8e6fa',
      )
      axes.add_patch(box)
      if i != c.mask_id:
        middle = x + width / 2
        axes.text(
          *(middle, y, text),
          **dict(fontsize=11, family='monospace', ha='center', va='center'),
        )
      x += width
    y -= 1.4
  axes.set_xlim(0, 17)
  axes.set_ylim(y + 0.8, 0.6)
  save(figure, out / 'idea_forward.png')


def losses(c, nll_at, batch, draws, seed=0):
  """Returns losses of batches whose tokens have nll_at(mask ratio), [draws]."""
  tokens = jnp.full((batch, LENGTH), 9)
  rows = jnp.arange(batch)

  def loss(key):
    canvas = masked_diffusion.make_canvas(c, Rows(tokens), rows, key, batch)
    nll = nll_at(canvas.mask_ratio)
    return jnp.sum(canvas.weights * nll) / jnp.sum(canvas.num_tokens)

  keys = jax.random.split(jax.random.key(seed), draws)
  return np.asarray(jax.lax.map(jax.jit(loss), keys, batch_size=256))


def noise(out):
  """Draws the noise of the loss for single rows and for batches."""
  figure, (above, below) = plt.subplots(
    2, 1, figsize=(WIDTH, 7.0), layout='constrained'
  )
  c = objective_config(time_sampling='stratified', random_length_fraction=0.0)
  rows = 1500
  canvas = masked_diffusion.make_canvas(
    c,
    Rows(jnp.full((rows, LENGTH), 9)),
    jnp.arange(rows),
    jax.random.key(1),
    rows,
  )
  t = np.asarray(canvas.mask_ratio)[:, 0]
  value = np.asarray(canvas.weights.sum(axis=1)) / LENGTH
  above.plot(t, value, '.', color=GREY, markersize=3, label='one row, drawn')
  grid = np.geomspace(c.eps, 1, 200)
  spread = np.sqrt((1 - grid) / (grid * LENGTH))
  above.axhline(1, color=BLUE, label='mean: masked share x 1/t = 1')
  above.plot(grid, 1 + spread, color=RED, label='one standard deviation')
  above.plot(grid, np.maximum(1 - spread, 0), color=RED)
  above.set(xscale='log', ylim=(0, 5), xlabel='time t = share that is masked')
  above.set_ylabel('loss / nats per token')
  above.set_title(f'A row of {LENGTH} tokens, all equally hard', fontsize=11)

  batches = np.array([2, 4, 8, 16, 32, 64, 128])
  curves = {
    'flat, any times': ('iid', lambda r: jnp.ones_like(r), GREY, 's'),
    'rising, independent times': ('iid', lambda r: 0.2 + 1.6 * r, RED, 'o'),
    'rising, antithetic pairs': (
      'antithetic',
      lambda r: 0.2 + 1.6 * r,
      BLUE,
      '^',
    ),
    'rising, stratified': (
      'stratified',
      lambda r: 0.2 + 1.6 * r,
      '#2e8b57',
      'v',
    ),
  }
  for name, (sampling, nll_at, color, marker) in curves.items():
    c = objective_config(time_sampling=sampling, random_length_fraction=0.0)
    found = [losses(c, nll_at, int(b), 4096) for b in batches]
    ratio = [100 * x.std() / x.mean() for x in found]
    below.plot(batches, ratio, color=color, marker=marker, label=name)
    print(
      name, *(f'{b}: {r:.2f}%' for b, r in zip(batches, ratio, strict=True))
    )
  below.set(xscale='log', yscale='log')
  below.set_xticks(batches, [str(b) for b in batches])
  ticks = [2, 5, 10, 20, 50]
  below.set_yticks(ticks, [f'{p}%' for p in ticks])
  below.minorticks_off()
  below.set_xlabel(f'rows of a batch, {LENGTH} tokens each')
  below.set_ylabel('standard deviation / loss')
  below.set_title('The same network, other masks', fontsize=11)
  for axes in (above, below):
    axes.legend(frameon=False, fontsize=10)
    axes.spines[['top', 'right']].set_visible(False)
  save(figure, out / 'idea_noise.png')


def reverse(workdir, text, seed, out):
  """Draws slots over denoising steps, coloured by confidence."""
  config, tokenizer, params, mesh = load.load(workdir)
  request = layouts.fill_gaps([text], tokenizer.encode, [seed])
  slots = np.flatnonzero(request.fill[0])
  config.sample.gen_length = len(slots)
  config.sample.steps = config.sample.block_length = len(slots)
  config.sample.temperature = 0.0
  c, settings = sampler_config(config)
  request = request._replace(settings=settings)
  with jax.set_mesh(mesh):
    carry = sampler.complete(load.network(config, params), c, request)
  sampler.check(carry)
  (recorded,) = recording.of_rows(carry, request.fill, request.valid)
  final, fill, filled_at, confidence = recorded
  print(tokenizer.decode(final))

  figure, axes = plt.subplots(figsize=(WIDTH, 5.4), layout='constrained')
  colors = plt.get_cmap('YlGnBu')
  steps = recording.num_steps(recorded)
  positions = np.arange(slots[0] - 3, min(slots[-1] + 3, len(final)))
  for y, i in enumerate(positions):
    for step in range(steps):
      face = 'white' if not fill[i] else PALE
      if fill[i] and step + 1 >= filled_at[i]:
        face = colors(float(confidence[i]))
      new = step + 1 == filled_at[i]
      axes.add_patch(
        plt.Rectangle(
          (step + 0.5, y - 0.5),
          *(1, 1),
          facecolor=face,
          edgecolor='#111' if new else 'white',
          linewidth=1.2 if new else 0.5,
          zorder=3 if new else 1,
        )
      )
  axes.set_xlim(0.5, steps + 0.5)
  axes.set_ylim(len(positions) - 0.5, -0.5)
  axes.set_yticks(
    range(len(positions)),
    [piece(tokenizer, int(final[i])) for i in positions],
    fontsize=11,
    family='monospace',
  )
  axes.set_xticks(range(1, steps + 1))
  axes.set_xlabel('denoising step', fontsize=11)
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  scale = matplotlib.cm.ScalarMappable(plt.Normalize(0, 1), colors)
  figure.colorbar(
    scale,
    ax=axes,
    location='top',
    aspect=40,
    label='probability of the token when it was committed',
  )
  save(figure, out / 'idea_reverse.png')


def save(figure, path):
  figure.savefig(path, dpi=DPI, bbox_inches='tight', pad_inches=0.1)
  plt.close(figure)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', default='runs/masked')
  parser.add_argument('--out', type=pathlib.Path, default='docs')
  parser.add_argument('--text', default=GAPPED)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  args.out.mkdir(parents=True, exist_ok=True)
  forward(args.out)
  noise(args.out)
  reverse(args.workdir, args.text, args.seed, args.out)


if __name__ == '__main__':
  main()
