"""Trains the policy of enumerable.py with each method of policy optimization.

python benchmarks/policy_training.py --out FILE

A round samples 24 answers, 6 per group, and makes two inner steps. All methods
have the same number of forward passes: those of the sampler and those of the
policy in the loss. Passes of fixed policies are not counted. A training has two
learning rates of Adam and three seeds; the line has the mean over the seeds for
the rate with the better final reward. Methods named exact_... have no noise:
each of their 144 updates is the exact expectation of REINFORCE, whose score is
the log-likelihood, the bound, or the log-probability with all tokens masked.

The columns of a line, at 12 points of the training:

- expected_reward: exact. reward_error: standard error of the last one.
  left_to_right: that of a sampler that fills the slots from left to right.
- gap: mean of log-likelihood minus bound over samples of the policy, nats.
- entropy: of the policy, nats. kl: divergence from the start, nats.
- bound_cosine, all_masked_cosine: of the exact policy gradient and the expected
  gradient of REINFORCE with the bound, or with all tokens masked, as score.

Lines of the part `start` have these figures for untrained and trained policies.
"""

import argparse
import functools

import enumerable
import jax
import jax.numpy as jnp
import json_lines
import numpy as np
import optax
import policy_gradients
from enumerable import LENGTH, REWARDS
from jax.flatten_util import ravel_pytree
from policy_gradients import GROUP, ROWS, SETTINGS, batch_loss

from maskdiff.rl.advantages import advantages

SEEDS, RATES, INNER, POINTS = 3, (3e-3, 1e-2), 2, 12
FORWARDS, EXACT_ROUNDS = 24_000, 144
SCORES = {
  'exact_log_likelihood': enumerable.log_likelihood,
  'exact_bound': enumerable.bound,
  'exact_all_masked': enumerable.all_masked,
}


def case(method, changes=None, policy='trained', reward='ring', shared=True):
  """Returns the JSON values that identify a training."""
  return {
    'part': 'training',
    'method': method,
    'changes': changes or {},
    'policy': policy,
    'reward': reward,
    'shared': shared,
  }


def start_case(policy, reward='ring'):
  """Returns the JSON values that identify the exact figures of a start."""
  return {'part': 'start', 'policy': policy, 'reward': reward}


def start_cases():
  found = [start_case('trained', reward) for reward in REWARDS]
  return found + [start_case(f'random_{scale}') for scale in (0.3, 0.5, 0.7)]


def cases():
  """Returns all trainings."""
  found = [case(name) for name in SCORES]
  found += [case(name, policy='random_0.7') for name in SCORES]
  found += [case(name) for name in SETTINGS]
  found.append(case('tracerl', {'shrink': 1, 'copies': LENGTH}))
  found += [
    case('espo', policy='random_0.7'),
    case('espo', shared=False),
    case('espo', {'clip_low': 0.0, 'clip_high': 0.0}),
    case('espo', {'per_token': False}),
    case('espo', {'times': 1}),
    case('espo', {'times': 8}),
  ]
  for kl in ('k1', 'k2', 'k3'):
    found.append(case('espo', {'kl': kl, 'kl_weight': 0.1}))
  return found


def observe(params, first, rewards):
  """Returns the exact quantities of a policy; see the docstring above."""
  t, pull = jax.vjp(enumerable.table, params)
  exact, bound, all_masked = (
    ravel_pytree(pull(enumerable.surrogate_gradient(t, rewards, score)))[0]
    for score in SCORES.values()
  )
  size = jnp.linalg.norm
  cosine = lambda g: exact @ g / (size(exact) * size(g))
  return {
    'expected_reward': enumerable.expected_reward(t, rewards),
    'left_to_right': enumerable.expected_reward(
      t, rewards, enumerable.left_to_right
    ),
    'gap': enumerable.gap(t),
    'entropy': enumerable.entropy(t),
    'kl': enumerable.divergence(t, first),
    'bound_cosine': cosine(bound),
    'all_masked_cosine': cosine(all_masked),
  }


