"""Measures bias and noise of policy gradients where the exact one is known.

python benchmarks/policy_gradients.py --out FILE

Every case is a method of maskdiff/rl/table.py with its settings, on the policy
of enumerable.py. The mean and the variance of its gradient come from 512
batches of 24 answers, 6 of them per group. The gradient is compared with the
exact gradient of the expected reward, or of the divergence, by the parameters.
`policy_training.py` trains with each method. A line of results/ that has a case
is not computed again; policy_gradients_page.py writes the page. Both scripts
take about ten minutes on one core.

The columns of a line:

- cosine: of the mean gradient and the exact one, without the error of the mean;
  cosine_error: standard error.
- scale: length of the mean gradient along the exact one, divided by that of the
  exact one. error: norm of the difference of both, divided likewise.
- forwards: per answer, those of the sampler (one per slot) and of the loss.
- noise: standard deviation of an update of 1,000 forwards, divided by the norm
  of the mean gradient.
- clip_fraction: share of units without a gradient.
"""

import argparse
import functools
import math

import enumerable
import jax
import jax.numpy as jnp
import json_lines
import numpy as np
from enumerable import BITS, LENGTH, MASKS, NETWORK, REWARDS
from jax.flatten_util import ravel_pytree

from maskdiff.rl import policy_loss
from maskdiff.rl import table as methods
from maskdiff.rl.advantages import advantages
from maskdiff.rl.policy_loss import LogProbs
from maskdiff.rl.units import weigh

GROUP, ROWS, BATCHES, CHUNK = 6, 24, 512, 128
FORWARDS = 1000
# Entries of a table that belong to masked tokens.
IS_MASKED = np.broadcast_to(MASKS, (len(enumerable.ANSWERS), *MASKS.shape))
# Changes of published settings for answers of 4 slots. Divergences are measured
# separately.
SETTINGS = {
  'espo': {},
  'reinforce': {},
  'd1': {},
  'wd1': {'softmax_over': 'group', 'group': GROUP},
  'coupled_grpo': {},
  'spg': {'block_length': 2},
  'stable_drl': {'block_length': 2, 'times': 2},
  'random_masks': {'times': 4},
  'tracerl': {'shrink': 2, 'copies': 2},
  'tracerl_blocks': {'copies': LENGTH},
  'justgrpo': {'copies': LENGTH},
}


def case(part, method, moved=0.0, **values):
  """Returns the JSON values that identify a measurement.

  Args:
    part: the table of the page.
    method: key of rl.table.METHODS.
    moved: KL divergence, in nats, between the policy that sampled and the
      policy; it has moved along the exact gradient.
    **values: changes of settings (`changes`); policy; reward; whether the
      masks are `shared` between policy and others; `in_order`: the sampler
      fills slots from left to right; `advantages`: baseline and deviation;
      `target`: 'reward' or 'divergence'.
  """
  return {
    'part': part,
    'method': method,
    'moved': moved,
    'changes': {},
    'policy': 'trained',
    'reward': 'ring',
    'shared': True,
    'in_order': method == 'justgrpo',
    'advantages': ['leave_one_out', 'none'],
    'target': 'reward',
    **values,
  }


def cases():
  """Returns all cases; neighbours share a compiled program where they can."""
  found = []
  exact = {'shrink': 1, 'copies': LENGTH}
  for name, changes in [*((n, {}) for n in SETTINGS), ('tracerl', exact)]:
    for reward in REWARDS:
      found.append(case('methods', name, changes=changes, reward=reward))
    found.append(case('methods', name, 0.1, changes=changes))
  found.append(case('methods', 'justgrpo', in_order=False))
  for kl in ('k1', 'k2', 'k3'):
    changes = {'kl': kl, 'kl_weight': 1.0, 'kl_to': 'reference'}
    divergence = functools.partial(case, 'divergence', target='divergence')
    for times in (2, 16):
      found.append(divergence('espo', changes={**changes, 'times': times}))
    for name in ('tracerl_blocks', 'd1'):
      found.append(divergence(name, changes=changes))
  for times in (1, 4, 16):
    changes = {'times': times}
    for moved in (0.0, 0.1):
      found.append(case('masks', 'espo', moved, changes=changes))
    found.append(case('masks', 'espo', 0.1, changes=changes, shared=False))
    independent = {'times': 2 * times, 'coupled': False}
    found.append(case('masks', 'espo', changes=independent))
  for eps in (0.0, 4e-4, 0.02, 0.2, math.inf):
    clip = {'clip_low': eps, 'clip_high': eps}
    for per_token in (True, False):
      changes = {**clip, 'per_token': per_token}
      found.append(case('clip', 'espo', 0.1, changes=changes))
  for eps in (0.0, 0.2, math.inf):
    clip = {'clip_low': eps, 'clip_high': eps}
    found.append(case('clip', 'tracerl_blocks', 0.1, changes=clip))
  return found


