"""Likelihoods against recorded values, enumeration and plain loops."""

import dataclasses
import functools
import itertools
import math
import pathlib
import types

import fake_networks
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sampled
import tiny
from every_mask import (
  counts_from_zero,
  elbo,
  reference_counts,
  subsets,
)

from maskdiff.distributed import mesh
from maskdiff.errors import UserError
from maskdiff.evals import scored as scored_lib
from maskdiff.likelihood import bounds, estimators, queries
from maskdiff.likelihood.estimators import Estimator, Queries
from maskdiff.likelihood.queries import Answers, LikelihoodConfig
from maskdiff.model import masks, transformer
from maskdiff.objectives.table import OBJECTIVES
from maskdiff.sampling import layouts

MASK, BOS, VOCAB = 4, 1, tiny.MODEL.vocab_size
CONFIG = LikelihoodConfig(
  context=64,
  guidance=0.0,
  tokens_per_call=1024,
  loss_chunk_tokens=64,
)
GUIDED = dataclasses.replace(CONFIG, guidance=0.7)
FEW = Estimator(samples=16, strata=4)
PROMPTS = [[7, 8, 9], [10], [11, 12, 13, 14, 15], []]
ANSWERS = [[5, 9], [6, 7, 8, 9, 10], [20] * 20, [23, 22, 21]]


@pytest.fixture(scope='module')
def network():
  params = tiny.strong_params()
  return fake_networks.network(tiny.MODEL, params, mask_id=MASK, bos_id=BOS)


@pytest.fixture(scope='module')
def causal(network):
  return dataclasses.replace(network, objective='autoregressive')


@functools.partial(jax.jit, static_argnums=0)
def logits_of(labels, network, tokens):
  model = transformer.bind(network.config, network.params)
  shown = getattr(masks, labels)(jnp.ones(tokens.shape, bool))
  return model.logits(model(tokens, shown))


def log_p(network, row, answer, masked, guidance=0.0):
  """Returns log-probabilities of one row; guidance combines full logits.

  Args:
    network: Network.
    row: [L] tokens.
    answer: [L] bool.
    masked: [..., L] bool, sets of masked tokens.
    guidance: w.

  Returns:
    [..., L, V] float64.
  """

  def logits(masked):
    shown = np.where(masked, MASK, np.array(row)).reshape(-1, len(row))
    flat = np.array(logits_of('bidirectional', network, shown))
    return flat.reshape(*masked.shape, -1)

  result = logits(masked)
  if guidance:
    without = logits(masked | ~answer)
    result = without + (guidance + 1) * (result - without)
  result = result.astype(np.float64)
  result[..., MASK] = -np.inf
  return result - np.logaddexp.reduce(result, axis=-1, keepdims=True)


def enumerate_masks(network, row, answer, guidance=0.0):
  """Returns [2^A, A] log p of each answer token, by set of masked tokens."""
  row, where = np.array(row), np.flatnonzero(answer)
  sets = subsets(len(where))
  masked = np.zeros((len(sets), len(row)), bool)
  masked[:, where] = sets
  all_p = log_p(network, row, answer, masked, guidance)
  return all_p[:, where, row[where]]


def by_order(table):
  """Returns all A! orders, and the log-likelihood of each."""
  size = table.shape[1]
  orders = np.array(list(itertools.permutations(range(size))))
  bits = 1 << orders
  masked = bits[:, ::-1].cumsum(axis=1)[:, ::-1]  # as bits, at each step
  return orders, table[masked, orders].sum(axis=1)


def one_row(prompt, answer):
  return bounds.lay_out([prompt], [answer])


# Recorded likelihoods of LLaDA, SMDM and ESPO

IDS = {'model_a': 510, 'model_b': 297}


@pytest.fixture(scope='module', params=IDS)
def golden(request):
  """Returns name, (network, settings) and recorded arrays of a model."""
  name = request.param
  model_config, weights = golden_models.load(name)
  with np.load(golden_models.GOLDEN / 'likelihood.npz') as file:
    arrays = {
      key.removeprefix(f'{name}.'): file[key]
      for key in file
      if key.startswith(name)
    }

  network = fake_networks.network(
    model_config, weights, predict_mask=True, mask_id=IDS[name]
  )

  def guided(guidance):
    c = dataclasses.replace(
      CONFIG, guidance=float(guidance), tokens_per_call=256
    )
    return network, c

  return name, guided, arrays


