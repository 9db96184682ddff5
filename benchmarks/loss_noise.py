"""Measures the noise of the training loss at fixed parameters.

python benchmarks/loss_noise.py --workdir runs/tiny

Computes the loss of many training batches without training: for different
texts, and for one batch of texts with different masks, under each kind of time
sampling.
"""

import argparse
import dataclasses
import functools
import itertools

import jax
import numpy as np

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.interop import load
from maskdiff.monitoring import terminal
from maskdiff.training import inputs
from maskdiff.training import step as step_lib


def losses(c, params, batches):
  """Returns the loss of each batch (Rows, key), nats per token."""
  sums = jax.jit(functools.partial(step_lib.eval_step, c))
  found = [jax.device_get(sums(params, *batch)) for batch in batches]
  return np.array([f.loss for f in found])


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--workdir', default='runs/tiny')
  parser.add_argument('--batches', type=int, default=200)
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
    for sampling in ('antithetic', 'stratified', 'iid') if masked else ('',):
      o = dataclasses.replace(c.objective, time_sampling=sampling)
      of = dataclasses.replace(c, objective=o)
      one = [(texts[0], key) for key in keys]
      found = {
        'texts and masks': losses(of, params, zip(texts, keys, strict=True))
      }
      if masked:
        found['masks only'] = losses(of, params, one)
      for what, x in found.items():
        rows.append(
          [
            *(sampling, what, f'{x.mean():.3f}', f'{x.std(ddof=1):.3f}'),
            *(f'{x.min():.2f}', f'{x.max():.2f}'),
          ]
        )
  b, l = config.train.batch, c.length
  print(f'{args.batches} batches of {b} x {l} tokens, nats per token')
  head = ['times', 'what differs', 'mean', 'deviation', 'least', 'most']
  print(terminal.table([head, *rows]))


if __name__ == '__main__':
  main()
