"""Masked diffusion against LLaDA's losses and the enumeration of all masks."""

import dataclasses
import functools
import itertools
import math

import every_mask
import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from objective_cases import (
  CONFIG,
  EOS,
  MASK,
  TINY,
  TOKENS,
  L,
  canvas_of,
  enumerated_bound,
  expected_loss,
  log_probabilities,
  loss,
  make_canvas,
  nll_of,
  random_tokens,
  strong_params,
  without_mask,
)

from maskdiff.data.rows import Rows
from maskdiff.model import masks, transformer
from maskdiff.objectives import canvas as canvas_lib
from maskdiff.objectives import masked_diffusion, table
from maskdiff.objectives.schedule import SCHEDULES, Schedule


@pytest.fixture(scope='module')
def params():
  return strong_params(TINY)


# Golden files of LLaDA's pretraining loss

CASES = (
  'normal',
  'truncated',
  'row_without_mask',
  'batch_without_mask',
  'boundary',
  'repeat_tokens',
)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss_per_token(c, config, params, tokens, u, noise, lengths):
  def of(params):
    canvas = masked_diffusion.corrupt(c, Rows(tokens), u, noise, lengths)
    total, nll = canvas_lib.canvas_loss(
      c, transformer.bind(config, params), canvas
    )
    return total / canvas.num_tokens.sum(), (canvas, nll)

  return jax.value_and_grad(of, has_aux=True)(params)


@dataclasses.dataclass
class Run:
  """One golden case, and our results for its random draws."""

  golden: dict  # by array name without the prefix
  shape: tuple  # rows and positions of the original
  loss: float
  canvas: canvas_lib.Canvas
  nll: np.ndarray
  gradients: dict  # by state-dict name

  def seen(self, x):
    rows, length = self.shape
    return np.asarray(x)[:rows, :length]


@pytest.fixture(scope='module')
def golden_arrays():
  with np.load(golden_models.GOLDEN / 'train_losses.npz') as arrays:
    return dict(arrays)


def golden_case(arrays, name, case):
  """Returns the arrays of a case, and the configs and parameters of its model.

  The result is (dict of arrays, ObjectiveConfig, TransformerConfig, params).
  """
  prefix = f'{name}.{case}.'
  golden = {
    key.removeprefix(prefix): value
    for key, value in arrays.items()
    if key.startswith(prefix)
  }
  mask_id = {'model_a': 510, 'model_b': 297}[name]
  c = dataclasses.replace(CONFIG, predict_mask=True, mask_id=mask_id)
  return golden, c, *golden_models.load(name)


@pytest.fixture(
  scope='module',
  params=itertools.product(('model_a', 'model_b'), CASES),
  ids='-'.join,
)
def run(request, golden_arrays):
  """Runs a golden case.

  A truncated case keeps the full length, and `lengths` cuts its rows. Its draws
  past the cut are 0, which would mask every token. The cases have three or four
  rows; an empty row fills up the batch, so all compile to one program.
  """
  name, case = request.param
  golden, c, config, params = golden_case(
    golden_arrays, name, f'pretrain.{case}'
  )
  rows, full = golden['input_ids'].shape
  length = int(golden['truncate_to']) or full

  def fill(x):
    sizes = (4, full)[: x.ndim]
    ends = [(0, n - k) for n, k in zip(sizes, x.shape, strict=True)]
    return np.pad(x, ends)

  (value, (canvas, nll)), gradients = loss_per_token(
    c,
    config,
    params,
    fill(golden['input_ids']),
    fill(golden['t']),
    fill(golden['u']),
    fill(np.full(rows, length)),
  )
  gradients = golden_models.to_torch(gradients)
  shape = rows, length
  return Run(golden, shape, float(value), canvas, np.asarray(nll), gradients)


def test_tokens_are_masked_as_in_llada(run):
  weights = run.seen(run.canvas.weights)
  np.testing.assert_array_equal(weights != 0, run.golden['masked'])
  np.testing.assert_array_equal(
    run.seen(run.canvas.inputs), run.golden['noisy']
  )
  np.testing.assert_allclose(
    run.canvas.mask_ratio[: run.shape[0], 0], run.golden['p_mask'], rtol=1e-6
  )
  assert run.canvas.num_tokens.sum() == run.golden['denominator']


def test_token_losses_are_those_of_llada(run):
  np.testing.assert_allclose(
    run.seen(run.canvas.weights * run.nll),
    run.golden['token_loss'],
    rtol=1e-5,
    atol=2e-4,
  )


def test_positions_past_the_cut_carry_no_loss(run):
  _, length = run.shape
  assert not np.asarray(run.canvas.weights)[:, length:].any()
  assert not run.nll[:, length:].any()


def test_loss_is_that_of_llada(run):
  np.testing.assert_allclose(run.loss, run.golden['loss'], rtol=1e-5)


