"""Compares samplers for many requests: KV caches, early stopping, refill.

python benchmarks/serving.py [--rounds 3]

Also counts the programs that are compiled for requests with settings of their
own, and compares autoregressive decoding with and without a KV cache.

All rows of a table have the same requests and the same random weights. The
last column is the share of tokens that equal those of the first row, because
approximate caches change tokens. To give answers different lengths, the eos
token has a probability of about 1/16 at each slot.
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
from maskdiff.sampling import layouts, sampler
from maskdiff.sampling.request import Request
from maskdiff.sampling.serve import RowRequest, serve
from maskdiff.sampling.settings import DEFAULT, SamplerConfig, split

EOS_ID = 5
REQUESTS, BATCH, PROMPT, SLOTS, BLOCK = 24, 4, 64, 64, 16

MODEL = dataclasses.replace(SMALL, tie_embeddings=False)
PLAIN = {
  'steps': SLOTS,
  'block_length': BLOCK,
  'temperature': 1.0,
  'remasking': 'low_confidence',
  'gen_length': SLOTS,
}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=3)
  rounds = parser.parse_args().rounds
  random = np.random.default_rng(0)
  prompts = random.integers(9, MODEL.vocab_size, (REQUESTS, PROMPT)).tolist()
  request = layouts.continue_prompts(prompts, SLOTS)
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
    f'prompt {PROMPT}, at most {SLOTS} tokens in blocks of {BLOCK}'
  )
  print('\nCaches; all answers have full length:')
  greedy = {**PLAIN, 'temperature': 0.0, 'logits_eos_inf': True}
  with_cache = lambda **cache: ({**greedy, **cache}, batches)
  compare(
    network,
    request,
    {
      'no cache': (greedy, batches),
      'prefix cache': with_cache(cache='prefix'),
      'prefix, refreshed every 8': with_cache(cache='prefix', refresh=8),
      'dual cache': with_cache(cache='dual'),
      'dual, refreshed every 8': with_cache(cache='dual', refresh=8),
    },
    rounds,
  )
  print('\nAnswers end at an eos token:')
  # Random order: otherwise eos would be among the first committed tokens.
  full_length = {**PLAIN, 'remasking': 'random'}
  stop = {**full_length, 'stop_at_eos': True}
  open_end = {**stop, 'lookahead': 0}
  compare(
    network,
    request,
    {
      'full length, then cut': (full_length, batches),
      'early stopping, batch by batch': (stop, batches),
      'early stopping, refilled': (stop, refilled),
      'open length, refilled': (open_end, refilled),
      'open length, refilled, dual cache': (
        {**open_end, 'cache': 'dual'},
        refilled,
      ),
    },
    rounds,
  )
  count_programs(network, request)
  autoregressive(params, rounds)


def autoregressive(params, rounds, prompt_lengths=(128, 1024)):
  """Compares decoding left to right with and without a KV cache."""
  network = Network(
    config=MODEL,
    params=params,
    objective='autoregressive',
    predict_mask=False,
    mask_id=MASK_ID,
    bos_id=1,
    eos_id=EOS_ID,
  )
  random = np.random.default_rng(2)
  plain = {'block_length': 1, 'logits_eos_inf': True}
  cached = plain | {'cache': 'prefix', 'lookahead': 0}
  for length in prompt_lengths:
    prompts = random.integers(9, MODEL.vocab_size, (BATCH, length)).tolist()
    print(f'\nAutoregressive, {BATCH} prompts of {length} tokens:')
    compare(
      network,
      layouts.continue_prompts(prompts, SLOTS),
      {'no cache': (plain, batches), 'KV cache': (cached, batches)},
      rounds,
    )


def count_programs(network, request, number=50):
  """Prints how many programs requests with different settings compile."""
  random = np.random.default_rng(1)
  settings = [
    DEFAULT._replace(
      temperature=float(random.uniform(0, 1.5)),
      top_k=int(random.integers(1, 99)),
      top_p=float(random.uniform(0.5, 1)),
      threshold=float(random.uniform(0, 1)),
      steps=int(random.integers(1, SLOTS)),
      stop_at_eos=bool(random.integers(2)),
      logits_eos_inf=bool(random.integers(2)),
    )
    for _ in range(number)
  ]
  found = list(requests_of(request))
  requests = [
    found[i % len(found)]._replace(id=i, settings=s)
    for i, s in enumerate(settings)
  ]
  before = sampler.run._cache_size()
  c = SamplerConfig(block_length=BLOCK, remasking='threshold')
  answers = list(serve(network, c, requests, BATCH, PROMPT + SLOTS))
  print(
    f'\n{len(answers)} requests with {len(set(settings))} different settings: '
    f'{sampler.run._cache_size() - before} program compiled'
  )


def with_eos(params, canvas):
  """Changes the head so that eos has probability 1/16 at a masked slot."""

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
  """Samples R requests by batches: tokens [R, L], forwards, positions."""
  found = []
  for first in range(0, len(request.seeds), BATCH):
    rows = slice(first, first + BATCH)
    *arrays, settings = request
    batch = Request(*(x[rows] for x in arrays), settings)
    carry = sampler.complete(network, c, batch)
    found.append(
      jax.device_get((carry.canvas, carry.forwards, carry.positions))
    )
  return [np.concatenate(x) for x in zip(*found, strict=True)]


def refilled(network, c, request):
  """Like `batches`, but a new request replaces each completed one."""
  answers = serve(network, c, requests_of(request), BATCH, PROMPT + SLOTS)
  answers = sorted(answers, key=lambda answer: answer.id)
  found = [(a.recording.tokens, a.forwards, a.positions) for a in answers]
  return [np.array(x) for x in zip(*found, strict=True)]


def requests_of(request):
  """Yields the rows of a Request as RowRequests."""
  for i, (canvas, fill) in enumerate(
    zip(request.canvas.tolist(), request.fill, strict=True)
  ):
    row = [None if slot else t for t, slot in zip(canvas, fill, strict=True)]
    yield RowRequest(i, row, int(request.seeds[i]), request.settings)


def compare(network, request, variants, rounds):
  """Prints a table with ratios to the first variant.

  Args:
    network: Network.
    request: Request.
    variants: dict from a name to (settings by key, `batches` or `refilled`).
    rounds: number of timed calls.
  """
  fill = request.fill

  def bound(values, function):
    c, settings = split(values)
    return lambda: function(network, c, request._replace(settings=settings))

  functions = {name: bound(*variant) for name, variant in variants.items()}
  found = {name: function() for name, function in functions.items()}
  seconds = alternate(functions, rounds)
  first = None
  print(
    '| | tokens | tokens/s | ratio | forwards per token | positions per token '
    '| tokens as in the first row |\n|---|---|---|---|---|---|---|'
  )
  for name, (tokens, forwards, positions) in found.items():
    answer = fill & layouts.cut(tokens, fill, EOS_ID)
    number = int(answer.sum())
    speed = number / seconds[name]
    first = first or (tokens, answer, speed)
    both = answer & first[1]
    same = (tokens == first[0])[both].sum() / max(answer.sum(), first[1].sum())
    print(
      f'| {name} | {number} | {speed:,.0f} | {speed / first[2]:.2f} '
      f'| {forwards.sum() / number:.2f} | {positions.sum() / number:.1f} '
      f'| {same:.1%} |',
      flush=True,
    )


if __name__ == '__main__':
  main()
