"""Measures the noise of the training loss and its gradient, without training.

python benchmarks/loss_noise.py --workdir runs/tiny

The losses of many training batches at the parameters of the run: for different
texts, and for one batch of texts with different masks. For masked diffusion,
under each kind of time sampling, and under other densities of times and
weights. Gradient noise is the mean squared distance of the gradient of a batch
from the mean gradient, divided by the squared norm of the mean gradient. It
does not depend on the scale of a loss. The mean gradient over texts may be
small under the loss that trained the run, so compare losses on one batch of
texts.
"""

import argparse
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.interop import load
from maskdiff.model.transformer import bind
from maskdiff.monitoring import terminal
from maskdiff.objectives import table
from maskdiff.objectives.canvas import canvas_loss
from maskdiff.objectives.time_density import TimeDensity, Weight
from maskdiff.training import inputs
from maskdiff.training import step as step_lib

BELL = TimeDensity('bell')
WIDE = TimeDensity('bell', width=0.2, uniform_share=0.1)
# Changes of the run's objective: time sampling, or density of times / weight.
VARIANTS = {
  'antithetic': dict(time_sampling='antithetic'),
  'stratified': dict(time_sampling='stratified'),
  'iid': dict(time_sampling='iid'),
  'uniform/bound': dict(time_density=TimeDensity(), weight=Weight()),
  'bell/bound': dict(time_density=BELL, weight=Weight()),
  'uniform/plain': dict(time_density=TimeDensity(), weight=Weight('power')),
  'bell/plain': dict(time_density=BELL, weight=Weight('power')),
  'bell/importance': dict(time_density=WIDE, weight=Weight('importance')),
}


@functools.partial(jax.jit, static_argnums=0)
def gradient(c, params, canvas):
  """Returns the loss of a canvas in nats per token, and its gradient."""

  def loss(params):
    total, _ = canvas_loss(c.objective, bind(c.model, params), canvas)
    return total / canvas.num_tokens.sum()

  return jax.value_and_grad(loss)(params)


def noise(c, objective, params, batches):
  """Returns the losses of batches, and the gradient noise.

  Args:
    c: StepConfig; the same for all objectives, so that it compiles once.
    objective: ObjectiveConfig that makes the canvases.
    params: parameter tree.
    batches: pairs (Rows, key).
  """
  canvas_of = jax.jit(
    lambda rows, key: table.make_canvas(
      objective, rows, jnp.arange(len(rows.tokens)), key, len(rows.tokens)
    )
  )
  squared = functools.partial(optax.tree.norm, squared=True)
  total, losses, norms = None, [], []
  for rows, key in batches:
    loss, g = gradient(c, params, canvas_of(rows, key))
    total = g if total is None else jax.tree.map(jnp.add, total, g)
    losses.append(float(loss))
    norms.append(float(squared(g)))
  n = len(losses)
  of_mean = float(squared(total)) / n**2
  variance = (np.mean(norms) - of_mean) * n / (n - 1)
  # The mean of n gradients has a share 1/n of their variance.
  signal = of_mean - variance / n
  return np.array(losses), variance / signal if signal > 0 else np.inf


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', default='runs/tiny')
  parser.add_argument('--batches', type=int, default=200)
  parser.add_argument(
    '--variants', nargs='+', choices=VARIANTS, default=list(VARIANTS)
  )
  args = parser.parse_args()
  config, tokenizer, params, _ = load.load(args.workdir)
  mesh = mesh_lib.make_mesh(**config.mesh)
  c = step_lib.step_config(config)
  datasets = inputs.open_data(config, tokenizer)
  texts = list(
    itertools.islice(
      inputs.train_batches(config, datasets, mesh, 0), args.batches
    )
  )
  keys = jax.random.split(jax.random.key(1), args.batches)
  masked = c.objective.name == 'masked_diffusion'
  rows = []
  with jax.set_mesh(mesh):
    for name in args.variants if masked else ['']:
      changes = VARIANTS.get(name, {})
      objective = dataclasses.replace(c.objective, **changes)
      cases = {'texts and masks': zip(texts, keys, strict=True)}
      if masked:
        cases['masks only'] = [(texts[0], key) for key in keys]
      for what, batches in cases.items():
        x, ratio = noise(c, objective, params, batches)
        deviation = x.std(ddof=1)
        rows.append(
          [
            *(name, what, f'{x.mean():.3f}', f'{deviation:.3f}'),
            *(f'{deviation / x.mean():.3f}', f'{ratio:.1f}'),
            *(f'{x.min():.2f}', f'{x.max():.2f}'),
          ]
        )
  b, l = config.train.batch, c.length
  print(f'{args.batches} batches of {b} x {l} tokens, nats per token')
  head = ['times and weights', 'what differs', 'mean', 'deviation', 'relative']
  print(terminal.table([[*head, 'gradient noise', 'least', 'most'], *rows]))


if __name__ == '__main__':
  main()