def test_gradient_norms_are_those_of_llada(run):
  total = float(run.golden['gradnorm_total'])
  norm = lambda g: np.linalg.norm(g.astype(np.float64))
  recorded = {
    key.removeprefix('gradnorm.'): value
    for key, value in run.golden.items()
    if key.startswith('gradnorm.')
  }
  assert recorded.keys() == run.gradients.keys()
  for name, expected in recorded.items():
    np.testing.assert_allclose(
      norm(run.gradients[name]),
      expected,
      rtol=1e-4,
      atol=1e-6 * total,
      err_msg=name,
    )
  ours = math.sqrt(sum(norm(g) ** 2 for g in run.gradients.values()))
  np.testing.assert_allclose(ours, total, rtol=1e-4)


def test_gradients_are_those_of_llada(run):
  """Only the case `normal` records gradients: matrices, or some rows."""
  for key, expected in run.golden.items():
    kind, _, name = key.partition('.')
    if kind == 'grad':
      actual = run.gradients[name]
    elif kind == 'gradrows':
      actual = run.gradients[name][run.golden['gradrows_index']]
    else:
      continue
    np.testing.assert_allclose(
      actual,
      expected,
      rtol=0,
      atol=1e-4 * np.abs(expected).max(),
      err_msg=key,
    )


def test_batch_without_masks_has_zero_loss_and_gradients(run):
  if run.golden['masked'].any():
    assert run.loss > 0
    return
  assert run.loss == 0
  for gradient in run.gradients.values():
    np.testing.assert_array_equal(gradient, 0)


# Enumeration of all masks


@pytest.fixture(scope='module')
def bound(params):
  return enumerated_bound(params)


@pytest.fixture(scope='module')
def network_nll(params):
  """Returns the function `nll_of` of `expected_loss` for the tiny network."""
  return nll_of(params)


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_expected_loss_is_the_bound_under_every_schedule(
  schedule, network_nll, bound
):
  c = dataclasses.replace(CONFIG, schedule=Schedule(schedule), eps=0.0)
  assert expected_loss(c, network_nll) == pytest.approx(bound, rel=1e-5)


def test_expected_loss_approaches_the_bound_as_eps_vanishes(network_nll, bound):
  error = lambda eps: abs(
    expected_loss(dataclasses.replace(CONFIG, eps=eps), network_nll) - bound
  )
  assert 0 < error(1e-2) < 0.02 * bound
  assert error(1e-3) < 0.15 * error(1e-2)


@pytest.mark.parametrize(
  'schedule, sampling',
  [
    ('linear', 'antithetic'),
    ('linear', 'iid'),
    ('cosine', 'stratified'),
  ],
)
def test_average_over_draws_is_the_expectation(
  schedule, sampling, params, network_nll
):
  c = dataclasses.replace(
    CONFIG, schedule=Schedule(schedule), time_sampling=sampling
  )
  batch = 1024
  rows = jnp.arange(batch)
  tokens = jnp.tile(jnp.asarray(TOKENS, jnp.int32), (batch, 1))

  @jax.jit
  def sample(key):
    canvas = table.make_canvas(c, Rows(tokens), rows, key, batch)
    return loss(CONFIG, TINY, params, canvas)[0] / batch

  means = np.array([sample(jax.random.key(n)) for n in range(100)])
  expected = expected_loss(c, network_nll)
  standard_error = means.std(ddof=1) / np.sqrt(len(means))
  assert standard_error < 0.01 * expected
  assert abs(means.mean() - expected) < 3 * standard_error


# Prompts and answers, by enumeration of the masks of the answers

ANSWERS = [(1,), (0, 2), (1, 3), (1, 2, 3), (0, 1, 2, 3)]


def marked(answer):
  return np.isin(np.arange(L), answer)


