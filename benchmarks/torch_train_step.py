"""A train step of masked diffusion in PyTorch, the baseline of train_step.py.

The same network with the same weights as maskdiff/model/transformer.py, written
as a PyTorch user would write it for speed: eager mode, float32, one product for
queries, keys and values and one for gate and up, scaled_dot_product_attention
without a mask, logits of the masked positions only, gradients freed between
steps, and the fused AdamW.
"""

import functools
import os
import pathlib
import runpy

import jax
import numpy as np
import torch
import torch_sampler
from steps import next_step, random_rows, setup, start
from timing import alternate
from torch.nn import functional as F

from maskdiff.model import transformer
from maskdiff.objectives.table import make_canvas
from maskdiff.training import step as step_lib
from maskdiff.training.optimizer import OptimizerConfig

# configs/tiny.py, and the same with other sizes. All train with AdamW here.
SIZES = {
  '2.6M': {},
  '20M': {
    'model.embed': 384,
    'model.layers': 8,
    'model.heads': 6,
    'model.kv_heads': 6,
    'model.mlp': 1536,
  },
}
CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'tiny.py'
STEPS = 4  # that are timed together


def compare(mesh, rounds):
  """Prints tokens/s of both at each size, and their ratio."""
  cores = len(os.sched_getaffinity(0))
  torch.set_num_threads(cores)
  for size, overrides in SIZES.items():
    config = runpy.run_path(str(CONFIG))['get_config']()
    config.update_from_flattened_dict(
      {
        'model.vocab_size': 4096,
        'model.zero_outputs': False,
        'optimizer.name': 'adamw',
        'optimizer.schedule': 'wsd',
        'optimizer.final_learning_rate': config.optimizer.learning_rate,
        'optimizer.warmup_steps': 0,
        'optimizer.decay_steps': 0,
      }
      | overrides
    )
    steps, parameters = _both(config, mesh)
    seconds = alternate(
      {name: functools.partial(_repeat, f) for name, f in steps.items()}, rounds
    )
    tokens = STEPS * config.train.batch * config.data.length
    print(
      f'{parameters:,} parameters ({size}), {cores} cores: '
      f'{tokens / seconds["jax"]:,.0f} tokens/s, '
      f'torch {tokens / seconds["torch"]:,.0f} tokens/s, '
      f'ratio {seconds["torch"] / seconds["jax"]:.2f}',
      flush=True,
    )


def _repeat(step):
  for _ in range(STEPS):
    result = step()
  return result


def _both(config, mesh):
  """Returns {'jax', 'torch': step}, which agree, and the parameter count."""
  c, optimizer = setup(config)
  rows, key = random_rows(config, mesh), jax.random.key(0)
  with jax.set_mesh(mesh):
    state = start(c, optimizer, mesh, key)
    compiled = step_lib.compile_train_step(c, optimizer, mesh)
    compiled = compiled.lower(state, rows, key).compile()
  batch, step_key = config.train.batch, jax.random.fold_in(key, 0)
  numbers = np.arange(batch, dtype=np.int32)
  canvas = make_canvas(c.objective, rows, numbers, step_key, batch)
  canvas, params = jax.device_get((canvas, state.params))
  o = OptimizerConfig(**config.optimizer)
  torch_step = make_step(c.model, o, params, canvas, c.objective.mask_id)
  loss, norm = torch_step()
  state, metrics = compiled(state, rows, key)
  np.testing.assert_allclose(metrics.sums.loss, loss, rtol=1e-4)
  np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-3)
  steps = {'jax': next_step(compiled, state, rows, key), 'torch': torch_step}
  return steps, transformer.num_params(c.model)[0]


def make_step(c, optimizer, params, canvas, mask_id):
  """Returns a function that makes one update and returns loss and norm.

  Args:
    c: transformer.TransformerConfig.
    optimizer: OptimizerConfig of AdamW; its learning rate is constant.
    params: parameter tree of the start, float32.
    canvas: Canvas of [B, L] NumPy arrays; every step trains on it.
    mask_id: token id left out of the softmax.

  Returns:
    () -> (loss in nats per token, norm of the gradient before clipping).
  """
  weights = torch_sampler.load(c, params)
  matrices, vectors = [], []
  for w in {id(w): w for w in _leaves(weights)}.values():  # head may be embed
    w.requires_grad_()
    (matrices if w.ndim > 1 else vectors).append(w)
  decays = [
    {'params': matrices, 'weight_decay': optimizer.weight_decay},
    {'params': vectors, 'weight_decay': 0.0},
  ]
  adamw = torch.optim.AdamW(
    decays,
    lr=optimizer.learning_rate,
    betas=(optimizer.b1, optimizer.b2),
    eps=optimizer.eps,
    fused=True,
  )
  inputs = torch.from_numpy(canvas.inputs.astype('int64'))
  where = canvas.weights.reshape(-1) != 0
  selected = torch.from_numpy(where.nonzero()[0])
  targets = canvas.targets.reshape(-1)[where].astype('int64')
  targets = torch.from_numpy(targets)
  loss_weights = torch.from_numpy(canvas.weights.reshape(-1)[where])
  num_tokens = float(canvas.num_tokens.sum())

  def step():
    adamw.zero_grad(set_to_none=True)
    hidden = torch_sampler.hidden_states(c, weights, inputs).flatten(0, 1)
    logits = F.linear(hidden[selected], weights['head'])
    logits[:, mask_id] = -torch.inf
    nll = F.cross_entropy(logits, targets, reduction='none')
    loss = (loss_weights * nll).sum() / num_tokens
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(
      [*matrices, *vectors], optimizer.clip_norm
    )
    adamw.step()
    return loss.item(), norm.item()

  return step


def _leaves(tree):
  if isinstance(tree, torch.Tensor):
    return [tree]
  children = tree.values() if isinstance(tree, dict) else tree
  return [leaf for child in children for leaf in _leaves(child)]