@jax.jit
def observe_all(params, first, rewards):
  """Calls `observe` for parameters with three leading axes."""
  function = lambda params: observe(params, first, rewards)
  return jax.vmap(jax.vmap(jax.vmap(function)))(params)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def train(name, s, shared, rounds, params, rewards, key, rate):
  """Returns the parameters at each point, with a leading axis of POINTS.

  Args:
    name: a key of SCORES or of rl.table.METHODS.
    s: Settings; None for exact gradients.
    shared: whether all policies see the same masks.
    rounds: rounds between two points.
    params: parameters at the start.
    rewards: [A].
    key: PRNG key of the training.
    rate: learning rate.
  """
  optimizer = optax.adam(rate)
  first = enumerable.table(params)
  vector, unravel = ravel_pytree(params)
  table = lambda vector: enumerable.table(unravel(vector))

  def update(carry, by_table):
    """Takes a function: table of the policy -> gradient of the loss by it."""
    vector, state = carry
    t, pull = jax.vjp(table, vector)
    updates, state = optimizer.update(pull(by_table(t))[0], state)
    return vector + updates, state

  def exact_round(carry, _):
    descent = lambda t: -enumerable.surrogate_gradient(t, rewards, SCORES[name])
    return update(carry, descent), None

  def sampled_round(carry, key):
    old = table(carry[0])
    sample_key, *mask_keys = jax.random.split(key, 1 + INNER)
    x, batch = enumerable.sample(old, sample_key, ROWS, name == 'justgrpo')
    a = advantages(rewards[x], GROUP, 'leave_one_out')

    def inner(carry, key):
      loss = batch_loss(name, s, shared, (old, first), x, batch, a, key)
      by_table = lambda t: jax.grad(loss, has_aux=True)(t)[0]
      return update(carry, by_table), None

    return jax.lax.scan(inner, carry, jnp.stack(mask_keys))[0], None

  def until_point(carry, key):
    keys = jax.random.split(key, rounds)
    round_ = sampled_round if s else exact_round
    carry, _ = jax.lax.scan(round_, carry, keys)
    return carry, unravel(carry[0])

  carry = vector, optimizer.init(vector)
  return jax.lax.scan(until_point, carry, jax.random.split(key, POINTS))[1]


def measure(values):
  """Returns the line of a training."""
  name = values['method']
  if name in SCORES:  # one update per round, without forward passes
    s, per_round, rounds = None, 0, EXACT_ROUNDS
  else:
    s = policy_gradients.settings(values)
    copies = policy_gradients.copies(name, s)
    per_round = ROWS * (LENGTH + INNER * copies)
    rounds = round(FORWARDS / per_round)
  params = policy_gradients.start(values['policy'])
  rewards = jnp.asarray(REWARDS[values['reward']])
  part = -(-rounds // POINTS)
  run = functools.partial(train, name, s, values['shared'], part)
  over_seeds = jax.vmap(run, in_axes=(None, None, 0, None))
  over_all = jax.vmap(over_seeds, in_axes=(None, None, None, 0))
  keys = jax.random.split(jax.random.key(2), SEEDS if s else 1)
  trained = over_all(params, rewards, keys, np.float32(RATES))
  first = jax.jit(enumerable.table)(params)
  seen = observe_all(trained, first, rewards)  # [rates, seeds, POINTS]
  final = np.array(seen['expected_reward'])[..., -1]
  best = final.mean(axis=1).argmax()
  error = final[best].std(ddof=1) / SEEDS**0.5 if s else 0.0
  curves = {
    key: np.float64(x)[best].mean(axis=0).round(5).tolist()
    for key, x in seen.items()
  }
  return values | {
    'rate': RATES[best],
    'rounds': part * POINTS,
    'forwards': part * POINTS * per_round,
    'reward_error': round(float(error), 5),
    **curves,
  }


def measure_start(values):
  """Returns the line of a policy before training."""
  params = policy_gradients.start(values['policy'])
  first = jax.jit(enumerable.table)(params)
  seen = jax.jit(observe)(params, first, REWARDS[values['reward']])
  return values | {key: round(float(x), 5) for key, x in seen.items()}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--out', help='file of results, to which lines are added')
  args = parser.parse_args()
  for function, found in (measure_start, start_cases()), (measure, cases()):
    for values in found:
      if not (args.out and json_lines.has(args.out, values)):
        json_lines.report([function(values)], args.out)


if __name__ == '__main__':
  main()
