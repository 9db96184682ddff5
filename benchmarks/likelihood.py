"""Compares batched likelihoods with a loop over single requests.

python benchmarks/likelihood.py [--rounds 3]
python benchmarks/likelihood.py --workdir runs/tiny

The loop is the published algorithm (LLaDA, get_log_likelihood.py), compiled:
for each request it evaluates batches of 16 copies of its row, at the length of
the row, with logits at all positions. Both programs use the same weights and
the same 128 masks per request, and must return the same values. The ratio is
therefore at equal standard error. The standard error is printed too.

With --workdir it prints the standard error of each estimator for the same
number of forward passes, on rows of held-out text.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from timing import alternate

from maskdiff.interop import load
from maskdiff.likelihood import bounds, estimators, queries
from maskdiff.likelihood.estimators import Estimator
from maskdiff.likelihood.queries import LikelihoodConfig
from maskdiff.model import masks, transformer
from maskdiff.model.network import Network
from maskdiff.model.transformer import TransformerConfig
from maskdiff.training import inputs

MASK_ID, SAMPLES, COPIES = 4, 128, 16
MODEL = TransformerConfig(
  vocab_size=4096,
  embed=128,
  layers=2,
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
CONFIG = LikelihoodConfig(
  context=256,
  guidance=0.0,
  tokens_per_call=4096,
  loss_chunk_tokens=512,
)
# Minimum and maximum number of tokens of prompts and of answers.
WORKLOADS = {
  'one-token choices': ((24, 64), (1, 1)),
  'short choices': ((24, 64), (2, 8)),
  'long answers': ((16, 32), (32, 64)),
}
REQUESTS = 6
ESTIMATORS = [
  Estimator('bernoulli', strata=1),
  Estimator('bernoulli', strata=16),
  Estimator('bernoulli', strata=16, coupled=True),
  Estimator('count', strata=1),
  Estimator('count', strata=16),
  Estimator('count', strata=1, coupled=True),
  Estimator('count', strata=16, coupled=True),
]


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--workdir')
  args = parser.parse_args()
  if args.workdir:
    return standard_errors(args.workdir)
  params = transformer.init(MODEL, jax.random.key(0))
  print(
    f'{jax.devices()[0].device_kind}, {REQUESTS} requests, {SAMPLES} masks each'
  )
  for name, (prompt, answer) in WORKLOADS.items():
    compare(params, name, prompt, answer, args.rounds)


def compare(params, name, prompt, answer, rounds):
  """Prints the speed when compiled, and of the first call."""
  rng = np.random.default_rng(0)
  draw = lambda lengths: [
    rng.integers(9, MODEL.vocab_size, rng.integers(*lengths, endpoint=True))
    for _ in range(REQUESTS)
  ]
  prompts, answers = draw(prompt), draw(answer)
  estimator = Estimator(samples=SAMPLES, strata=COPIES)
  network = Network(
    config=MODEL,
    params=params,
    objective='masked_diffusion',
    predict_mask=False,
    mask_id=MASK_ID,
    bos_id=1,
  )

  def batched():
    rows = bounds.lay_out(prompts, answers)
    return bounds.bound(network, CONFIG, rows, estimator, range(REQUESTS))

  def loop():
    return np.array(
      [
        one_request(params, p, a, estimator, seed)
        for seed, (p, a) in enumerate(zip(prompts, answers, strict=True))
      ]
    )

  functions = {'batched': batched, 'loop': loop}
  results, first = {}, {}
  for label, function in functions.items():
    began = time.perf_counter()
    results[label] = function()
    first[label] = time.perf_counter() - began
  nats, stderr = results['batched']
  np.testing.assert_allclose(nats, results['loop'], rtol=1e-4)
  relative = np.mean(stderr / -nats)
  print(f'{name}: standard error of both {relative:.2%}')
  warm = alternate(functions, rounds)
  for label, seconds in ('compiled', warm), ('first call', first):
    fast, slow = (REQUESTS / seconds[function] for function in functions)
    print(
      f'{name}, {label}: batched {fast:.2f} requests/s, loop {slow:.2f} '
      f'requests/s, ratio {fast / slow:.2f}',
      flush=True,
    )


@jax.jit
def forward(params, tokens, canvas):
  """Returns the log-probability of each token, [B, L]."""
  model = transformer.bind(MODEL, params)
  hidden = model(canvas, masks.bidirectional(jnp.ones(canvas.shape, bool)))
  logits = model.logits(hidden).at[..., MASK_ID].set(-jnp.inf)
  log_probs = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0]


def one_request(params, prompt, answer, estimator, seed):
  """Returns the Monte Carlo bound of one request, in plain code."""
  tokens = np.concatenate([prompt, answer]).astype(np.int32)
  drawn = estimators.draw(estimator, len(answer), np.random.default_rng(seed))
  total = 0.0
  for start in range(0, SAMPLES, COPIES):
    masked = drawn.masked[start : start + COPIES]
    rows = np.tile(tokens, (COPIES, 1))
    masked_rows = rows.copy()
    masked_rows[:, len(prompt) :][masked] = MASK_ID
    log_probs = np.asarray(forward(params, rows, masked_rows))[:, len(prompt) :]
    sums = np.where(masked, log_probs, 0).sum(axis=1)
    total += drawn.weight[start : start + COPIES] @ sums
  return total / SAMPLES


def standard_errors(workdir):
  """Prints the standard error after 128 forward passes, by estimator."""
  config, tokenizer, params, devices = load.load(workdir)
  (dataset, *_) = inputs.open_data(config, tokenizer)
  rows = next(inputs.heldout_batches(config, dataset, devices))
  batch = np.asarray(jax.device_get(rows.tokens))
  c = queries.likelihood_config(config, guidance=0.0, tokens_per_call=4096)
  for length, rows in ((64, 4), (256, 1)):
    tokens = batch[:rows, :length]
    if tokens.shape[1] < length:
      continue
    every = np.ones(tokens.shape, bool)
    print(f'{rows} rows of {length} tokens, nats per row:')
    for e in ESTIMATORS:
      many = Estimator(e.form, 512, e.strata, e.coupled)
      with jax.set_mesh(devices):
        value, stderr = bounds.bound(
          load.network(config, params),
          c,
          queries.Answers(tokens, every, every),
          many,
          range(rows),
        )
      # The mean is over 512 queries; report the error of a mean over 128.
      error = np.sqrt(np.mean(stderr**2) * many.samples / SAMPLES)
      print(
        f'  {e.form:9} strata {e.strata:2} {"coupled" * e.coupled:7}: '
        f'{value.mean():9.2f}, standard error {error:6.2f}',
        flush=True,
      )


if __name__ == '__main__':
  main()
