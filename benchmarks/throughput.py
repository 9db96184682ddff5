"""Compares the speed of autoregressive, block and masked diffusion samplers.

python benchmarks/throughput.py --out throughput.jsonl
python benchmarks/throughput.py --prompts 128 2048 --answers 64 --batches 1 8

The same Transformer, with the same random weights, fills the same canvases as
an autoregressive network, as networks trained on blocks, and as a masked
diffusion network. All have a KV cache: an exact one, except for masked
diffusion (`dual`). --tokens_per_step tokens are committed in each denoising
step, which fixes the number of forward passes, so the weights do not matter.
How many tokens a step may commit without a loss of quality is a property of a
trained model; benchmarks/equal_quality.py measures it.

Writes a line of JSON per sampler, with tokens/s and the forward passes and
positions computed per token. Compilation is not timed. With --out, a canvas
whose lines exist is not measured again. benchmarks/throughput_page.py makes the
table and the plot of docs/block_diffusion.md.
"""

import argparse
import dataclasses
import itertools
import pathlib

import jax
import json_lines  # the file beside this one
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
  """Returns the samplers, a dict with keys (name, tokens per step).

  A value is a Network, its SamplerConfig and its Settings.

  Args:
    params: parameters of MODEL.
    answer: number of slots of an answer.
    tokens_per_step: list of numbers.
  """

  def filled(objective, block, n, cache):
    steps = -(-answer // block) * max(1, min(block, answer) // n)
    settings = {'block_length': block, 'cache': cache}
    settings |= {'gen_length': answer, 'steps': steps}
    trained_block = block if objective == 'block_diffusion' else 0
    return network(params, objective, trained_block), *split(settings)

  left_to_right = {'block_length': 1, 'cache': 'prefix', 'lookahead': 0}
  found = {
    ('autoregressive', 1): (
      network(params, 'autoregressive'),
      *split(left_to_right),
    )
  }
  for n in tokens_per_step:
    for block in (b for b in BLOCKS if n <= b):
      found[f'blocks of {block}', n] = filled(
        'block_diffusion', block, n, 'prefix'
      )
    found['masked diffusion', n] = filled(
      'masked_diffusion', MASKED_BLOCK, n, 'dual'
    )
  return found


def measure(params, prompt, answer, batch, tokens_per_step, rounds):
  """Returns the lines of one length of prompts and answers and one batch."""
  random = np.random.default_rng(0)
  prompts = random.integers(9, MODEL.vocab_size, (batch, prompt)).tolist()
  request = layouts.continue_prompts(prompts, answer)

  carries = {}

  def bound(name, network, c, settings):
    def function():
      carries[name] = sampler.complete(
        network, c, request._replace(settings=settings)
      )
      return carries[name]

    return function

  functions = {
    name: bound(name, *variant)
    for name, variant in variants(params, answer, tokens_per_step).items()
  }
  seconds = alternate(functions, rounds)
  lines, number = [], batch * answer
  for (name, n), carry in carries.items():
    forwards, positions = jax.device_get((carry.forwards, carry.positions))
    lines.append(
      {
        'prompt': prompt,
        'answer': answer,
        'batch': batch,
        'sampler': name,
        'tokens_per_step': n,
        'tokens_per_s': round(number / seconds[name, n], 1),
        'forwards_per_token': round(float(forwards.sum()) / number, 4),
        'positions_per_token': round(float(positions.sum()) / number, 2),
      }
    )
  return lines


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  several = dict(type=int, nargs='+')
  parser.add_argument('--prompts', default=[128, 512, 2048], **several)
  parser.add_argument('--answers', default=[64, 256, 1024], **several)
  parser.add_argument('--batches', default=[1, 8, 32], **several)
  parser.add_argument('--tokens_per_step', default=[1, 4, 8], **several)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--out', type=pathlib.Path, help='file of JSON lines')
  args = parser.parse_args()
  params = transformer.init(MODEL, jax.random.key(0))
  done = set()
  if args.out and args.out.exists():
    lines = json_lines.read(args.out)
    done = {(x['prompt'], x['answer'], x['batch']) for x in lines}
  for canvas in itertools.product(args.prompts, args.answers, args.batches):
    if canvas in done:
      continue
    lines = measure(params, *canvas, args.tokens_per_step, args.rounds)
    json_lines.report(lines, args.out)


if __name__ == '__main__':
  main()
