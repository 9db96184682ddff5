"""Objectives against golden files, enumeration and hand-written losses."""

import dataclasses
import functools
import itertools
import math

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdiff.model import masks, transformer
from maskdiff.model.transformer import TransformerConfig
from maskdiff.objectives import canvas as canvas_lib
from maskdiff.objectives import masked_diffusion, table
from maskdiff.objectives.canvas import ObjectiveConfig
from maskdiff.objectives.schedule import SCHEDULES, Schedule

MASK, EOS = 3, 1
CONFIG = ObjectiveConfig(
  name='masked_diffusion',
  schedule=Schedule(),
  eps=1e-3,
  time_sampling='antithetic',
  random_length_fraction=0.0,
  attend_within='row',
  predict_mask=False,
  mask_id=MASK,
  bos_id=2,
  eos_id=EOS,
  loss_chunk_tokens=64,
)
# Small enough to enumerate: three tokens and the mask, four positions.
TINY = TransformerConfig(
  vocab_size=4,
  embed=8,
  layers=1,
  heads=2,
  kv_heads=1,
  head_dim=4,
  mlp=8,
  tie_embeddings=False,
  rope_theta=1e4,
  norm_eps=1e-5,
  dtype='float32',
  remat='none',
  attention='xla',
)
L = 4


@pytest.fixture(scope='module')
def params():
  return strong_params(TINY)


def strong_params(config):
  """Weights large enough for the network to have strong opinions."""
  random = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(random.normal(size=x.shape), jnp.float32),
    transformer.shapes(config),
  )