def settings(values):
  s = {'kl_weight': 0.0, **SETTINGS[values['method']], **values['changes']}
  return methods.settings(values['method'], **s)


def at_queries(t, x, queries):
  """Returns log-probabilities of scored tokens [n, B, L], from a table."""
  found = t[x, queries.masked @ BITS]
  return jnp.where(queries.scored, found, 0)


def with_other_masks(t, x, queries, others):
  """Returns log-probabilities whose weighted sum is that for other masks.

  Those for the same masks are shifted by a constant per row, so that losses of
  whole answers see a bound that was estimated with other masks.
  """
  same = at_queries(t, x, queries)
  total = lambda values, q: weigh(values, q).sum(axis=(0, 2))
  weight = total(jnp.ones_like(same), queries)
  shift = total(at_queries(t, x, others), others) - total(same, queries)
  return same + (shift / weight)[:, None]


def batch_loss(name, s, shared, fixed, x, batch, a, key):
  """Returns the loss of a batch as a function of the table of the policy.

  Args:
    name: key of rl.table.METHODS.
    s: Settings.
    shared: whether all policies see the same masks.
    fixed: tables of the policy that sampled and of the reference.
    x: [B] int32, index of each answer.
    batch: Batch.
    a: [B] float32, advantages.
    key: PRNG key of the masks.

  Returns:
    function: table [A, M, L] -> (loss, metrics).
  """
  keys = jax.random.split(key, 3)
  numbers = jnp.arange(len(x))
  draw = lambda k: policy_loss.draw(name, NETWORK, s, batch, k, numbers)
  queries = draw(keys[0])
  if shared:
    values = [at_queries(t, x, queries) for t in fixed]
  else:
    values = [
      with_other_masks(t, x, queries, draw(k))
      for t, k in zip(fixed, keys[1:], strict=True)
    ]

  def loss(t):
    probs = LogProbs(at_queries(t, x, queries), *values)
    return policy_loss.loss(name, s, probs, queries, batch, a)

  return loss


