"""A policy so small that its likelihoods and policy gradients are exact.

An answer has 4 slots and 3 tokens, so there are 81 answers, 16 masks and 24
orders. The policy is a Transformer of this package, trained by masked
diffusion. Its sampler fills the slots one at a time in a uniformly drawn order,
at temperature 1. Two rewards: `ring` is 1 if the tokens of neighbouring slots
differ, on a ring of slots, so the best token of a slot depends on the others;
`count` is the share of slots with token 0, so each slot has a best token.

All quantities follow from one array, the table of log-probabilities
T[x, m, j] = log p(token j of answer x | the tokens that mask m shows).

Letters in shapes: A answers; M masks; O orders; L slots.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maskdiff.model import transformer
from maskdiff.model.network import Network
from maskdiff.model.transformer import TransformerConfig
from maskdiff.objectives.table import show_masked
from maskdiff.rl.batch import Batch

LENGTH, TOKENS = 4, 3
BITS = 2 ** np.arange(LENGTH)
ANSWERS = np.array(list(itertools.product(range(TOKENS), repeat=LENGTH)))
ORDERS = np.array(list(itertools.permutations(range(LENGTH))))
# Row r masks the slots whose bits are set in r.
MASKS = (np.arange(2**LENGTH)[:, None] & BITS) > 0
REWARDS = {
  'ring': np.float32((np.roll(ANSWERS, 1, axis=1) != ANSWERS).all(axis=1)),
  'count': np.float32(ANSWERS == 0).mean(axis=1),
}
# Probabilities of the answers in the data of fine-tuning.
DATA = 0.4 * REWARDS['ring'] / REWARDS['ring'].sum() + 0.6 / len(ANSWERS)
NETWORK = Network(
  config=TransformerConfig(
    vocab_size=TOKENS + 1,
    embed=16,
    layers=1,
    heads=2,
    kv_heads=2,
    head_dim=8,
    mlp=16,
    tie_embeddings=False,
    rope_theta=1e4,
    norm_eps=1e-5,
    dtype='float32',
    remat='none',
    attention='xla',
  ),
  params=None,
  objective='masked_diffusion',
  predict_mask=False,
  mask_id=TOKENS,
  bos_id=-1,
)


def table(params):
  """Returns T, [A, M, L] float32 nats, of the parameters of NETWORK."""
  digits = itertools.product(range(TOKENS + 1), repeat=LENGTH)
  canvases = np.array(list(digits))
  model = transformer.bind(NETWORK.config, params)
  network = dataclasses.replace(NETWORK, params=params)
  shown = show_masked(
    network, canvases, canvases == TOKENS, np.ones(canvases.shape, bool)
  )
  log_p = jax.nn.log_softmax(model.logits(model(*shown))[..., :TOKENS])
  noisy = np.where(MASKS, TOKENS, ANSWERS[:, None])  # [A, M, L]
  index = noisy @ (TOKENS + 1) ** np.arange(LENGTH)[::-1]
  slots, tokens = np.arange(LENGTH), ANSWERS[:, None]
  return log_p[index[..., None], slots, tokens]


def orders(t):
  """Returns the log-likelihood of each answer in each order, [O, A]."""
  rank = np.argsort(ORDERS, axis=1)  # step at which a slot is filled
  before = (rank[:, None, :] >= rank[:, :, None]) @ BITS  # [O, L]
  # Advanced indices around a slice: [O, L, A].
  return t[:, before, np.arange(LENGTH)].sum(axis=2).T


def log_likelihood(t):
  """Returns log p(x) of the sampler with random orders, [A]."""
  return jax.nn.logsumexp(orders(t), axis=0) - math.log(len(ORDERS))


def bound(t):
  """Returns the ELBO of each answer, [A]: the mean over orders."""
  return orders(t).mean(axis=0)


def left_to_right(t):
  """Returns the log-likelihood of each answer from left to right, [A]."""
  return orders(t)[0]


def all_masked(t):
  """Returns the log-likelihood of tokens drawn all at once, [A]."""
  return t[:, -1].sum(axis=1)


def expected_reward(t, rewards, likelihood=log_likelihood):
  return jnp.exp(likelihood(t)) @ rewards


def divergence(t, other):
  """Returns KL(policy || other), of tables, in nats."""
  log_p = log_likelihood(t)
  return jnp.exp(log_p) @ (log_p - log_likelihood(other))


def gap(t):
  """Returns the mean of log p(x) - ELBO(x) over samples of the policy."""
  log_p = log_likelihood(t)
  return jnp.exp(log_p) @ (log_p - bound(t))


def entropy(t):
  log_p = log_likelihood(t)
  return -jnp.exp(log_p) @ log_p


def surrogate_gradient(t, rewards, score):
  """Returns the expected gradient by t of REINFORCE with a score, [A, M, L].

  sum over x of p(x) (R(x) - J) d score(x) / dt. With `log_likelihood` as score,
  it is the gradient of the expected reward.
  """
  p = jnp.exp(log_likelihood(t))
  weight = p * (rewards - p @ rewards)
  return jax.grad(lambda t: weight @ score(t))(t)


def sample(t, key, rows, in_order=False):
  """Samples answers, each in an order of its own.

  Args:
    t: table.
    key: PRNG key.
    rows: B.
    in_order: fill the slots from left to right.

  Returns:
    [B] int32, index of each answer; and Batch.
  """
  log_p = orders(t)[:1] if in_order else orders(t)
  drawn = jax.random.categorical(key, log_p.ravel(), shape=(rows,))
  order, x = jnp.divmod(drawn, len(ANSWERS))
  ones = jnp.ones((rows, LENGTH), bool)
  steps = jnp.asarray(np.argsort(ORDERS, axis=1), jnp.int32)[order]
  return x, Batch(jnp.asarray(ANSWERS)[x], ones, ones, ones, steps)


def random_params(scale):
  """Returns random weights; their predictions in several orders contradict."""
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(scale * random.normal(size=x.shape), jnp.float32),
    transformer.shapes(NETWORK.config),
  )


@functools.cache
def trained_params(steps=1000):
  """Returns weights trained on DATA with the exact bound as loss."""
  optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
  params = random_params(0.3)

  def step(carry, _):
    params, state = carry
    loss = lambda params: -(bound(table(params)) @ DATA)
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  carry = params, optimizer.init(params)
  return jax.jit(lambda c: jax.lax.scan(step, c, length=steps))(carry)[0][0]