def random_tokens(batch, length, seed=0, vocab=3):
  random = np.random.default_rng(seed)
  return jnp.asarray(random.integers(0, vocab, (batch, length)), jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def loss(c, config, params, canvas):
  """Sum of weight x nll, and nll."""
  return canvas_lib.canvas_loss(c, transformer.bind(config, params), canvas)


@functools.partial(jax.jit, static_argnums=0)
def log_probabilities(config, params, inputs, labels):
  network = transformer.bind(config, params)
  return jax.nn.log_softmax(network.logits(network(inputs, labels)))


def without_mask(log_p):
  """[..., V] to [..., V - 1]: the mask, the last token, cannot be predicted."""
  p = np.exp(np.asarray(log_p, np.float64)[..., :MASK])
  return np.log(p / p.sum(axis=-1, keepdims=True))


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
    canvas = masked_diffusion.corrupt(c, tokens, u, noise, lengths)
    total, nll = canvas_lib.canvas_loss(
      c, transformer.bind(config, params), canvas
    )
    return total / canvas.num_tokens.sum(), (canvas, nll)

  return jax.value_and_grad(of, has_aux=True)(params)


@dataclasses.dataclass
class Run:
  """One golden case and what our code makes of its draws."""

  golden: dict  # by array name without the prefix
  shape: tuple  # rows and positions that the original saw
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


@pytest.fixture(
  scope='module',
  params=itertools.product(('model_a', 'model_b'), CASES),
  ids='-'.join,
)
def run(request, golden_arrays):
  """Rows of a truncated case keep their full length and are cut by `lengths`.

  There the draws past the cut are 0, which would mask every token. The case
  has three rows: an empty one joins them, so that all compile to one program.
  """
  name, case = request.param
  prefix = f'{name}.pretrain.{case}.'
  golden = {
    key.removeprefix(prefix): value
    for key, value in golden_arrays.items()
    if key.startswith(prefix)
  }
  config, params = golden_models.load(name)
  mask_id = {'model_a': 510, 'model_b': 297}[name]
  c = dataclasses.replace(CONFIG, predict_mask=True, mask_id=mask_id)
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
    run.canvas.mask_ratio[: run.shape[0]], run.golden['p_mask'], rtol=1e-6
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
  """Full matrices and rows where they were recorded: the case `normal`."""
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


def test_nothing_masked_gives_exactly_zero_loss_and_gradients(run):
  if run.golden['masked'].any():
    assert run.loss > 0
    return
  assert run.loss == 0
  for gradient in run.gradients.values():
    np.testing.assert_array_equal(gradient, 0)


# Enumeration of all masks

TOKENS = np.array([2, 0, 1, 1])
ALL_MASKS = np.array(list(itertools.product([False, True], repeat=L)))


@pytest.fixture(scope='module')
def nll_by_mask(params):
  """[16] sum of the nll of the masked tokens for each of the 2^L masks."""
  inputs = jnp.asarray(np.where(ALL_MASKS, MASK, TOKENS))
  labels = masks.bidirectional(jnp.ones(ALL_MASKS.shape, bool))
  log_p = without_mask(log_probabilities(TINY, params, inputs, labels))
  return -np.where(ALL_MASKS, log_p[:, np.arange(L), TOKENS], 0).sum(axis=1)


@pytest.fixture(scope='module')
def bound(nll_by_mask):
  """The negative ELBO in nats: sum over l of 1/l x mean over masks of l tokens.

  Independent of schedule: the l-th term is the integral of
  t^(l-1) (1-t)^(L-l) over t, times the sum over masks.
  """
  count = ALL_MASKS.sum(axis=1)
  return sum(nll_by_mask[count == l].mean() / l for l in range(1, L + 1))


def expected_loss(c, params):
  """Expectation of the loss over u and the mask, for the row TOKENS.

  Gauss-Legendre over u; for each u all masks, each with its probability, the
  losses from `corrupt` with draws that lead to this very mask.
  """
  points, point_weights = np.polynomial.legendre.leggauss(24)
  u = np.repeat((points + 1) / 2, len(ALL_MASKS)).astype(np.float32)
  mask = np.tile(ALL_MASKS, (len(points), 1))
  tokens = jnp.asarray(np.tile(TOKENS, (len(u), 1)), jnp.int32)
  draws = np.where(mask, 0.0, 1.0).astype(np.float32)
  canvas = masked_diffusion.corrupt(c, tokens, u, draws, np.full(len(u), L))
  np.testing.assert_array_equal(canvas.inputs == MASK, mask)
  _, nll = loss(CONFIG, TINY, params, canvas)
  of_row = np.asarray(jnp.sum(canvas.weights * nll, axis=1), np.float64)
  p = np.asarray(canvas.mask_ratio, np.float64)[:, None]
  probability = np.where(mask, p, 1 - p).prod(axis=1)
  mean_by_point = (probability * of_row).reshape(len(points), -1).sum(axis=1)
  return mean_by_point @ point_weights / 2


@pytest.mark.parametrize('schedule', SCHEDULES)
def test_expected_loss_is_the_bound_under_every_schedule(
  schedule, params, bound
):
  c = dataclasses.replace(CONFIG, schedule=Schedule(schedule), eps=0.0)
  assert expected_loss(c, params) == pytest.approx(bound, rel=1e-5)


def test_expected_loss_approaches_the_bound_as_eps_vanishes(params, bound):
  error = lambda eps: abs(
    expected_loss(dataclasses.replace(CONFIG, eps=eps), params) - bound
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
def test_average_over_draws_is_the_expectation(schedule, sampling, params):
  c = dataclasses.replace(
    CONFIG, schedule=Schedule(schedule), time_sampling=sampling
  )
  batch = 1024
  rows = jnp.arange(batch)
  tokens = jnp.tile(jnp.asarray(TOKENS, jnp.int32), (batch, 1))

  @jax.jit
  def sample(key):
    canvas = table.make_canvas(c, tokens, rows, key, batch)
    return loss(CONFIG, TINY, params, canvas)[0] / batch

  means = np.array([sample(jax.random.key(n)) for n in range(100)])
  expected = expected_loss(c, params)
  standard_error = means.std(ddof=1) / np.sqrt(len(means))
  assert standard_error < 0.01 * expected
  assert abs(means.mean() - expected) < 3 * standard_error


# What a canvas shows and asks


@functools.partial(jax.jit, static_argnums=(0, 4))
def make_canvas(c, tokens, rows, key, batch):
  return table.make_canvas(c, tokens, rows, key, batch)


@functools.cache
def canvas_of(c, batch=64, length=512, seed=0):
  """Tokens and their canvas."""
  tokens = random_tokens(batch, length)
  rows = jnp.arange(batch)
  return tokens, make_canvas(c, tokens, rows, jax.random.key(seed), batch)


def test_masked_positions_show_the_mask_and_only_they_are_asked():
  tokens, canvas = canvas_of(CONFIG)
  masked = np.asarray(canvas.inputs) == MASK
  np.testing.assert_array_equal(canvas.inputs, np.where(masked, MASK, tokens))
  np.testing.assert_array_equal(canvas.targets, tokens)
  np.testing.assert_array_equal(np.asarray(canvas.weights) != 0, masked)
  np.testing.assert_allclose(
    canvas.weights, masked / np.asarray(canvas.mask_ratio)[:, None], rtol=1e-6
  )


def test_share_of_masked_tokens_is_the_mask_ratio():
  _, canvas = canvas_of(CONFIG)
  ratio = np.asarray(canvas.mask_ratio)
  share = np.asarray(canvas.weights != 0).mean(axis=1)
  deviation = np.sqrt(ratio * (1 - ratio) / 512)
  assert (np.abs(share - ratio) < 5 * deviation + 1e-3).all()


def test_each_antithetic_pair_has_half_of_its_tokens_masked():
  _, canvas = canvas_of(CONFIG)
  masked = np.asarray(canvas.weights != 0).reshape(32, -1).mean(axis=1)
  assert np.abs(masked - 0.5).max() < 5 * np.sqrt(0.25 / 1024)


def test_rows_and_steps_have_noise_of_their_own():
  _, first = canvas_of(CONFIG)
  _, second = canvas_of(CONFIG, seed=1)
  masked = np.asarray(first.weights != 0)
  assert len(np.unique(masked, axis=0)) > 60
  assert (masked != np.asarray(second.weights != 0)).any(axis=1).mean() > 0.9


@pytest.mark.parametrize('name', table.OBJECTIVES)
def test_a_row_has_the_same_noise_alone_as_in_its_batch(name):
  c = dataclasses.replace(CONFIG, name=name, random_length_fraction=0.5)
  tokens, whole = canvas_of(c)
  rows = np.array([7, 0, 40, 41])
  part = make_canvas(c, tokens[rows], rows, jax.random.key(0), 64)
  jax.tree.map(
    lambda p, w: np.testing.assert_array_equal(p, w[rows]), part, whole
  )


def test_no_row_is_cut_at_fraction_0():
  _, canvas = canvas_of(CONFIG)
  assert (canvas.num_tokens == 512).all()
  assert (canvas.labels.doc == 0).all()


def test_lengths_are_uniform_on_1_to_l_at_fraction_1():
  c = dataclasses.replace(CONFIG, random_length_fraction=1.0)
  _, canvas = canvas_of(c, batch=8192, length=8)
  counts = np.bincount(np.asarray(canvas.num_tokens, int), minlength=9)
  assert counts[0] == 0
  deviation = np.sqrt(8192 / 8 * 7 / 8)
  np.testing.assert_allclose(counts[1:], 8192 / 8, atol=4 * deviation)


def test_a_tenth_of_the_rows_is_cut_at_fraction_a_tenth():
  c = dataclasses.replace(CONFIG, random_length_fraction=0.1)
  _, canvas = canvas_of(c, batch=8192, length=8)
  share = np.mean(np.asarray(canvas.num_tokens) < 8)
  expected = 0.1 * 7 / 8  # one in eight random lengths is the whole row
  assert abs(share - expected) < 4 * np.sqrt(expected / 8192)


def test_past_the_cut_there_is_padding_without_mask_or_loss():
  c = dataclasses.replace(CONFIG, random_length_fraction=0.5)
  tokens, canvas = canvas_of(c)
  past = np.arange(512) >= np.asarray(canvas.num_tokens)[:, None]
  assert past.any()
  np.testing.assert_array_equal(np.asarray(canvas.labels.doc) == -1, past)
  assert not np.asarray(canvas.weights)[past].any()
  np.testing.assert_array_equal(
    np.asarray(canvas.inputs)[past], np.asarray(tokens)[past]
  )


@pytest.mark.parametrize('n', [1, 4])
def test_a_cut_row_has_the_loss_of_the_truncated_row(n, params):
  random = np.random.default_rng(0)
  tokens, u = random_tokens(6, 6), random.random(6).astype(np.float32)
  noise = (0.7 * random.random((6, 6))).astype(np.float32)
  lengths = np.array([6, 1, 4, 4, 6, 1])
  cut = masked_diffusion.corrupt(CONFIG, tokens, u, noise, lengths)
  short = masked_diffusion.corrupt(
    CONFIG, tokens[:, :n], u, noise[:, :n], np.full(6, n)
  )
  sums = [
    jnp.sum(c.weights * loss(CONFIG, TINY, params, c)[1], axis=1)[lengths == n]
    for c in (cut, short)
  ]
  assert sums[1].any()
  np.testing.assert_allclose(*sums, rtol=1e-5)
  assert (cut.num_tokens[lengths == n] == short.num_tokens[0]).all()


def test_the_mask_takes_part_in_the_softmax_only_if_asked(params):
  """Moving its logit changes nothing when it cannot be predicted."""
  _, canvas = canvas_of(CONFIG, length=L)
  moved = {**params, 'head': params['head'].at[:, MASK].add(1.0)}
  for predict_mask in (False, True):
    c = dataclasses.replace(CONFIG, predict_mask=predict_mask)
    before, after = (loss(c, TINY, p, canvas)[0] for p in (params, moved))
    assert (before != after) == predict_mask


# Autoregression

AR = dataclasses.replace(CONFIG, name='autoregressive')


def test_autoregressive_loss_is_that_of_the_next_token(params):
  """bos x0 x1 x2 predict x0 x1 x2 x3, with a mask of lower triangles."""
  tokens, canvas = canvas_of(AR, length=L)
  total, nll = loss(AR, TINY, params, canvas)
  bos = jnp.full((64, 1), AR.bos_id)
  inputs = jnp.concatenate([bos, tokens[:, :3]], axis=1)
  ones = jnp.ones((64, L), jnp.int32)
  pos = jnp.arange(L) * ones
  causal = masks.Labels(doc=0 * ones, pos=pos, block=-ones, reach=pos + 1)
  log_p = without_mask(log_probabilities(TINY, params, inputs, causal))
  expected = -np.take_along_axis(log_p, np.asarray(tokens)[..., None], -1)
  np.testing.assert_allclose(nll, expected[..., 0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
  assert canvas.num_tokens.sum() == 64 * L


@pytest.mark.parametrize('i', range(L))
def test_autoregressive_output_depends_only_on_earlier_tokens(i, params):
  def outputs(tokens):
    canvas = make_canvas(AR, tokens, jnp.arange(64), jax.random.key(0), 64)
    return log_probabilities(TINY, params, canvas.inputs, canvas.labels)

  tokens = random_tokens(64, L)
  later = outputs(tokens.at[:, i:].set((tokens[:, i:] + 1) % 3))
  np.testing.assert_array_equal(later[:, i], outputs(tokens)[:, i])
  if i > 0:
    before = outputs(tokens.at[:, i - 1].set((tokens[:, i - 1] + 1) % 3))
    assert (before[:, i] != outputs(tokens)[:, i]).any()


# Attention within a document

# Two whole documents, one of them without text, and the start of a third.
PACKED = np.array([0, 2, 2, EOS, EOS, 2, 0, 0, 2, 0])
DOC = np.array([0, 0, 0, 0, 1, 2, 2, 2, 2, 2])
CONFINED = dataclasses.replace(CONFIG, attend_within='document')


def of(name, c):
  return dataclasses.replace(c, name=name)


def packed(batch):
  return jnp.tile(jnp.asarray(PACKED, jnp.int32), (batch, 1))


def log_p_and_nll(c, params, canvas):
  log_p = log_probabilities(TINY, params, canvas.inputs, canvas.labels)
  return without_mask(log_p), np.asarray(loss(c, TINY, params, canvas)[1])


def assert_equal_apart(whole, apart):
  """The parts of a packed row are what documents are in rows of their own.

  Args:
    whole: arrays [B, 10, ...] of the packed rows.
    apart: for each document the same arrays, where it stands first.
  """
  for number, parts in enumerate(apart):
    for packed_part, part in zip(whole, parts, strict=True):
      packed_part = packed_part[:, number == DOC]
      np.testing.assert_allclose(
        packed_part, part[:, : packed_part.shape[1]], rtol=1e-5, atol=1e-5
      )


def alone(x, number):
  """Columns of one document first, then those of the others."""
  return np.concatenate([x[:, number == DOC], x[:, number != DOC]], axis=1)


def test_packed_documents_have_the_loss_that_they_have_apart(params):
  """A row of its own is one that is cut at the end of the document."""
  random = np.random.default_rng(0)
  tokens, u = packed(16), random.random(16).astype(np.float32)
  noise = random.random(tokens.shape).astype(np.float32)
  row = masked_diffusion.corrupt(
    CONFINED, tokens, u, noise, np.full(16, len(DOC))
  )
  apart = [
    masked_diffusion.corrupt(
      CONFIG, alone(tokens, n), u, alone(noise, n), np.full(16, sum(n == DOC))
    )
    for n in range(3)
  ]
  whole = log_p_and_nll(CONFINED, params, row)
  assert (whole[1] > 0).any(axis=0).all()
  assert_equal_apart(whole, [log_p_and_nll(CONFIG, params, c) for c in apart])


def test_packed_documents_are_predicted_as_apart_with_eos_for_bos(params):
  def log_p_nll(c, tokens):
    canvas = make_canvas(c, tokens, jnp.arange(1), jax.random.key(0), 1)
    return log_p_and_nll(c, params, canvas)

  c, tokens = of('autoregressive', CONFINED), packed(1)
  # The first of the row follows a bos. No document sees what is after it.
  starts = [AR.bos_id, EOS, EOS]
  apart = [
    log_p_nll(dataclasses.replace(AR, bos_id=start), alone(tokens, n))
    for n, start in enumerate(starts)
  ]
  assert_equal_apart(log_p_nll(c, tokens), apart)


@pytest.mark.parametrize('name', table.OBJECTIVES)
def test_an_output_depends_on_its_own_document_and_on_nothing_else(name):
  c = of(name, CONFINED)
  canvas = make_canvas(c, packed(2), jnp.arange(2), jax.random.key(0), 2)
  # Each position shows a token of its own, whose embedding is its input.
  length = len(DOC)
  inputs = jnp.tile(jnp.arange(length), (2, 1))
  config = dataclasses.replace(TINY, vocab_size=length)
  params = strong_params(config)
  direction = np.random.default_rng(1).normal(size=config.embed)

  def outputs(embed):
    network = transformer.bind(config, {**params, 'embed': embed})
    return network(inputs, canvas.labels)[0] @ direction

  gradients = jax.jit(jax.jacrev(outputs))(params['embed'])  # [L, L, D]
  same = DOC[:, None] == DOC
  expected = np.tril(same) if name == 'autoregressive' else same
  np.testing.assert_array_equal((gradients != 0).any(axis=-1), expected)


@pytest.mark.parametrize('name', table.OBJECTIVES)
def test_confinement_changes_the_documents_and_nothing_else(name):
  c = dataclasses.replace(CONFIG, random_length_fraction=0.5)
  tokens, row = canvas_of(of(name, c))
  c = dataclasses.replace(c, attend_within='document')
  _, confined = canvas_of(of(name, c))
  doc = np.asarray(masks.documents(tokens, EOS))
  padding = np.asarray(row.labels.doc) == -1
  assert padding.any() == (name == 'masked_diffusion')
  np.testing.assert_array_equal(row.labels.doc, np.where(padding, -1, 0))
  np.testing.assert_array_equal(confined.labels.doc, np.where(padding, -1, doc))
  labels = dataclasses.replace(
    confined.labels, doc=row.labels.doc, single=row.labels.single
  )
  jax.tree.map(
    np.testing.assert_array_equal,
    dataclasses.replace(confined, labels=labels),
    row,
  )


def test_a_masked_eos_ends_its_document_all_the_same():
  tokens, u = packed(2), np.full(2, 0.5, np.float32)
  noise = np.stack([np.zeros(len(DOC)), np.where(PACKED == EOS, 0, 1)])
  canvas = masked_diffusion.corrupt(
    CONFINED, tokens, u, noise, np.full(2, len(DOC))
  )
  assert not (canvas.inputs == EOS).any()
  np.testing.assert_array_equal(canvas.labels.doc, [DOC, DOC])