def batch_gradient(name, s, v, new, old, reference, rewards, key):
  """Returns minus the gradient of a loss by the table `new`; clip fraction.

  Args:
    name: key of rl.table.METHODS.
    s: Settings.
    v: (shared, in_order, baseline, deviation, target), as in `case`.
    new: table [A, M, L] of the policy.
    old: table of the policy that samples.
    reference: table.
    rewards: [A].
    key: PRNG key of the batch.
  """
  shared, in_order, baseline, deviation, target = v
  sample_key, mask_key = jax.random.split(key)
  x, batch = enumerable.sample(old, sample_key, ROWS, in_order)
  a = advantages(rewards[x], GROUP, baseline, deviation)
  if target == 'divergence':
    a = jnp.zeros_like(a)
  loss = batch_loss(name, s, shared, (old, reference), x, batch, a, mask_key)
  (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(new)
  return -gradient, metrics['clip_fraction']


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def moments(name, s, v, tables, rewards, jacobian, exact):
  """Returns moments over batches of gradients g by the parameters.

  Args:
    name: see `batch_gradient`.
    s: see `batch_gradient`.
    v: see `batch_gradient`.
    tables: (new, old, reference).
    rewards: [A].
    jacobian: [masked entries of a table, P], of `new`.
    exact: [P].

  Returns:
    means of g, |g|^2, g @ exact, (g @ exact)^2 and of the clip fraction.
  """
  keys = jax.random.split(jax.random.key(1), (BATCHES // CHUNK, CHUNK))
  of_batch = lambda key: batch_gradient(name, s, v, *tables, rewards, key)

  def of_chunk(keys):
    by_table, clipped = jax.vmap(of_batch)(keys)
    g = by_table[:, IS_MASKED] @ jacobian
    along = g @ exact
    values = g, (g**2).sum(axis=1), along, along**2, clipped
    return [x.mean(axis=0) for x in values]

  return [x.mean(axis=0) for x in jax.lax.map(of_chunk, keys)]


def summary(found, exact, forwards):
  """Returns the columns of a line; see the docstring of this file."""
  mean, square, along, along_square, clipped = map(np.float64, found)
  size = np.linalg.norm(np.float64(exact))
  variance = (square - mean @ mean) * BATCHES / (BATCHES - 1)
  # The error of the mean adds to its norm; it is subtracted.
  less = variance / BATCHES
  norm = math.sqrt(max(mean @ mean - less, 0.0))
  deviation = math.sqrt(max(along_square - along**2, 0.0) / BATCHES) / size
  # A norm within its error is none: the mean gradient is 0.
  zero = norm**2 < less
  difference = np.float64(mean) - exact
  noise = math.sqrt(variance * ROWS * forwards / FORWARDS)
  ratio = lambda x, y: round(float(x / y), 5)
  return {
    'cosine': None if zero else ratio(along, size * norm),
    'cosine_error': None if zero else ratio(deviation, norm),
    'scale': ratio(along, size**2),
    'error': ratio(math.sqrt(max(difference @ difference - less, 0.0)), size),
    'forwards': forwards,
    'noise': None if zero else ratio(noise, norm),
    'clip_fraction': ratio(clipped, 1),
  }


# The Jacobian of a table is computed once per policy, row by row.
@jax.jit
def pull_back(params, by_table):
  """Returns gradients by the parameters [n, P] of n gradients by the table."""
  _, pull = jax.vjp(enumerable.table, params)
  return jax.lax.map(lambda g: ravel_pytree(pull(g))[0], by_table)


@functools.cache
def start(policy):
  """Returns the parameters of a policy: trained, or random_ and a scale."""
  if policy == 'trained':
    return enumerable.trained_params()
  return enumerable.random_params(float(policy.removeprefix('random_')))


@functools.cache
def moved_params(policy, reward, distance):
  """Moves a policy along the exact gradient, to KL(start || new) = distance."""
  params, table = start(policy), jax.jit(enumerable.table)
  if not distance:
    return params
  t, pull = jax.vjp(enumerable.table, params)
  (direction,) = pull(
    enumerable.surrogate_gradient(t, REWARDS[reward], enumerable.log_likelihood)
  )
  at = lambda step: jax.tree.map(lambda x, g: x + step * g, params, direction)
  low, high = 0.0, 1.0
  far = lambda step: enumerable.divergence(t, table(at(step))) > distance
  while not far(high):
    high *= 2
  for _ in range(20):
    middle = (low + high) / 2
    low, high = (low, middle) if far(middle) else (middle, high)
  return at(low)


@functools.cache
def policy_at(policy, reward, distance):
  """Returns table and Jacobian of a policy."""
  params = moved_params(policy, reward, distance)
  index = np.flatnonzero(IS_MASKED)
  rows = np.zeros((len(index), IS_MASKED.size), np.float32)
  rows[np.arange(len(index)), index] = 1
  jacobian = pull_back(params, rows.reshape(-1, *IS_MASKED.shape))
  return jax.jit(enumerable.table)(params), jacobian


@functools.partial(jax.jit, static_argnums=(0, 1))
def exact_gradient(target, in_order, new, reference, rewards, jacobian):
  """Returns the exact gradient by the parameters that a case estimates."""
  if target == 'divergence':
    # Gradients of batches are of minus the loss.
    g = -jax.grad(enumerable.divergence)(new, reference)
  else:
    likelihood = enumerable.log_likelihood
    if in_order:
      likelihood = enumerable.left_to_right
    g = jax.grad(enumerable.expected_reward)(new, rewards, likelihood)
  return g[IS_MASKED] @ jacobian


def measure(values):
  """Returns the line of a case."""
  s, key = settings(values), (values['policy'], values['reward'])
  target, in_order = values['target'], values['in_order']
  first, _ = policy_at(*key, 0.0)
  if target == 'divergence':
    new, jacobian = policy_at(*key, 0.1)
    tables = new, new, first
  else:
    new, jacobian = policy_at(*key, values['moved'])
    tables = new, first, first
  rewards = jnp.asarray(REWARDS[values['reward']])
  exact = exact_gradient(target, in_order, new, first, rewards, jacobian)
  v = (values['shared'], in_order, *values['advantages'], target)
  found = moments(values['method'], s, v, tables, rewards, jacobian, exact)
  return values | summary(found, exact, LENGTH + copies(values['method'], s))


@functools.cache
def copies(name, s):
  """Returns forward passes of the loss per answer."""
  _, batch = enumerable.sample(
    jnp.zeros(IS_MASKED.shape), jax.random.key(0), GROUP
  )
  drawn = jax.eval_shape(
    lambda key: policy_loss.draw(
      name, NETWORK, s, batch, key, jnp.arange(GROUP)
    ),
    jax.random.key(0),
  )
  return len(drawn.masked)


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', help='file of results, to which lines are added')
  args = parser.parse_args()
  for values in cases():
    if not (args.out and json_lines.has(args.out, values)):
      json_lines.report([measure(values)], args.out)


if __name__ == '__main__':
  main()