def golden_values(network, prompts, answers, drawn):
  """Returns the values of given queries."""
  rows = queries.rows_of(*network, bounds.lay_out(prompts, answers))
  return queries.evaluate(*network, rows, lambda i: drawn[i])


@pytest.mark.parametrize('cases', [(0, 1, 3), (2,)], ids=['plain', 'guided'])
def test_log_likelihoods_equal_llada_for_its_masks(golden, cases):
  _, network, arrays = golden
  of = lambda field: [arrays[f'mc{i}.{field}'] for i in cases]
  drawn = []
  for k, batch, ranks in zip(
    of('k'), of('batch_size'), of('perms'), strict=True
  ):
    size = ranks.shape[-1]
    counts = [reference_counts(int(one), size, int(batch)) for one in k]
    drawn.append(
      estimators.exact_count(
        np.concatenate(counts), ranks.reshape(-1, size), coupled=False
      )
    )
  network = network(of('cfg_scale')[0])
  found = golden_values(network, of('prompt'), of('answer'), drawn)
  for value, loss, whole in zip(
    found, of('batch_loss'), of('log_likelihood'), strict=True
  ):
    assert abs(value.mean() - whole) < 2e-4
    np.testing.assert_allclose(
      -value.reshape(len(loss), -1).mean(axis=1), loss, atol=2e-4
    )


def test_masks_equal_llada_for_its_ranks(golden):
  _, _, arrays = golden
  ranks, noisy = arrays['mc0.perms'], arrays['mc0.noisy']
  size = ranks.shape[-1]
  for k, of_batch, shown in zip(arrays['mc0.k'], ranks, noisy, strict=True):
    counts = reference_counts(int(k), size, len(of_batch))
    masked = estimators.exact_count(counts, of_batch, coupled=False).masked
    np.testing.assert_array_equal(
      np.where(masked, IDS[golden[0]], arrays['mc0.answer']), shown[:, -size:]
    )


@pytest.mark.parametrize('case', [0, 1, 2])
def test_left_to_right_equals_smdm(golden, case):
  _, network, arrays = golden
  of = lambda field: arrays[f'chain{case}.{field}']
  value, error = bounds.left_to_right(
    *network(of('cfg_scale')), one_row(of('prefix'), of('target'))
  )
  assert abs(value[0] + of('nll')) < 2e-4
  assert error[0] == 0


@pytest.mark.parametrize('case', [0, 1, 2])
def test_greedy_check_equals_llada(golden, monkeypatch, case):
  """The tokens are also committed in the same order."""
  _, network, arrays = golden
  of = lambda field: arrays[f'greedy{case}.{field}']
  seen = []

  def predict(*arguments):
    seen.extend(m for i, _, m, _ in arguments[-1] if i == 0)
    return inner(*arguments)

  inner = queries.predict
  monkeypatch.setattr(queries, 'predict', predict)
  targets = of('target')
  right = bounds.greedy_matches(
    *network(of('cfg_scale')),
    bounds.lay_out([of('prefix')] * len(targets), targets),
  )
  np.testing.assert_array_equal(right, of('result'))
  masked = [set(np.flatnonzero(m)) for m in seen] + [set()]
  order = [a - b for a, b in itertools.pairwise(masked)]
  assert order == [{i} for i in of('commit_order')]


@pytest.mark.parametrize('case', range(8))
def test_every_mask_and_order_equals_recorded_values(case):
  """Compares log-probabilities under every mask, the bound, the marginal."""
  model_config, weights = golden_models.load('model_a')
  network = fake_networks.network(
    model_config, weights, predict_mask=True, mask_id=IDS['model_a']
  )
  network = network, dataclasses.replace(CONFIG, tokens_per_call=1024)
  with np.load(golden_models.GOLDEN / 'likelihood.npz') as file:
    of = lambda field: file[f'model_a.enum{case}.{field}']
    prompt, answer, recorded = of('prompt'), of('answer'), of('token_logp')
    bound, marginal = of('elbo'), of('log_marginal_random_order')
  masked = subsets(len(answer))
  row, token = np.nonzero(masked)
  one_by_one = Queries(
    masked[row], np.eye(len(answer), dtype=bool)[token], np.ones(len(row))
  )
  (found,) = golden_values(network, [prompt], [answer], [one_by_one])
  np.testing.assert_allclose(found, recorded[row, token], atol=2e-4)
  orders = np.array(list(itertools.permutations(range(len(answer)))))
  (found,) = bounds.chain_rule(*network, one_row(prompt, answer), [orders])
  assert abs(found.mean() - bound) < 2e-4
  mean_exp = np.logaddexp.reduce(found) - np.log(len(found))
  assert abs(mean_exp - marginal) < 2e-4


