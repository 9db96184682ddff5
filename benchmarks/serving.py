"""Sampling many answers: caches, an early end, refilled batches, open lengths.

python benchmarks/serving.py [--rounds 3]

Every line is the same requests with the same weights, which are random. What
the caches save is told beside how much they change: the share of tokens that
are those of the sampler without a cache. For answers of different lengths, the
eos has a chance of about 1 in 16 at every slot.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from sampler import MASK_ID, SMALL  # the benchmark of that name
from timing import alternate

from maskdiff.model import masks, transformer
from maskdiff.model.network import Network
from maskdiff.sampling import layouts, refill, sampler
from maskdiff.sampling.request import Request, SamplerConfig

EOS_ID = 5
REQUESTS, BATCH, PROMPT, ROOM, BLOCK = 24, 4, 64, 64, 16

MODEL = dataclasses.replace(SMALL, tie_embeddings=False)
PLAIN = SamplerConfig(
  steps=ROOM,
  block_length=BLOCK,
  temperature=1.0,
  remasking='low_confidence',
  gen_length=ROOM,
)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=3)
  rounds = parser.parse_args().rounds
  random = np.random.default_rng(0)
  prompts = random.integers(9, MODEL.vocab_size, (REQUESTS, PROMPT)).tolist()
  request = layouts.continue_prompts(prompts, ROOM)
  params = transformer.init(MODEL, jax.random.key(0))
  network = Network(
    config=MODEL,
    params=with_eos(params, request.canvas),
    objective='masked_diffusion',
    predict_mask=False,
    mask_id=MASK_ID,
    bos_id=1,
    eos_id=EOS_ID,
  )
  print(
    f'{jax.devices()[0].device_kind}: {REQUESTS} requests, batch {BATCH}, '
    f'prompt {PROMPT}, at most {ROOM} tokens in blocks of {BLOCK}'
  )
  change = lambda **changes: dataclasses.replace(PLAIN, **changes)
  print('\nCaches, all answers of full length:')
  greedy = change(temperature=0.0, logits_eos_inf=True)
  compare(
    network,
    request,
    {
      'no cache': (greedy, batches),
      'prefix cache': (dataclasses.replace(greedy, cache='prefix'), batches),
      'prefix, refreshed every 8': (
        dataclasses.replace(greedy, cache='prefix', refresh=8),
        batches,
      ),
      'dual cache': (dataclasses.replace(greedy, cache='dual'), batches),
      'dual, refreshed every 8': (
        dataclasses.replace(greedy, cache='dual', refresh=8),
        batches,
      ),
    },
    rounds,
  )
  print('\nAnswers that end with an eos:')
  # In random order, or eos would be among the first tokens of every answer.
  whole = change(remasking='random')
  stop = dataclasses.replace(whole, stop_at_eos=True)
  open_end = dataclasses.replace(stop, lookahead=0)
  compare(
    network,
    request,
    {
      'full length, then cut': (whole, batches),
      'early end, batch by batch': (stop, batches),
      'early end, refilled': (stop, refilled),
      'open length, refilled': (open_end, refilled),
      'open length, refilled, dual cache': (
        dataclasses.replace(open_end, cache='dual'),
        refilled,
      ),
    },
    rounds,
  )


def with_eos(params, canvas):
  """Weights that give eos a chance of about 1 in 16 at a masked slot."""

  @jax.jit
  def hidden(params, canvas):
    return transformer.bind(MODEL, params)(
      canvas, masks.bidirectional(jnp.ones(canvas.shape, bool))
    )

  canvas = np.array(canvas[:4])
  canvas[:, PROMPT:] = MASK_ID
  found = hidden(params, canvas)[:, PROMPT:].reshape(-1, MODEL.embed)
  direction = found.mean(axis=0)
  others = jax.nn.logsumexp(found @ params['head'], axis=-1).mean()
  logit = others - np.log(15)
  eos = direction * logit / (direction @ direction)
  return params | {'head': params['head'].at[:, EOS_ID].set(eos)}


def batches(network, c, request):
  """(tokens [R, L], forwards, positions) of R requests, batch by batch."""
  found = []
  for first in range(0, REQUESTS, BATCH):
    rows = slice(first, first + BATCH)
    carry = sampler.complete(network, c, Request(*(x[rows] for x in request)))
    found.append(
      jax.device_get((carry.canvas, carry.forwards, carry.positions))
    )
  return [np.concatenate(x) for x in zip(*found, strict=True)]


def refilled(network, c, request):
  """As `batches`, with a request in the place of each that has ended."""
  answers = refill.answers(network, c, request, BATCH)
  answers = sorted(answers, key=lambda answer: answer.row)
  return [
    np.array([getattr(a, name) for a in answers])
    for name in ('tokens', 'forwards', 'positions')
  ]


def compare(network, request, variants, rounds):
  """Prints a table, with ratios to the first of the variants."""
  fill = request.fill
  functions = {
    name: lambda c=c, f=f: f(network, c, request)
    for name, (c, f) in variants.items()
  }
  found = {name: function() for name, function in functions.items()}
  seconds = alternate(functions, rounds)
  first = None
  print(
    '| | tokens | tokens/s | ratio | forwards per token | positions per token '
    '| tokens as in the first row |\n|---|---|---|---|---|---|---|'
  )
  for name, (tokens, forwards, positions) in found.items():
    kept = fill & layouts.cut(tokens, fill, EOS_ID)
    number = int(kept.sum())
    speed = number / seconds[name]
    first = first or (tokens, kept, speed)
    both = kept & first[1]
    same = (tokens == first[0])[both].sum() / max(kept.sum(), first[1].sum())
    print(
      f'| {name} | {number} | {speed:,.0f} | {speed / first[2]:.2f} '
      f'| {forwards.sum() / number:.2f} | {positions.sum() / number:.1f} '
      f'| {same:.1%} |',
      flush=True,
    )


if __name__ == '__main__':
  main()