@pytest.mark.parametrize('answer', ANSWERS, ids=str)
@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
def test_expected_loss_of_answers_is_the_conditional_bound(
  schedule, answer, params, network_nll
):
  """The table holds the nll of the answer tokens for every mask of them."""
  subsets = every_mask.subsets(len(answer))
  masked = np.zeros((len(subsets), L), bool)
  masked[:, answer] = subsets
  inputs = np.tile(TOKENS, (16, 1))  # one compiled shape for all answers
  inputs[: len(masked)][masked] = MASK
  labels = masks.bidirectional(jnp.ones(inputs.shape, bool))
  log_p = without_mask(
    log_probabilities(TINY, params, jnp.asarray(inputs), labels)
  )
  table = -log_p[: len(masked), np.arange(L), TOKENS][:, answer]
  c = dataclasses.replace(CONFIG, schedule=Schedule(schedule), eps=0.0)
  expected = expected_loss(c, network_nll, marked(answer))
  bound = every_mask.elbo(table)
  assert expected == pytest.approx(bound, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize('answer', ANSWERS, ids=str)
def test_loss_of_a_perfect_denoiser_is_the_nll_of_the_answer(answer):
  """The denoiser knows a random distribution of rows of four tokens."""
  p = np.random.default_rng(0).dirichlet(np.full(3**L, 0.5)).reshape((3,) * L)

  def probability(given):
    """Returns the probability of the tokens of TOKENS at these positions."""
    at = tuple(TOKENS[i] if i in given else slice(None) for i in range(L))
    return p[at].sum()

  def nll(canvas):
    found = np.zeros(canvas.inputs.shape)
    for row, masked in zip(
      found, np.asarray(canvas.inputs) == MASK, strict=True
    ):
      visible = set(np.flatnonzero(~masked))
      for i in np.flatnonzero(masked):
        row[i] = np.log(probability(visible) / probability(visible | {i}))
    return found

  prompt = set(range(L)) - set(answer)
  exact = np.log(probability(prompt) / probability(set(range(L))))
  c = dataclasses.replace(CONFIG, eps=0.0)
  assert expected_loss(c, nll, marked(answer)) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize('name', ['model_a', 'model_b'])
@pytest.mark.parametrize('case', ['normal', 'eos_padded'])
def test_answers_have_the_losses_of_llada(case, name, golden_arrays):
  """LLaDA divides each row by its answer length, SMDM by all answer tokens."""
  golden, c, config, params = golden_case(golden_arrays, name, f'sft.{case}')
  tokens, lengths = golden['input_ids'], golden['answer_lengths']
  rows, length = tokens.shape
  answer = np.arange(length) >= golden['prompt_lengths'][:, None]
  canvas = masked_diffusion.corrupt(
    c,
    Rows(tokens, answer=answer),
    golden['t'],
    golden['u'],
    np.full(rows, length),
  )
  total, nll = loss(c, config, params, canvas)
  np.testing.assert_array_equal(canvas.inputs, golden['noisy'])
  np.testing.assert_array_equal(canvas.weights != 0, golden['masked'])
  np.testing.assert_array_equal(canvas.num_tokens, lengths)
  token_loss = np.asarray(canvas.weights * nll)
  np.testing.assert_allclose(
    token_loss, golden['token_loss'], rtol=1e-5, atol=2e-4
  )
  by_row = dataclasses.replace(c, denominator='row')
  mean = loss(by_row, config, params, canvas)[0] / rows
  np.testing.assert_allclose(mean, golden['loss'], rtol=1e-5)
  np.testing.assert_allclose(
    total / canvas.num_tokens.sum(), golden['loss_smdm_global_norm'], rtol=1e-5
  )


# The canvas


def test_inputs_and_weights_of_masked_positions():
  tokens, canvas = canvas_of(CONFIG)
  masked = np.asarray(canvas.inputs) == MASK
  np.testing.assert_array_equal(canvas.inputs, np.where(masked, MASK, tokens))
  np.testing.assert_array_equal(canvas.targets, tokens)
  np.testing.assert_array_equal(np.asarray(canvas.weights) != 0, masked)
  np.testing.assert_allclose(
    canvas.weights, masked / np.asarray(canvas.mask_ratio), rtol=1e-6
  )


def test_share_of_masked_tokens_is_the_mask_ratio():
  _, canvas = canvas_of(CONFIG)
  ratio = np.asarray(canvas.mask_ratio)[:, 0]
  share = np.asarray(canvas.weights != 0).mean(axis=1)
  deviation = np.sqrt(ratio * (1 - ratio) / 512)
  assert (np.abs(share - ratio) < 5 * deviation + 1e-3).all()


def test_each_antithetic_pair_has_half_of_its_tokens_masked():
  _, canvas = canvas_of(CONFIG)
  masked = np.asarray(canvas.weights != 0).reshape(32, -1).mean(axis=1)
  assert np.abs(masked - 0.5).max() < 5 * np.sqrt(0.25 / 1024)


def test_rows_and_steps_have_different_noise():
  _, first = canvas_of(CONFIG)
  _, second = canvas_of(CONFIG, seed=1)
  masked = np.asarray(first.weights != 0)
  assert len(np.unique(masked, axis=0)) > 60
  assert (masked != np.asarray(second.weights != 0)).any(axis=1).mean() > 0.9


def test_fraction_0_cuts_no_row():
  _, canvas = canvas_of(CONFIG)
  assert (canvas.num_tokens == 512).all()
  assert (canvas.labels.doc == 0).all()


def test_fraction_1_draws_uniform_lengths():
  c = dataclasses.replace(CONFIG, random_length_fraction=1.0)
  _, canvas = canvas_of(c, batch=8192, length=8)
  counts = np.bincount(np.asarray(canvas.num_tokens, int), minlength=9)
  assert counts[0] == 0
  deviation = np.sqrt(8192 / 8 * 7 / 8)
  np.testing.assert_allclose(counts[1:], 8192 / 8, atol=4 * deviation)


def test_fraction_of_a_tenth_cuts_a_tenth_of_the_rows():
  c = dataclasses.replace(CONFIG, random_length_fraction=0.1)
  _, canvas = canvas_of(c, batch=8192, length=8)
  share = np.mean(np.asarray(canvas.num_tokens) < 8)
  expected = 0.1 * 7 / 8  # one in eight random lengths is the whole row
  assert abs(share - expected) < 4 * np.sqrt(expected / 8192)


def test_positions_past_the_cut_are_padding():
  c = dataclasses.replace(CONFIG, random_length_fraction=0.5)
  tokens, canvas = canvas_of(c)
  past = np.arange(512) >= np.asarray(canvas.num_tokens)[:, None]
  assert past.any()
  np.testing.assert_array_equal(np.asarray(canvas.labels.doc) == -1, past)
  assert not np.asarray(canvas.weights)[past].any()
  np.testing.assert_array_equal(
    np.asarray(canvas.inputs)[past], np.asarray(tokens)[past]
  )


def test_only_answers_of_the_text_are_masked_and_counted():
  """With the noise of rows without columns, and with cut rows."""
  c = dataclasses.replace(CONFIG, random_length_fraction=0.5)
  tokens, plain = canvas_of(c)
  random = np.random.default_rng(2)
  doc = random.integers(-1, 3, tokens.shape).astype(np.int32)
  answer = random.random(tokens.shape) < 0.4
  answer[:5] = False
  rows = Rows(tokens, jnp.asarray(doc), jnp.asarray(answer))
  canvas = make_canvas(c, rows, jnp.arange(64), jax.random.key(0), 64)
  before_cut = np.arange(512) < np.asarray(plain.num_tokens)[:, None]
  may = answer & (doc >= 0) & before_cut
  weights = np.where(may, plain.weights, 0)
  np.testing.assert_array_equal(canvas.weights, weights)
  np.testing.assert_array_equal(
    canvas.inputs, np.where(weights != 0, MASK, tokens)
  )
  np.testing.assert_array_equal(canvas.num_tokens, may.sum(axis=1))
  assert not canvas.num_tokens[:5].any() and canvas.num_tokens[5:].all()


@pytest.mark.parametrize('within', ['row', 'document'])
def test_columns_that_say_nothing_change_no_bit(within):
  c = dataclasses.replace(CONFIG, attend_within=within)
  random = np.random.default_rng(0)
  tokens, u = random_tokens(6, 9), random.random(6).astype(np.float32)
  noise = random.random((6, 9)).astype(np.float32)
  lengths = np.array([9, 1, 4, 9, 8, 5])
  stored = Rows(tokens, masks.documents(tokens, EOS), tokens >= 0)
  plain, canvas = (
    masked_diffusion.corrupt(c, rows, u, noise, lengths)
    for rows in (Rows(tokens), stored)
  )
  assert not canvas.labels.single
  labels = dataclasses.replace(canvas.labels, single=plain.labels.single)
  jax.tree.map(
    np.testing.assert_array_equal,
    dataclasses.replace(canvas, labels=labels),
    plain,
  )


@pytest.mark.parametrize('n', [1, 4])
def test_cut_row_has_the_loss_of_the_truncated_row(n, params):
  random = np.random.default_rng(0)
  tokens, u = random_tokens(6, 6), random.random(6).astype(np.float32)
  noise = (0.7 * random.random((6, 6))).astype(np.float32)
  lengths = np.array([6, 1, 4, 4, 6, 1])
  cut = masked_diffusion.corrupt(CONFIG, Rows(tokens), u, noise, lengths)
  short = masked_diffusion.corrupt(
    CONFIG, Rows(tokens[:, :n]), u, noise[:, :n], np.full(6, n)
  )
  sums = [
    jnp.sum(c.weights * loss(CONFIG, TINY, params, c)[1], axis=1)[lengths == n]
    for c in (cut, short)
  ]
  assert sums[1].any()
  np.testing.assert_allclose(*sums, rtol=1e-5)
  assert (cut.num_tokens[lengths == n] == short.num_tokens[0]).all()


def test_softmax_includes_the_mask_token_only_with_predict_mask(params):
  """Without it, changing the logit of the mask token changes nothing."""
  _, canvas = canvas_of(CONFIG, length=L)
  moved = {**params, 'head': params['head'].at[:, MASK].add(1.0)}
  for predict_mask in (False, True):
    c = dataclasses.replace(CONFIG, predict_mask=predict_mask)
    before, after = (loss(c, TINY, p, canvas)[0] for p in (params, moved))
    assert (before != after) == predict_mask