def espo(golden, case, draw):
  """Returns estimates for ESPO's counts and permutations, and recorded ones.

  Args:
    golden: the fixture.
    case: number of the recorded case.
    draw: from the counts [n], which lie in 0..L, and ranks [n, L] of a row to
      Queries.
  """
  name, network, _ = golden
  with np.load(golden_models.GOLDEN / 'espo.npz') as file:
    of = lambda field: file[f'{name}.elbo{case}.{field}']
    ids, ks, ranks, recorded = of('ids'), of('k'), of('perms'), of('elbo')
    start, coupled, noisy = int(of('prompt_len')), of('coupled'), of('noisy')
  rows, size = len(ids), ids.shape[1] - start
  counts = [reference_counts(int(k), size + 1, rows) for k in ks]
  counts = np.array(counts) % (size + 1)
  drawn = [draw(counts[:, j], ranks[:, j]) for j in range(rows)]
  for j, some in enumerate(drawn):
    np.testing.assert_array_equal(some.masked, noisy[:, j, start:] == IDS[name])
  found = golden_values(
    network(0), list(ids[:, :start]), list(ids[:, start:]), drawn
  )
  return [v.mean() for v in found], recorded, bool(coupled)


@pytest.mark.parametrize('case', [0, 1])
def test_coupled_estimates_equal_espo(golden, case):
  draw = functools.partial(estimators.exact_count, coupled=True)
  found, recorded, coupled = espo(golden, case, draw)
  assert coupled
  np.testing.assert_allclose(found, recorded, atol=2e-4)


def test_uncoupled_estimates_equal_espo(golden):
  """Without complements, ESPO's counts also start from 0, weight (L + 1) / l.

  This estimate is unbiased, but the package does not offer it: one draw in
  L + 1 masks nothing, as in a row of model_a, and has value 0 for any network.
  tests/likelihood/test_estimators.py measures the variance that this adds.
  """
  found, recorded, coupled = espo(golden, 2, counts_from_zero)
  assert not coupled
  np.testing.assert_allclose(found, recorded, atol=2e-4)
  assert (recorded == 0).sum() == {'model_a': 1, 'model_b': 0}[golden[0]]


# Bounds


SHORT_PROMPT = [7, 8, 9]
SHORT_ANSWERS = [[9, 5, 20, 8, 6, 7][:size] for size in range(1, 7)]


@pytest.fixture(scope='module')
def exact_bounds(network):
  """Returns a function from guidance to the bounds of SHORT_ANSWERS."""

  @functools.cache
  def exact(guidance):
    result = []
    for answer in SHORT_ANSWERS:
      row = SHORT_PROMPT + answer
      scored = np.arange(len(row)) >= len(SHORT_PROMPT)
      result.append(elbo(enumerate_masks(network, row, scored, guidance)))
    return result

  return exact


@pytest.mark.parametrize('coupled', [False, True])
@pytest.mark.parametrize('form', estimators.FORMS)
@pytest.mark.parametrize('c', [CONFIG, GUIDED], ids=['plain', 'guided'])
def test_bound_equals_enumeration_to_three_standard_errors(
  network, exact_bounds, c, form, coupled
):
  """Answers of one to six tokens are estimated in one call of `bound`."""
  value, error = bounds.bound(
    network,
    c,
    bounds.lay_out([SHORT_PROMPT] * len(SHORT_ANSWERS), SHORT_ANSWERS),
    Estimator(form, 8192, 4, coupled),
    range(len(SHORT_ANSWERS)),
  )
  exact = exact_bounds(c.guidance)
  assert (np.abs(value - exact) <= 3 * error + 1e-4).all()


def test_one_token_answer_has_no_error(network):
  value, error = bounds.bound(network, CONFIG, one_row([7, 8], [9]), FEW, [0])
  exact = log_p(network, [7, 8, 9], None, np.array([False, False, True]))[2, 9]
  np.testing.assert_allclose(value, exact, rtol=1e-5)
  assert error[0] < 1e-12


