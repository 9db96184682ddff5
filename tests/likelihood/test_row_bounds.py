"""Bounds of several networks: enumeration, dense gradients, shared masks."""

import dataclasses
import functools
import itertools
import re

import fake_networks
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from every_mask import elbo, subsets
from loss_cases import MESHES, array_sizes, assert_close, set_mesh

from maskdiff.errors import UserError
from maskdiff.likelihood import bounds, device_queries, row_bounds
from maskdiff.likelihood.device_queries import RowQueries
from maskdiff.likelihood.estimators import Estimator
from maskdiff.likelihood.queries import Answers, LikelihoodConfig
from maskdiff.model import masks, transformer

MASK, CHUNK = 4, 8
KEY = jax.random.key(3)
FEW = Estimator(samples=4, strata=2, coupled=True)
# Three answer tokens each: after a prompt, with a gap, before padding.
TOKENS = np.array(
  [[7, 8, 9, 10, 11, 5, 12], [6, 20, 21, 9, 22, 8, 13], [5, 6, 7, 8, 9, 0, 0]],
  np.int32,
)
VALID = np.arange(7) < np.array([7, 7, 5])[:, None]
ANSWER = np.zeros((3, 7), bool)
ANSWER[0, 4:], ANSWER[1, [0, 2, 3]], ANSWER[2, 2:5] = True, True, True
ANSWERS = Answers(TOKENS, ANSWER, VALID)
ROWS = np.arange(3, dtype=np.int32)


@pytest.fixture(scope='module')
def network():
  return fake_networks.network(tiny.MODEL, tiny.strong_params(), mask_id=MASK)


def perturbed(network):
  """Returns a network whose parameters differ slightly."""
  change = lambda x: x + 0.01 * jnp.cos(jnp.arange(x.size).reshape(x.shape))
  return dataclasses.replace(
    network, params=jax.tree.map(change, network.params)
  )


def log_p(network, answers, masked):
  """Returns the log-probability of each token, [B, L], from all logits."""
  model = transformer.bind(network.config, network.params)
  inputs = jnp.where(masked, MASK, answers.tokens)
  logits = model.logits(model(inputs, masks.bidirectional(answers.valid)))
  logits = logits.at[..., MASK].set(-jnp.inf)
  of_tokens = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(of_tokens, answers.tokens[..., None], -1)[..., 0]


def dense_log_p(network, answers, masked):
  """Returns `log_p` for n sets of masked tokens, [n, B, L]."""
  return jax.vmap(functools.partial(log_p, network, answers))(masked)


@pytest.fixture(scope='module')
def exact(network):
  """Returns the bounds of the rows, [3], enumerated over all masks."""
  sets = subsets(3)
  masked = np.zeros((len(sets), *ANSWER.shape), bool)
  masked[:, ANSWER] = np.tile(sets, (1, len(ANSWER)))
  all_p = jax.jit(dense_log_p)(network, ANSWERS, masked)
  return [
    elbo(np.array(all_p[:, i, ANSWER[i]], np.float64))
    for i in range(len(ANSWER))
  ]


@pytest.mark.parametrize('coupled', [False, True])
def test_mean_over_all_draws_equals_the_enumerated_bound(
  network, exact, coupled
):
  """Every count with every permutation, for all rows at once."""
  counts = np.arange(4 if coupled else 3)
  draws = list(itertools.product(counts, itertools.permutations(range(3))))
  # The middle of the part of (0, 1] that gives each count.
  times = [(count + 0.5) / len(counts) for count, _ in draws]
  times = np.tile(np.array(times, np.float32)[:, None], len(ROWS))
  noise = np.full((len(draws), *ANSWER.shape), 0.5, np.float32)
  ranks = np.array([ranks for _, ranks in draws])
  noise[:, ANSWER] = np.tile(ranks / 3, (1, len(ROWS)))
  queries = device_queries.exact_count(times, noise, ANSWER, coupled)
  (values,) = jax.jit(row_bounds.values, static_argnums=3)(
    (network,), ANSWERS, queries, CHUNK
  )
  assert values.shape == (len(draws) * (2 if coupled else 1), 3)
  np.testing.assert_allclose(values.mean(axis=0), exact, rtol=2e-6)


@functools.partial(jax.jit, static_argnums=(2, 3))
def loss_and_gradient(params, networks, e, loss, answers=ANSWERS, rows=ROWS):
  """Returns ((loss, [K, B] bounds), gradient by the first network)."""

  def of_params(params):
    policy = dataclasses.replace(networks[0], params=params)
    found = row_bounds.bound(
      (policy, *networks[1:]), answers, e, KEY, rows, CHUNK
    )
    return loss(found), found

  return jax.value_and_grad(of_params, has_aux=True)(params)


def ratio_loss(found):
  """Returns a loss of policy, sampling policy and reference, [3, B]."""
  policy, old, reference = found
  ratio = jnp.exp((policy - old) / 3)
  advantage = jnp.array([1.0, -0.5, 0.7])
  return -(ratio * advantage).sum() + 0.1 * ((policy - reference) ** 2).sum()


@pytest.mark.slow
def test_gradient_equals_that_of_dense_logits(network):
  others = (network, dataclasses.replace(network, params=tiny.strong_params()))
  policy = perturbed(network)
  (value, found), gradient = loss_and_gradient(
    policy.params, (policy, *others), FEW, ratio_loss
  )
  queries = device_queries.draw(FEW, ANSWER, KEY, ROWS)

  def dense(params):
    found = []
    for one in (dataclasses.replace(policy, params=params), *others):
      log_probs = dense_log_p(one, ANSWERS, queries.masked)
      sums = jnp.where(queries.scored, log_probs, 0).sum(axis=-1)
      found.append((queries.weight * sums).mean(axis=0))
    return ratio_loss(found), jnp.stack(found)

  expected = jax.jit(jax.value_and_grad(dense, has_aux=True))(policy.params)
  assert_close(((value, found), gradient), expected, 2e-5)


