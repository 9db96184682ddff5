"""A training step against the same step with a dense cross entropy.

python benchmarks/train_step.py [--rounds 5]

The dense one projects every position onto the vocabulary and lets JAX
differentiate it, as a straightforward trainer does; everything else is the
same code. Prints tokens/s of both and their ratio at two vocabulary sizes, and
the memory that the compiler reserves for temporaries. The losses and gradient
norms must agree.
"""

import argparse
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate

from maskdiff import config as config_lib
from maskdiff import mesh as mesh_lib
from maskdiff import model as model_lib
from maskdiff import run
from maskdiff import step as step_lib
from maskdiff.optimizer import OptimizerConfig, make_optimizer

BATCH, LENGTH = 16, 128


def dense_canvas_loss(c, model, canvas):
  """`objective.canvas_loss` over all [B, L, V] logits."""
  logits = model.logits(model(canvas.inputs, canvas.labels))
  if not c.predict_mask:
    logits = logits.at[..., c.mask_id].set(-jnp.inf)
  log_probability = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(
    log_probability, canvas.targets[..., None], axis=-1
  )[..., 0]
  nll = jnp.where(canvas.weights != 0, nll, 0)
  return jnp.sum(canvas.weights * nll), jax.lax.stop_gradient(nll)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=5)
  rounds = parser.parse_args().rounds
  mesh = mesh_lib.make_mesh()
  print(
    f'{mesh.size} x {mesh.devices.flat[0].device_kind}, B={BATCH} L={LENGTH}'
  )
  for vocab_size in (8_192, 126_464):
    compare(mesh, vocab_size, rounds)


def compare(mesh, vocab_size, rounds):
  """Prints one line of results."""
  config = config_lib.default()
  config.update_from_flattened_dict(
    {
      'model.vocab_size': vocab_size,
      'model.embed': 128,
      'model.head_dim': 32,
      'model.mlp': 384,
      'model.tie_embeddings': False,
      'model.dtype': 'float32',
      'objective.loss_chunk_tokens': 256,
      'optimizer.learning_rate': 1e-3,
      'optimizer.final_learning_rate': 1e-3,
      'optimizer.warmup_steps': 0,
      'optimizer.decay_steps': 0,
      'data.length': LENGTH,
      'train.batch': BATCH,
    }
  )
  c = run.step_config(config)
  optimizer = make_optimizer(
    OptimizerConfig(**config.optimizer),
    config.train.steps,
    model_lib.axes(c.model),
  )
  tokens = jax.device_put(
    np.random.default_rng(0).integers(9, vocab_size, (BATCH, LENGTH), np.int32),
    mesh_lib.batch_sharding(mesh),
  )
  key = jax.random.key(0)
  shardings = step_lib.state_shardings(c.model, optimizer, mesh)
  init = functools.partial(step_lib.init_state, c.model, optimizer)
  steps, metrics, memory = {}, {}, {}
  for name in ('masked-only', 'dense'):
    loss = step_lib.canvas_loss if name == 'masked-only' else dense_canvas_loss
    with mock.patch.object(step_lib, 'canvas_loss', loss), jax.set_mesh(mesh):
      state = jax.jit(init, out_shardings=shardings)(key)
      compiled = (
        step_lib.compile_train_step(c, optimizer, mesh)
        .lower(state, tokens, key)
        .compile()
      )
    memory[name] = compiled.memory_analysis().temp_size_in_bytes
    state, metrics[name] = compiled(state, tokens, key)
    steps[name] = keep_training(compiled, state, tokens, key)
  for value in ('weighted_nll', 'grad_norm'):
    np.testing.assert_allclose(
      metrics['masked-only'][value], metrics['dense'][value], rtol=1e-4
    )
  seconds = alternate(steps, rounds)
  fast, dense = (BATCH * LENGTH / seconds[n] for n in ('masked-only', 'dense'))
  print(
    f'V={vocab_size:7,}: masked-only {fast:7,.0f} tokens/s, '
    f'dense {dense:7,.0f} tokens/s, ratio {fast / dense:.2f}; temporaries '
    f'{memory["masked-only"] / 2**20:,.0f} against '
    f'{memory["dense"] / 2**20:,.0f} MiB',
    flush=True,
  )


def keep_training(compiled, state, tokens, key):
  """A function that takes one more step and returns its metrics."""

  def step():
    nonlocal state
    state, metrics = compiled(state, tokens, key)
    return metrics

  return step


if __name__ == '__main__':
  main()