def test_single_group_has_unknown_error(network):
  one = Estimator(samples=16, strata=16)
  _, error = bounds.bound(network, CONFIG, one_row([7, 8], [9, 10]), one, [0])
  assert np.isnan(error).all()


def test_any_part_of_a_row_can_be_scored(network):
  """Tokens before and after the answer are never masked."""
  row = [7, 8, 9, 10, 11, 12]
  answer = np.array([False, True, False, True, True, False])
  answers = Answers(np.array([row]), answer[None], np.ones((1, 6), bool))
  table = enumerate_masks(network, row, answer)
  orders, exact = by_order(table)
  (found,) = bounds.chain_rule(network, CONFIG, answers, [orders])
  np.testing.assert_allclose(found, exact, rtol=1e-5)
  value, error = bounds.bound(
    network, CONFIG, answers, Estimator(samples=4096), [0]
  )
  assert abs(value[0] - elbo(table)) <= 3 * error[0]


@pytest.mark.parametrize('c', [CONFIG, GUIDED], ids=['plain', 'guided'])
def test_line_with_suffix_equals_enumeration(network, c, tmp_path):
  """Compares a line of a file with the enumeration given prompt and suffix."""
  path = tmp_path / 'gap.jsonl'
  path.write_text('{"prompt": "bc", "answer": "hjm", "suffix": "dpk"}\n')
  letters = types.SimpleNamespace(
    encode=lambda text: [ord(x) - 92 for x in text]
  )
  row = np.array(letters.encode('bchjmdpk'))
  answer = np.isin(np.arange(8), [2, 3, 4])
  exact = elbo(enumerate_masks(network, row, answer, c.guidance))
  orders = np.array(list(itertools.permutations(range(3))))

  def all_orders(answers, seeds):
    (found,) = bounds.chain_rule(network, c, answers, [orders])
    return bounds.Estimate(found.mean(keepdims=True), np.zeros(1))

  def by_chance(answers, seeds):
    e = Estimator(samples=8192, strata=4)
    return bounds.bound(network, c, answers, e, seeds)

  lines = scored_lib.read(str(path), 'bound')
  (found,), _ = scored_lib.bound(lines, letters, c.context, all_orders)
  assert found['nats'] == pytest.approx(-exact, rel=1e-5)
  (found,), _ = scored_lib.bound(lines, letters, c.context, by_chance)
  assert abs(found['nats'] + exact) <= 4 * found['stderr_nats']
  # Without the suffix the bound would differ.
  alone = elbo(enumerate_masks(network, row[:5], answer[:5], c.guidance))
  assert abs(exact - alone) > 1


@pytest.mark.parametrize('c', [CONFIG, GUIDED], ids=['plain', 'guided'])
def test_chain_rule_equals_a_plain_loop(network, c):
  prompt, answer, order = [7, 8, 9], [10, 20, 5, 6], [2, 0, 3, 1]
  row = np.array(prompt + answer)
  scored, masked = np.arange(7) >= 3, np.arange(7) >= 3
  total = 0
  for j in order:
    step = log_p(network, row, scored, masked, c.guidance)
    total += step[3 + j, row[3 + j]]
    masked = masked & (np.arange(7) != 3 + j)
  (found,) = bounds.chain_rule(
    network, c, one_row(prompt, answer), [np.array([order])]
  )
  np.testing.assert_allclose(found, [total], rtol=1e-5)


def importance_weighted(exact, k):
  """Returns the expected bound of K orders, a sum over all multisets of K."""
  total = 0.0
  for drawn in itertools.combinations_with_replacement(range(len(exact)), k):
    counts = np.bincount(drawn, minlength=len(exact))
    ways = math.factorial(k) / math.prod(map(math.factorial, counts.tolist()))
    value = np.logaddexp.reduce(exact[list(drawn)]) - np.log(k)
    total += ways / len(exact) ** k * value
  return total


