"""The jitted sampler against a straightforward Python loop.

python benchmarks/sampler.py [--rounds 3]

The loop is the published algorithm as it is usually written: per step one
compiled forward pass with logits of the whole canvas, and the choice of tokens
in NumPy. Both fill the same canvases with the same weights and must return the
same tokens.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate

from maskdiff import masks, sampler
from maskdiff import model as model_lib
from maskdiff.model import TransformerConfig
from maskdiff.sampler import SamplerConfig

MASK_ID = 4
BATCH, PROMPT = 4, 32

MODEL = TransformerConfig(
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


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=3)
  rounds = parser.parse_args().rounds
  params = model_lib.init(MODEL, jax.random.key(0))
  print(f'{jax.devices()[0].device_kind}, batch {BATCH}, prompt {PROMPT}')
  for gen_length, block_length, steps in ((64, 64, 64), (128, 32, 64)):
    compare(params, gen_length, block_length, steps, rounds)


def compare(params, gen_length, block_length, steps, rounds):
  """Prints one line of results."""
  rng = np.random.default_rng(0)
  prompts = [
    list(rng.integers(9, MODEL.vocab_size, PROMPT)) for _ in range(BATCH)
  ]
  request = sampler.continue_prompts(prompts, gen_length)
  c = SamplerConfig(
    steps=steps,
    block_length=block_length,
    temperature=0.0,
    remasking='low_confidence',
    objective='masked_diffusion',
    predict_mask=False,
    mask_id=MASK_ID,
    bos_id=1,
  )

  def jitted():
    return sampler.generate(MODEL, c, params, *request, seeds=range(BATCH))

  def loop():
    return python_loop(params, request[0], gen_length, block_length, steps)

  np.testing.assert_array_equal(jitted(), loop())
  seconds = alternate({'jitted': jitted, 'loop': loop}, rounds)
  tokens = BATCH * gen_length
  fast, slow = (tokens / seconds[name] for name in ('jitted', 'loop'))
  print(
    f'gen_length {gen_length}, block_length {block_length}, steps {steps}: '
    f'jitted {fast:,.0f} tokens/s, loop {slow:,.0f} tokens/s, '
    f'ratio {fast / slow:.2f}',
    flush=True,
  )


@jax.jit
def forward(params, canvas):
  model = model_lib.bind(MODEL, params)
  hidden = model(canvas, masks.bidirectional(jnp.ones(canvas.shape, bool)))
  return model.logits(hidden)


def python_loop(params, canvas, gen_length, block_length, steps):
  """Low-confidence remasking, written plainly."""
  canvas = canvas.copy()
  canvas[:, PROMPT:] = MASK_ID
  blocks = gen_length // block_length
  for block in range(blocks):
    end = PROMPT + (block + 1) * block_length
    per_step = steps // blocks
    for step in range(per_step):
      masked = canvas == MASK_ID
      masked[:, end:] = False
      logits = np.array(forward(params, canvas))
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
