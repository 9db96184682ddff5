"""Compares the speed of autoregressive, block and masked diffusion samplers.

python benchmarks/throughput.py
python benchmarks/throughput.py --prompts 128 2048 --answers 64 --batches 1 8

The same Transformer, with the same random weights, fills the same canvases as
an autoregressive network, as networks trained on blocks, and as a masked
diffusion network. All have a KV cache: an exact one, except for masked
diffusion (`dual`). --tokens_per_step tokens are committed in each denoising
step, which fixes the number of forward passes, so the weights do not matter.
How many tokens a step may commit without a loss of quality is a property of a
trained model; benchmarks/quality.py measures it.

Prints tokens/s, their ratio to autoregression, and forward passes and positions
computed per token. Compilation is not timed.
"""

import argparse
import dataclasses
import itertools

import jax
import numpy as np
from sampler import MASK_ID, SMALL  # the benchmark of that name
from timing import alternate

from maskdiff.model import transformer
from maskdiff.model.network import Network
from maskdiff.sampling import layouts, sampler
from maskdiff.sampling.settings import split

MODEL = dataclasses.replace(SMALL, tie_embeddings=False)
BLOCKS = (4, 16, 32)
MASKED_BLOCK = 32  # of the sampler, for masked diffusion


def network(params, objective, block_length=0):
  """Returns the Network of an objective with given weights."""
  return Network(
    config=MODEL,
    params=params,
    objective=objective,
    predict_mask=False,
    mask_id=MASK_ID,
    bos_id=1,
    block_length=block_length,
  )


def variants(params, answer, tokens_per_step):
  """Returns dict: name -> (Network, SamplerConfig, Settings)."""
  found = {
    'autoregressive': (
      network(params, 'autoregressive'),
      *split({'block_length': 1, 'cache': 'prefix', 'lookahead': 0}),
    )
  }

  def steps(block):
    blocks = -(-answer // block)
    return blocks * max(1, min(block, answer) // n)

  for n in tokens_per_step:
    for block in BLOCKS:
      if n <= block:
        found[f'blocks of {block}, {n} per step'] = (
          network(params, 'block_diffusion', block),
          *split(
            {
              'block_length': block,
              'cache': 'prefix',
              'gen_length': answer,
              'steps': steps(block),
            }
          ),
        )
    found[f'masked diffusion, {n} per step'] = (
      network(params, 'masked_diffusion'),
      *split(
        {
          'block_length': MASKED_BLOCK,
          'cache': 'dual',
          'gen_length': answer,
          'steps': steps(MASKED_BLOCK),
        }
      ),
    )
  return found


def compare(params, prompt, answer, batch, tokens_per_step, rounds):
  """Prints the table of one length of prompts and answers and one batch."""
  random = np.random.default_rng(0)
  prompts = random.integers(9, MODEL.vocab_size, (batch, prompt)).tolist()
  request = layouts.continue_prompts(prompts, answer)

  def bound(network, c, settings):
    return lambda: sampler.complete(
      network, c, request._replace(settings=settings)
    )

  functions = {
    name: bound(*variant)
    for name, variant in variants(params, answer, tokens_per_step).items()
  }
  carries = {name: function() for name, function in functions.items()}
  seconds = alternate(functions, rounds)
  print(
    f'\n{batch} prompts of {prompt} tokens, {answer} more each:\n\n'
    '| | tokens/s | ratio | forwards per token | positions per token |\n'
    '|---|---|---|---|---|'
  )
  number = batch * answer
  for name, carry in carries.items():
    ratio = seconds['autoregressive'] / seconds[name]
    forwards, positions = jax.device_get((carry.forwards, carry.positions))
    print(
      f'| {name} | {number / seconds[name]:,.0f} | {ratio:.2f} '
      f'| {forwards.sum() / number:.3f} | {positions.sum() / number:.1f} |',
      flush=True,
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  several = dict(type=int, nargs='+')
  parser.add_argument('--prompts', default=[128, 512, 2048], **several)
  parser.add_argument('--answers', default=[64, 256, 1024], **several)
  parser.add_argument('--batches', default=[1, 8, 32], **several)
  parser.add_argument('--tokens_per_step', default=[1, 2, 4], **several)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  params = transformer.init(MODEL, jax.random.key(0))
  print(f'{jax.devices()[0].device_kind}, {jax.device_count()} device(s)')
  for prompt, answer, batch in itertools.product(
    args.prompts, args.answers, args.batches
  ):
    compare(params, prompt, answer, batch, args.tokens_per_step, args.rounds)


if __name__ == '__main__':
  main()