def test_more_orders_tighten_the_importance_weighted_bound(network):
  """Means equal the enumeration over all draws of K of the 6 orders.

  The means stay below the marginal. docs/likelihood.md lists the values.
  """
  prompt, answer, seeds = [7, 8], [9, 5, 20], 300
  row = prompt + answer
  table = enumerate_masks(network, row, np.arange(5) >= 2)
  _, exact = by_order(table)
  marginal = np.logaddexp.reduce(exact) - np.log(len(exact))
  expected = {k: importance_weighted(exact, k) for k in (1, 4, 16)}
  assert expected[1] == pytest.approx(elbo(table))
  assert expected[1] < expected[4] < expected[16] < marginal
  page = pathlib.Path(__file__).parents[2] / 'docs' / 'likelihood.md'
  figures = [*expected.values(), marginal]
  assert f'| {" | ".join(f"{x:.2f}" for x in figures)} |' in page.read_text()
  for k, mean in expected.items():
    found = bounds.multi_sample(
      network,
      CONFIG,
      bounds.lay_out([prompt] * seeds, [answer] * seeds),
      k,
      range(seeds),
    ).log_likelihood
    assert abs(found.mean() - mean) < 3 * found.std(ddof=1) / seeds**0.5
  many, error = bounds.multi_sample(
    network, CONFIG, one_row(prompt, answer), 4000, [0]
  )
  assert abs(many[0] - marginal) < 3 * error[0]
  with pytest.raises(UserError, match='num_orders=0'):
    bounds.multi_sample(network, CONFIG, one_row([7], [8]), 0, [0])


def test_corpus_sums_answers():
  estimate = bounds.Estimate(np.array([-3.0, -5.0]), np.array([0.3, 0.4]))
  whole = bounds.corpus(estimate, num_tokens=4, num_bytes=16)
  assert whole == pytest.approx(
    {
      'nats_per_token': 2.0,
      'stderr_nats_per_token': 0.125,
      'perplexity': np.exp(2.0),
      'bits_per_byte': 0.5 / np.log(2),
    }
  )


# The greedy check


@pytest.fixture(scope='module')
def decoded():
  """Returns greedy continuations by the sampler, of 6 tokens each.

  No prompt is empty, because all positions of an all-masked row tie.
  """

  def sample(network):
    left_to_right = OBJECTIVES[network.objective].left_to_right
    c = dict(
      steps=6,
      block_length=1 if left_to_right else network.block_length or 6,
      temperature=0.0,
      remasking='low_confidence',
    )
    if network.window_length:  # one token per step
      c |= dict(remasking='longest_prefix', threshold=1.0)
    request = layouts.continue_prompts(PROMPTS[:3], 6)
    out = sampled.generate(network, c, request)
    return out[request.fill].reshape(3, 6).tolist()

  return sample


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_greedy_check_accepts_only_the_sampled_text(
  network, decoded, objective
):
  block_length = 3 if OBJECTIVES[objective].by_blocks else 0
  network = dataclasses.replace(
    network,
    objective=objective,
    block_length=block_length,
    window_length=3 if OBJECTIVES[objective].windows else 0,
  )
  answers = decoded(network)
  wrong = [list(answer) for answer in answers]
  for i, answer in enumerate(wrong):
    answer[i] = 5 if answer[i] != 5 else 6
  right = bounds.greedy_matches(
    network, CONFIG, bounds.lay_out(PROMPTS[:3] * 2, answers + wrong)
  )
  assert right.tolist() == [True] * 3 + [False] * 3


def test_greedy_check_sees_text_on_both_sides(network):
  """Compares with a plain loop that commits the most confident token first."""
  row = np.array([7, 8, 0, 0, 0, 11, 12])
  answer = np.isin(np.arange(7), [2, 3, 4])
  masked = answer.copy()
  while masked.any():
    step = np.where(masked[:, None], log_p(network, row, answer, masked), -9e9)
    where = step.max(axis=1).argmax()
    row[where], masked[where] = step[where].argmax(), False
  wrong = row + (np.arange(7) == 3) * (1 if row[3] < VOCAB - 1 else -1)
  answers = Answers(
    np.array([row, wrong]), np.tile(answer, (2, 1)), np.ones((2, 7), bool)
  )
  right = bounds.greedy_matches(network, CONFIG, answers)
  assert right.tolist() == [True, False]


# Rows together


ROWS = bounds.lay_out(PROMPTS, ANSWERS)


@pytest.mark.parametrize('c', [CONFIG, GUIDED], ids=['plain', 'guided'])
def test_bound_does_not_depend_on_other_rows(network, c):
  seeds = [3, 4, 5, 6]
  together = bounds.bound(network, c, ROWS, FEW, seeds)
  for i in range(4):
    alone = bounds.bound(
      network, c, one_row(PROMPTS[i], ANSWERS[i]), FEW, [seeds[i]]
    )
    for whole, part in zip(together, alone, strict=True):
      np.testing.assert_allclose(whole[i], part[0], rtol=1e-5, atol=1e-6)


