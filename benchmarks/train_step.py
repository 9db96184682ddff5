"""Compares the train step with a dense cross entropy and with a plain step.

python benchmarks/train_step.py [--rounds 5]
python benchmarks/train_step.py --torch

`dense` is the same code, except that it projects all positions onto the
vocabulary and lets JAX differentiate the result. `plain` is the direct
code in this file: no mesh, no scan over layers, no rematerialization, no
kernel, dense cross entropy. Prints tokens/s of each and their ratios at two
vocabulary sizes, and the memory that the compiler reserves for temporaries.
The losses and gradient norms must agree.

The last line of each size compares the losses alone, with both gradients:
`token_nll` computes one more product with the head than `cross_entropy`, so
four thirds of the products.

--torch compares the step of configs/tiny.py, and of a larger network, with one
in PyTorch instead (torch_train_step.py; pip install torch). The process keeps
freed memory, as launch/pretrain.py does, so that PyTorch does too.
"""

import argparse
import functools
import os
import statistics
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from steps import next_step, random_rows, setup, start
from timing import alternate

from maskdiff import config as config_lib
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.distributed.host_memory import keep_freed_memory
from maskdiff.model.cross_entropy import cross_entropy
from maskdiff.model.token_nll import token_nll
from maskdiff.objectives import table
from maskdiff.training import step as step_lib
from maskdiff.training import train_state

BATCH, LENGTH, EMBED, CHUNK = 16, 128, 128, 256


def dense_canvas_loss(c, model, canvas):
  """Returns `table.loss`, computed from logits at all positions, [B, L, V]."""
  logits = model.logits(model(canvas.inputs, canvas.labels))
  if not c.predict_mask:
    logits = logits.at[..., c.mask_id].set(-jnp.inf)
  log_probability = jax.nn.log_softmax(logits)
  nll = -jnp.take_along_axis(
    log_probability, canvas.targets[..., None], axis=-1
  )[..., 0]
  nll = jnp.where(canvas.weights != 0, nll, 0)
  return jnp.sum(canvas.weights * nll), jax.lax.stop_gradient(nll)