@pytest.mark.slow
def test_networks_with_equal_parameters_have_equal_values(network):
  """The ratio of the first inner step is exactly 1, sample by sample."""
  copy = jax.tree.map(lambda x: x + 0, network.params)
  other = dataclasses.replace(network, params=copy)
  queries = row_bounds.draw((network,), FEW, ANSWER, KEY, ROWS)
  of_both = jax.jit(row_bounds.values, static_argnums=3)(
    (network, other), ANSWERS, queries, CHUNK
  )
  assert of_both.shape == (2, 4, 3)
  np.testing.assert_array_equal(of_both[0], of_both[1])
  assert len(np.unique(of_both[0])) > 8
  # The same holds if one of them is differentiated.
  (_, found), _ = loss_and_gradient(
    network.params, (network, other, other), FEW, ratio_loss
  )
  np.testing.assert_array_equal(found[0], found[1])


def test_shared_masks_cancel_most_of_the_noise(network):
  """Differences of close networks vary much less than their bounds."""
  networks = network, perturbed(network)
  e = Estimator('bernoulli', 4, 1)
  queries = row_bounds.draw(networks, e, ANSWER, KEY, ROWS)
  first, second = jax.jit(row_bounds.values, static_argnums=3)(
    networks, ANSWERS, queries, CHUNK
  )
  spread = lambda x: x.std(axis=0, ddof=1).mean()
  assert spread(first - second) < spread(first) / 5


def test_log_probs_of_masked_prompts_equal_dense_ones(network):
  """As in diffu-GRPO: the whole answer and a part of the prompt are masked."""
  prompt = VALID & ~ANSWER
  some = prompt & (np.arange(7) % 2 == 0)
  masked = np.stack([ANSWER | some, ANSWER | prompt])
  queries = RowQueries(masked, np.stack([ANSWER, ANSWER]), np.ones((2, 3)))
  networks = network, perturbed(network)
  found = jax.jit(row_bounds.log_probs, static_argnums=3)(
    networks, ANSWERS, queries, CHUNK
  )
  expected = [jax.jit(dense_log_p)(n, ANSWERS, masked) for n in networks]
  assert_close(found, np.where(ANSWER, expected, 0))


def test_left_to_right_networks_have_their_exact_log_likelihood(network):
  causal = dataclasses.replace(network, objective='autoregressive')
  rows = [[7, 8, 9], [10]], [[5, 9], [6, 7, 8, 9]]
  answers = bounds.lay_out(*rows)
  c = LikelihoodConfig(
    context=8, guidance=0.0, tokens_per_call=64, loss_chunk_tokens=CHUNK
  )
  expected, _ = bounds.left_to_right(causal, c, answers)
  found = jax.jit(row_bounds.bound, static_argnums=(2, 5))(
    (causal,), answers, FEW, KEY, ROWS[:2], CHUNK
  )
  np.testing.assert_allclose(found, [expected], rtol=1e-6)


def test_networks_of_two_objectives_are_refused(network):
  causal = dataclasses.replace(network, objective='autoregressive')
  with pytest.raises(UserError, match='2 .autoregressive, masked_diffusion'):
    row_bounds.bound((network, causal), ANSWERS, FEW, KEY, ROWS, CHUNK)


def test_memory_does_not_grow_with_the_number_of_queries(network):
  """Only masks and numbers per token exist for all n queries."""
  n = 61  # a prime number, so that shapes with it are recognized
  jaxpr = jax.make_jaxpr(
    functools.partial(loss_and_gradient.__wrapped__, loss=lambda x: x.sum()),
    static_argnums=2,
  )(network.params, (network,), Estimator(samples=n, strata=1)).jaxpr
  sizes = {size for size in array_sizes(jaxpr) if size % n == 0}
  per_query = ANSWER.size
  assert n * per_query in sizes
  embed = tiny.MODEL.embed
  # Threefry computes several numbers per random bit.
  assert max(sizes) <= 4 * n * per_query < n * per_query * embed


def test_backward_pass_does_not_repeat_the_loss(network):
  """Three forward loops, and one backward loop of the first network."""
  lowered = loss_and_gradient.lower(
    network.params, (network, network, network), FEW, ratio_loss
  )
  text = lowered.compile().as_text()
  count = lambda name: len(re.findall(rf' dot\(.*op_name="[^"]*{name}', text))
  assert count('loss: logits') == 3 + 1
  assert count('loss: gradient of the head') == 1


@pytest.mark.slow
def test_estimate_and_gradient_do_not_depend_on_the_mesh(network):
  answers = Answers(
    *(np.tile(np.pad(x, ((0, 1), (0, 1))), (2, 1)) for x in ANSWERS)
  )
  policy, rows = perturbed(network), np.arange(8, dtype=np.int32)
  evaluate = lambda: loss_and_gradient(
    policy.params,
    (policy, network),
    FEW,
    preference_loss,
    answers,
    rows,
  )
  expected = evaluate()
  with set_mesh(MESHES['fsdp2_sequence2_tensor2']):
    found = evaluate()
  assert_close(found, expected, 2e-5)


def preference_loss(found):
  margin = found[0] - found[1]
  return jax.nn.softplus(margin[1::2] - margin[::2]).sum()