def test_seed_determines_the_masked_tokens(network):
  three = bounds.lay_out([PROMPTS[1]] * 3, [ANSWERS[1]] * 3)
  value = bounds.bound(network, CONFIG, three, FEW, [7, 7, 8])
  a, b, c = value.log_likelihood
  assert a == b != c


def test_padding_has_no_influence(network):
  row = one_row(PROMPTS[2], ANSWERS[2])
  plain = bounds.bound(network, CONFIG, row, FEW, [0])
  pad = lambda x, value: np.pad(x, ((0, 0), (9, 5)), constant_values=value)
  padded = Answers(*map(pad, row, (MASK, False, False)))
  found = bounds.bound(network, CONFIG, padded, FEW, [0])
  np.testing.assert_array_equal(found, plain)


def test_tokens_on_padding_have_no_influence(network):
  """Calls the compiled function with other tokens on the padding."""
  call = queries.Call(
    tokens=np.full((4, 16), 9, np.int32),
    valid=np.arange(16) < np.array([[7], [16], [8], [9]]),
    prompt=np.arange(16) < np.full((4, 1), 3),
    masked=np.isin(np.arange(16), [3, 5, 6]) & np.ones((4, 1), bool),
    scored=np.isin(np.arange(16), [3, 5, 6]) & np.ones((4, 1), bool),
  )
  other = call._replace(tokens=np.where(call.valid, call.tokens, 17))
  for c in (CONFIG, GUIDED):
    (found,), (again,) = (
      queries._log_probs(network, c, x) for x in (call, other)
    )
    np.testing.assert_array_equal(found, again)
    assert (np.asarray(found) != 0).tolist() == call.scored.tolist()


def test_bound_on_a_mesh_equals_one_device(network):
  rows = bounds.lay_out(PROMPTS[:2], ANSWERS[:2])
  devices = mesh.make_mesh()
  shardings = mesh.param_shardings(
    devices, transformer.axes(tiny.MODEL), transformer.shapes(tiny.MODEL)
  )
  split = dataclasses.replace(
    network, params=jax.device_put(network.params, shardings)
  )

  def both(network):
    return (
      *bounds.bound(network, GUIDED, rows, FEW, range(2)),
      bounds.greedy_matches(network, GUIDED, rows),
    )

  with jax.set_mesh(devices):
    found = both(split)
  np.testing.assert_allclose(found, both(network), rtol=1e-5, atol=1e-5)


def test_padded_lengths_are_few():
  lengths = {queries.padded_length(n) for n in range(1, 4097)}
  assert len(lengths) == 17
  assert max(lengths) == 4096
  assert {16, 24, 32, 48, 192, 3072} < lengths
  assert all(n <= queries.padded_length(n) for n in range(1, 4097))
  assert all(queries.padded_length(n) < 1.5 * n for n in range(16, 4097))


def test_many_rows_compile_few_shapes(network):
  """The shapes are fewer than the distinct lengths or numbers of queries."""
  random = np.random.default_rng(0)
  sizes = random.integers(1, 28, 40)
  rows = bounds.lay_out(
    [[7] * int(n) for n in random.integers(1, 28, 40)],
    [[8] * int(n) for n in sizes],
  )
  before = queries._log_probs._cache_size()
  bounds.bound(network, CONFIG, rows, FEW, range(40))
  assert queries._log_probs._cache_size() - before <= 6


def test_equal_masks_are_computed_once(network, monkeypatch):
  computed = []

  def count(network, c, call):
    computed.append(call.scored.any(axis=1).sum())
    return inner(network, c, call)

  inner = queries._log_probs
  monkeypatch.setattr(queries, '_log_probs', count)
  many = Estimator(samples=1024)
  bounds.bound(network, CONFIG, one_row([7], [8, 9, 10]), many, [0])
  assert sum(computed) == 2**3 - 1


# Autoregressive networks