def plain_logits(c, params, inputs, doc):
  """Returns [B, L, V] float32 logits of the network, in plain code."""
  norm = lambda x, gain: (
    gain * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + c.norm_eps)
  )
  angle = jnp.arange(inputs.shape[1])[:, None] * c.rope_theta ** (
    -jnp.arange(0, c.head_dim, 2) / c.head_dim
  )
  cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]

  def rotate(x):
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

  visible = (doc[:, :, None] == doc[:, None, :])[:, None]
  x = params['embed'][inputs]
  for n in range(c.layers):
    w = {name: stacked[n] for name, stacked in params['blocks'].items()}
    h = norm(x, w['norm1'])
    q = rotate(jnp.einsum('bld,dhk->blhk', h, w['q']))
    k, v = (jnp.einsum('bld,dgk->blgk', h, w[name]) for name in 'kv')
    k, v = (
      jnp.repeat(x, c.heads // c.kv_heads, axis=2) for x in (rotate(k), v)
    )
    scores = jnp.einsum('blhk,bshk->bhls', q, k) / c.head_dim**0.5
    attention = jax.nn.softmax(jnp.where(visible, scores, -1e30))
    attended = jnp.einsum('bhls,bshk->blhk', attention, v)
    x = x + jnp.einsum('blhk,hkd->bld', attended, w['o'])
    h = norm(x, w['norm2'])
    x = x + (jax.nn.silu(h @ w['gate']) * (h @ w['up'])) @ w['down']
  return norm(x, params['norm']) @ params['head']


def plain_step(c, optimizer, state, rows, key):
  """`step.train_step` without any optimization for speed or memory."""
  batch = rows.tokens.shape[0]
  key = jax.random.fold_in(key, state.step)
  numbers = jnp.arange(batch, dtype=jnp.int32)
  canvas = table.make_canvas(c.objective, rows, numbers, key, batch)

  def loss(params):
    logits = plain_logits(c.model, params, canvas.inputs, canvas.labels.doc)
    logits = logits.at[..., c.objective.mask_id].set(-jnp.inf)
    nll = optax.softmax_cross_entropy_with_integer_labels(
      logits, canvas.targets
    )
    nll = jnp.where(canvas.weights != 0, nll, 0)
    total = jnp.sum(canvas.weights * nll)
    return total / canvas.num_tokens.sum(), total

  gradients, total = jax.grad(loss, has_aux=True)(state.params)
  updates, opt_state = optimizer.update(
    gradients, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  metrics = total, optax.tree.norm(gradients)
  state = train_state.TrainState(state.step + 1, params, opt_state, state.guard)
  return state, metrics


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--torch', action='store_true')
  args = parser.parse_args()
  rounds = args.rounds
  if args.torch:
    import torch_train_step

    keep_freed_memory(os.environ, jax.config.jax_platforms)
    return torch_train_step.compare(mesh_lib.make_mesh(), rounds)
  mesh = mesh_lib.make_mesh()
  print(
    f'{mesh.size} x {mesh.devices.flat[0].device_kind}, B={BATCH} L={LENGTH}'
  )
  for vocab_size in (8_192, 126_464):
    compare(mesh, vocab_size, rounds)
    compare_losses(vocab_size, rounds)


def compare(mesh, vocab_size, rounds):
  """Prints one line of results."""
  config = config_lib.default()
  config.update_from_flattened_dict(
    {
      'model.vocab_size': vocab_size,
      'model.embed': EMBED,
      'model.head_dim': 32,
      'model.mlp': 384,
      'model.tie_embeddings': False,
      'model.dtype': 'float32',
      'objective.loss_chunk_tokens': CHUNK,
      'optimizer.learning_rate': 1e-3,
      'optimizer.final_learning_rate': 1e-3,
      'optimizer.warmup_steps': 0,
      'optimizer.decay_steps': 0,
      'data.length': LENGTH,
      'train.batch': BATCH,
    }
  )
  c, optimizer = setup(config)
  rows, key = random_rows(config, mesh), jax.random.key(0)
  steps, metrics, memory = {}, {}, {}
  for name in ('masked-only', 'dense', 'plain'):
    loss = table.loss if name == 'masked-only' else dense_canvas_loss
    with mock.patch.object(table, 'loss', loss), jax.set_mesh(mesh):
      state = start(c, optimizer, mesh, key)
      step = (
        jax.jit(functools.partial(plain_step, c, optimizer), donate_argnums=0)
        if name == 'plain'
        else step_lib.compile_train_step(c, optimizer, mesh)
      )
      compiled = step.lower(state, rows, key).compile()
    memory[name] = compiled.memory_analysis().temp_size_in_bytes
    state, found = compiled(state, rows, key)
    if name != 'plain':
      found = found.sums.weighted_nll, found.grad_norm
    metrics[name] = found
    steps[name] = next_step(compiled, state, rows, key)
  for other in ('dense', 'plain'):
    np.testing.assert_allclose(
      metrics['masked-only'], metrics[other], rtol=1e-4
    )
  seconds = alternate(steps, rounds)
  for name in steps:
    print(
      f'V={vocab_size:7,} {name:11}: {BATCH * LENGTH / seconds[name]:7,.0f} '
      f'tokens/s, masked-only is {seconds[name] / seconds["masked-only"]:.2f} '
      f'times as fast; temporaries {memory[name] / 2**20:,.0f} MiB',
      flush=True,
    )


def compare_losses(vocab_size, rounds):
  """Prints the time of token_nll relative to cross_entropy, with gradients."""
  random = np.random.default_rng(0)
  hidden = random.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
  head = random.normal(size=(EMBED, vocab_size)).astype(np.float32)
  targets = random.integers(0, vocab_size, (BATCH, LENGTH), np.int32)
  where = random.random((BATCH, LENGTH)) < 0.5
  weights = np.where(where, random.uniform(1, 10, where.shape), 0)
  arrays = map(jnp.asarray, (hidden / EMBED**0.5, head, targets))
  arrays = *arrays, jnp.asarray(weights, jnp.float32)

  def weighted_token_nll(hidden, head, targets, weights):
    nll = token_nll(hidden, head, targets, weights != 0, None, CHUNK)
    return jnp.sum(weights * nll)

  losses = {
    'cross_entropy': lambda *args: cross_entropy(*args, None, CHUNK)[0],
    'token_nll': weighted_token_nll,
  }
  calls = {
    name: functools.partial(jax.jit(jax.value_and_grad(f, (0, 1))), *arrays)
    for name, f in losses.items()
  }
  first, second = (jax.tree.leaves(call()) for call in calls.values())
  for a, b in zip(first, second, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())
  # CPU time is less sensitive to other load on the machine than wall time.
  cpu_seconds = {name: [] for name in calls}

  def timed(name):
    began = time.process_time()
    result = jax.block_until_ready(calls[name]())
    cpu_seconds[name].append(time.process_time() - began)
    return result

  timed_calls = {name: functools.partial(timed, name) for name in calls}
  seconds = alternate(timed_calls, 3 * rounds)
  cpu = {name: statistics.median(s[1:]) for name, s in cpu_seconds.items()}
  print(
    f'V={vocab_size:7,} loss and gradients: token_nll takes '
    f'{seconds["token_nll"] / seconds["cross_entropy"]:.2f} of the time of '
    f'cross_entropy, {cpu["token_nll"] / cpu["cross_entropy"]:.2f} of its CPU '
    'time',
    flush=True,
  )


if __name__ == '__main__':
  main()
