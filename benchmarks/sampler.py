"""Compares the jitted sampler with a Python loop and with PyTorch.

python benchmarks/sampler.py [--rounds 3]

The loop is the published algorithm as it is usually written: each denoising
step runs a compiled forward pass with logits at all positions, and selects
tokens in NumPy. `torch_sampler.py` is the same loop in PyTorch, if torch is
installed. All programs fill the same canvases with the same weights in float32
and must return the same tokens. Loading and compilation are not timed.
"""

import argparse
import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate

from maskdiff.model import masks, transformer
from maskdiff.model.network import Network
from maskdiff.model.transformer import TransformerConfig
from maskdiff.sampling import layouts, sampler
from maskdiff.sampling.settings import split

MASK_ID = 4
BATCH = 4

SMALL = TransformerConfig(
  vocab_size=8192,
  embed=128,
  layers=4,
  heads=4,
  kv_heads=4,
  head_dim=32,
  mlp=384,
  tie_embeddings=True,
  rope_theta=500_000.0,
  norm_eps=1e-5,
  dtype='float32',
  remat='none',
  attention='auto',
)
# Layers as wide as in configs/150m.py.
WIDE = dataclasses.replace(
  SMALL, vocab_size=32_768, embed=1024, heads=8, kv_heads=8, head_dim=128
)
WIDE = dataclasses.replace(WIDE, mlp=2688, tie_embeddings=False)
# The vocabulary of LLaDA.
LARGE_VOCAB = dataclasses.replace(
  WIDE, vocab_size=126_464, embed=512, heads=4, kv_heads=4, mlp=1344
)

# Models, and for each (prompt, gen_length, block_length, steps).
CASES = (
  (SMALL, ((32, 64, 64, 64), (32, 128, 32, 64))),
  (WIDE, ((32, 64, 32, 16),)),
  (LARGE_VOCAB, ((128, 64, 32, 8),)),
)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=3)
  rounds = parser.parse_args().rounds
  print(f'{jax.devices()[0].device_kind}, batch {BATCH}')
  if not importlib.util.find_spec('torch'):
    print('torch is not installed: only the loop is compared')
  for model, shapes in CASES:
    params = transformer.init(model, jax.random.key(0))
    total, _ = transformer.num_params(model)
    print(f'{total:,} parameters, vocabulary {model.vocab_size:,}')
    for shape in shapes:
      compare(model, params, *shape, rounds)


def compare(model, params, prompt, gen_length, block_length, steps, rounds):
  """Prints one line of results."""
  rng = np.random.default_rng(0)
  prompts = [
    list(rng.integers(9, model.vocab_size, prompt)) for _ in range(BATCH)
  ]
  c, settings = split(
    {
      'steps': steps,
      'gen_length': gen_length,
      'block_length': block_length,
      'temperature': 0.0,
      'remasking': 'low_confidence',
    }
  )
  request = layouts.continue_prompts(prompts, gen_length, settings=settings)
  network = Network(
    config=model,
    params=params,
    objective='masked_diffusion',
    predict_mask=False,
    mask_id=MASK_ID,
    bos_id=1,
  )

  def jitted():
    return sampler.generate(network, c, request)

  def loop():
    canvas = request.canvas
    return python_loop(model, params, canvas, prompt, block_length, steps)

  functions = {'jitted': jitted, 'loop': loop}
  if importlib.util.find_spec('torch'):
    import torch_sampler

    weights = torch_sampler.load(model, params)
    functions['torch'] = lambda: torch_sampler.generate(
      model, weights, request.canvas, prompt, block_length, steps, MASK_ID
    )
  expected = np.asarray(jitted())
  for name in functions:
    np.testing.assert_array_equal(functions[name](), expected, err_msg=name)
  seconds = alternate(functions, rounds)
  rate = {name: BATCH * gen_length / s for name, s in seconds.items()}
  print(
    f'prompt {prompt}, gen_length {gen_length}, block_length {block_length}, '
    f'steps {steps}: '
    f'jitted {rate.pop("jitted"):,.0f} tokens/s, '
    + ', '.join(
      f'{name} {r:,.0f} tokens/s, ratio {seconds[name] / seconds["jitted"]:.2f}'
      for name, r in rate.items()
    ),
    flush=True,
  )


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, canvas):
  model = transformer.bind(model, params)
  hidden = model(canvas, masks.bidirectional(jnp.ones(canvas.shape, bool)))
  return model.logits(hidden)


def python_loop(model, params, canvas, prompt, block_length, steps):
  """Samples with low-confidence remasking in plain NumPy."""
  canvas = canvas.copy()
  canvas[:, prompt:] = MASK_ID
  blocks = (canvas.shape[1] - prompt) // block_length
  for block in range(blocks):
    end = prompt + (block + 1) * block_length
    per_step = steps // blocks
    for step in range(per_step):
      masked = canvas == MASK_ID
      masked[:, end:] = False
      logits = np.array(forward(model, params, canvas))
      logits[..., MASK_ID] = -np.inf
      token = logits.argmax(axis=-1)
      shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
      probability = shifted / shifted.sum(axis=-1, keepdims=True)
      confidence = np.take_along_axis(probability, token[..., None], -1)[..., 0]
      confidence = np.where(masked, confidence, -np.inf)
      budget = block_length // per_step + (step < block_length % per_step)
      for row in range(len(canvas)):
        best = np.argsort(-confidence[row], kind='stable')[:budget]
        canvas[row, best] = token[row, best]
  return canvas


if __name__ == '__main__':
  main()