def test_left_to_right_network_needs_one_query(causal):
  value, error = bounds.bound(causal, CONFIG, ROWS, FEW, range(4))
  exact = bounds.chain_rule(causal, CONFIG, ROWS)
  np.testing.assert_array_equal(value, np.concatenate(exact))
  assert not error.any()
  rows = [[BOS, *p, *a] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
  length = max(map(len, rows))
  padded = np.array([row + [0] * (length - len(row)) for row in rows])
  logits = np.array(logits_of('causal', causal, padded), float)
  logits[..., MASK] = -np.inf
  all_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
  for i, row in enumerate(rows):
    next_p = all_p[i, np.arange(len(row) - 1), row[1:]]
    total = next_p[len(PROMPTS[i]) :].sum()
    np.testing.assert_allclose(value[i], total, rtol=1e-5)


# Refusals


ROW = [[5, 6, 7, 8]]
END = [[False, False, True, True]]
ALL = [[True] * 4]
REFUSED = {
  'mask': (
    CONFIG,
    [[5, MASK, 7, 8]],
    END,
    ALL,
    'row 0: token 1 is the mask token',
  ),
  'long': (
    dataclasses.replace(CONFIG, context=3),
    *(ROW, END, ALL, 'row 0.*4 tokens together.* had 3'),
  ),
  'no_answer': (CONFIG, ROW, [[False] * 4], ALL, 'row 0 has no answer'),
  'answer_on_padding': (CONFIG, ROW, END, [[True] * 3 + [False]], 'padding'),
  'all_padding': (CONFIG, ROW, END, [[False] * 4], 'row 0 has no answer'),
  'vocabulary': (CONFIG, [[5, 6, 7, VOCAB]], END, ALL, r'lie in \[0, 24\)'),
  'negative': (CONFIG, [[5, -1, 7, 8]], END, ALL, r'lie in \[0, 24\)'),
  'shapes': (CONFIG, ROW, [[True] * 3], ALL, r'\(1, 4\), answer \(1, 3\)'),
  'causal_gap': (
    CONFIG,
    *(ROW, [[False, True, False, True]], ALL, 'text follows the answer'),
  ),
  'causal_guidance': (
    dataclasses.replace(CONFIG, guidance=0.5),
    *(ROW, END, ALL, 'guidance=0.5'),
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_invalid_rows_are_refused(network, case):
  c, *fields, message = REFUSED[case]
  answers = Answers(*map(np.array, fields))
  if case.startswith('causal'):
    network = dataclasses.replace(network, objective='autoregressive')
  for function, rest in (
    (bounds.bound, (FEW, [0])),
    (bounds.chain_rule, ()),
    (bounds.greedy_matches, ()),
    (bounds.multi_sample, (2, [0])),
  ):
    with pytest.raises(UserError, match=message):
      function(network, c, answers, *rest)


def test_empty_prompt_gives_the_unconditional_bound(network):
  """Guidance changes nothing, since there is no prompt to mask."""
  table = enumerate_masks(network, [9, 5, 20], np.ones(3, bool))
  for c in (CONFIG, GUIDED):
    value, error = bounds.bound(
      network, c, one_row([], [9, 5, 20]), Estimator(samples=4096), [0]
    )
    assert abs(value[0] - elbo(table)) <= 3 * error[0] + 1e-4


def test_no_rows_are_allowed(network):
  none = bounds.lay_out([], [])
  value, error = bounds.bound(network, CONFIG, none, FEW, [])
  assert len(value) == len(error) == 0
  assert len(bounds.greedy_matches(network, CONFIG, none)) == 0


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_non_finite_log_probabilities_are_refused(network, value):
  params = network.params
  params = params | {'norm': params['norm'].at[3].set(value)}
  broken = dataclasses.replace(network, params=params)
  message = 'row 0: a log-probability is not finite'
  row = one_row([7, 8], [9, 10])
  with pytest.raises(UserError, match=message):
    bounds.bound(broken, CONFIG, row, FEW, [0])
  with pytest.raises(UserError, match=message):
    bounds.greedy_matches(broken, CONFIG, row)


@pytest.mark.parametrize('order', [[0, 0, 1], [0, 1], [1, 2, 3]])
def test_order_must_be_a_permutation(network, order):
  row = one_row([7, 8], [9, 10, 11])
  with pytest.raises(
    UserError, match='row 0: an order must name each of the 3'
  ):
    bounds.chain_rule(network, CONFIG, row, [np.array([order])])


def test_left_to_right_network_refuses_orders(causal):
  with pytest.raises(UserError, match='one order only'):
    bounds.chain_rule(causal, CONFIG, one_row([7], [8]), [np.array([[0]])])
