"""Measures the HTTP server: latency of the first text, and tokens per second.

python benchmarks/server.py [--batch 16]

Streams two answers of 32 tokens to each of 1, 8 and 64 clients at once. The
network is tiny, so that the server itself counts. It has random weights, and
commits one token per forward pass, in blocks of 8. The last column divides
tokens per second by those of `sampling.serve` without a server, for the same
requests. The clients are threads of the same process.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import pathlib
import statistics
import threading
import time
import urllib.request

import jax
from sampler import SMALL  # the benchmark of that name

from maskdiff import config as config_lib
from maskdiff.data import tokenizer as tokenizer_lib
from maskdiff.interop import load
from maskdiff.model import transformer
from maskdiff.sampling import layouts
from maskdiff.sampling.serve import RowRequest, serve
from maskdiff.sampling.settings import sampler_config
from maskdiff.serving import server as server_lib
from maskdiff.serving.asked import Model, settings_of
from maskdiff.serving.engine import Engine

CLIENTS, CONTEXT, SLOTS, BLOCK = (1, 8, 64), 64, 32, 8
REQUESTS = 2  # of each client
PROMPT = 'def read_file(path):\n'
ROOT = pathlib.Path(__file__).resolve().parents[1]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--batch', type=int, default=16)
  args = parser.parse_args()
  model, network = make_model()
  engine = Engine(network, model.c, args.batch, [CONTEXT])
  engine.start()
  listener = server_lib.listen('127.0.0.1', 0)
  server = server_lib.Server(model, engine)
  thread = threading.Thread(target=server_lib.run, args=(server, listener))
  thread.start()
  url = f'http://127.0.0.1:{listener.getsockname()[1]}/v1/completions'
  print(
    f'{jax.devices()[0].device_kind}: answers of {SLOTS} tokens, batch '
    f'{args.batch}\n\n'
    '| clients | median s to first text | 90% | tokens/s | of the sampler |\n'
    '|---|---|---|---|---|'
  )
  for clients in CLIENTS:
    number = clients * REQUESTS
    alone = sampler_speed(model, network, args.batch, clients, number)
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
      began = time.perf_counter()
      first = list(pool.map(lambda seed: ask(url, seed), range(number)))
      seconds = time.perf_counter() - began
    speed = number * SLOTS / seconds
    deciles = statistics.quantiles(first, n=10)
    print(
      f'| {clients} | {statistics.median(first):.3f} | {deciles[-1]:.3f} '
      f'| {speed:,.0f} | {speed / alone:.2f} |',
      flush=True,
    )
  server.should_exit = True
  thread.join()


def make_model():
  """Returns an asked.Model with random weights, and its Network."""
  tokenizer = tokenizer_lib.load(ROOT / 'tokenizer' / 'stdlib_4k.model')
  config = config_lib.default()
  tiny = dict(embed=64, layers=2, heads=2, kv_heads=2, mlp=192)
  network = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size, **tiny)
  config.model.update({key: getattr(network, key) for key in config.model})
  config.data.length = CONTEXT
  config.sample.block_length = BLOCK
  for name in ('mask_id', 'bos_id', 'eos_id'):
    config.tokens[name] = getattr(tokenizer, name)
  params = transformer.init(network, jax.random.key(0))
  values = {'gen_length': SLOTS, 'logits_eos_inf': True}
  c, _ = sampler_config(config)
  model = Model('small', config, c, values, tokenizer, CONTEXT)
  return model, load.network(config, params)


def ask(url, seed):
  """Streams an answer; returns the seconds until its first text."""
  body = {'prompt': PROMPT, 'seed': seed, 'stream': True}
  request = urllib.request.Request(url, json.dumps(body).encode())
  began, first = time.perf_counter(), None
  with urllib.request.urlopen(request) as response:
    for line in response:
      if first is None and line.startswith(b'data: {'):
        if json.loads(line[6:])['choices'][0]['text']:
          first = time.perf_counter() - began
  return first


def sampler_speed(model, network, batch, clients, number):
  """Returns tokens per second without a server, with as many rows in use."""
  row = layouts.prompt_row(model.tokenizer.encode(PROMPT), SLOTS)
  settings = settings_of(model, SLOTS)
  free = threading.Semaphore(clients)

  def requests():
    for seed in range(number):
      while not free.acquire(blocking=False):
        yield None
      yield RowRequest(seed, row, seed, settings)

  def run():
    for _ in serve(network, model.c, requests(), batch, CONTEXT):
      free.release()

  run()
  began = time.perf_counter()
  run()
  return number * SLOTS / (time.perf_counter() - began)


if __name__ == '__main__':
  main()
