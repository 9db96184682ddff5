"""Block diffusion: one forward pass over [noisy ; clean] for all blocks."""

import dataclasses
import functools

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from objective_cases import (
  CONFIG,
  MASK,
  TINY,
  log_probabilities,
  loss,
  make_canvas,
  random_tokens,
  strong_params,
  without_mask,
)
from slow import SLOW

from maskdiff.config import validate
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.model import masks, transformer
from maskdiff.model.network import Network
from maskdiff.objectives import block_diffusion, table
from maskdiff.objectives.schedule import Schedule
from maskdiff.objectives.time_density import TimeDensity

LENGTH = 12
BLOCKS = [1, 2, 3, 4, 6, 12]
BLOCK = dataclasses.replace(CONFIG, name='block_diffusion')


def of_blocks(block_length, **changes):
  return dataclasses.replace(BLOCK, block_length=block_length, **changes)


@pytest.fixture(scope='module')
def params():
  return strong_params(TINY)


# Golden file: BD3-LM's mask on LLaDA's network


@pytest.mark.parametrize('predict_mask', [True, False])
@pytest.mark.parametrize('name', ['model_a', 'model_b'])
def test_golden_logits_and_losses(name, predict_mask):
  with np.load(golden_models.GOLDEN / 'block_diffusion.npz') as arrays:
    golden = {
      key.split('.')[-1]: arrays[key]
      for key in arrays
      if key.startswith(f'{name}.block_forward.')
    }
  config, params = golden_models.load(name)
  c = of_blocks(
    int(golden['block_size']),
    predict_mask=predict_mask,
    mask_id=int(golden['mask_id']),
  )
  masked = golden['xt'] == golden['mask_id']
  rows, length = masked.shape
  canvas = block_diffusion.with_masks(
    c,
    Rows(jnp.asarray(golden['x0'])),
    jnp.asarray(golden['t_block']),
    jnp.asarray(masked),
    jnp.full(rows, length),
  )
  np.testing.assert_array_equal(canvas.inputs[:, :length], golden['xt'])
  np.testing.assert_array_equal(canvas.inputs[:, length:], golden['x0'])
  network = transformer.bind(config, params)
  with jax.default_matmul_precision('highest'):
    logits = network.logits(network(canvas.inputs, canvas.labels))
    _, nll = loss(c, config, params, canvas)
  np.testing.assert_allclose(logits[:, :length], golden['logits'], atol=2e-4)
  expected = golden['token_loss' if predict_mask else 'token_loss_subs']
  np.testing.assert_allclose(canvas.weights * nll, expected, rtol=1e-5)


# The extremes


@pytest.mark.parametrize(
  'schedule, sampling',
  [
    ('linear', 'antithetic'),
    SLOW('cosine', 'stratified'),
    SLOW('polynomial', 'iid'),
  ],
)
def test_one_block_per_row_is_masked_diffusion_to_the_bit(schedule, sampling):
  changes = dict(
    schedule=Schedule(schedule),
    time_sampling=sampling,
    time_density=TimeDensity('bell'),
    random_length_fraction=0.5,
  )
  tokens, numbers, key = random_tokens(8, 64), jnp.arange(8), jax.random.key(3)
  block = make_canvas(of_blocks(64, **changes), tokens, numbers, key, 8)
  row = make_canvas(
    dataclasses.replace(CONFIG, **changes), tokens, numbers, key, 8
  )
  assert block.labels.regime == row.labels.regime
  jax.tree.map(np.testing.assert_array_equal, block, row)


@pytest.mark.slow
def test_blocks_of_one_token_are_the_chain_rule(params):
  """All tokens are masked, with weight 1, and the loss has no noise."""
  c = of_blocks(1, schedule=Schedule('cosine'))
  tokens = random_tokens(4, 6)
  canvas = make_canvas(c, tokens, jnp.arange(4), jax.random.key(0), 4)
  np.testing.assert_array_equal(canvas.weights, 1)
  np.testing.assert_array_equal(canvas.mask_ratio, np.ones((4, 6)))
  total, _ = loss(c, TINY, params, canvas)
  expected = 0.0
  for i in range(6):
    log_p = without_mask(predict(params, c, tokens[:, :i], 1))
    expected -= log_p[np.arange(4), 0, tokens[:, i]].sum()
  assert total == pytest.approx(expected, rel=1e-5)


def predict(params, c, prefix, size, noisy=None, config=TINY):
  """Returns the predictions of a block given clean tokens: [B, size, V].

  The row ends with the block, as in sampling.
  """
  shape = len(prefix), size
  noisy = jnp.full(shape, MASK) if noisy is None else noisy
  row = jnp.concatenate([prefix, noisy], axis=1)
  network = Network(
    config, params, c.name, False, MASK, 2, 1, 0, c.block_length
  )
  inputs, labels = table.show(network, row, jnp.ones(row.shape, bool))
  return log_probabilities(config, params, inputs, labels)[:, -size:]


# One forward pass for all blocks


@pytest.mark.parametrize(
  'block_length, predict_next',
  [
    (3, False),
    (4, True),
    *(SLOW(b, False) for b in BLOCKS if b != 3),
    SLOW(1, True),
    SLOW(12, True),
  ],
)
def test_noisy_copy_predicts_as_each_block_after_a_clean_prefix(
  params, block_length, predict_next
):
  c, tokens = of_blocks(block_length), random_tokens(3, LENGTH)
  config = dataclasses.replace(TINY, predict_next=predict_next)
  canvas = make_canvas(c, tokens, jnp.arange(3), jax.random.key(1), 4)
  log_p = log_probabilities(config, params, canvas.inputs, canvas.labels)
  for start in range(0, LENGTH, block_length):
    block = slice(start, start + block_length)
    noisy = canvas.inputs[:, :LENGTH][:, block]
    prefix = tokens[:, :start]
    expected = predict(params, c, prefix, block_length, noisy, config)
    np.testing.assert_allclose(log_p[:, block], expected, atol=1e-5)


@pytest.mark.parametrize('block_length', [2, 3])
def test_expected_loss_is_the_enumerated_bound(params, block_length):
  """L = 6: every mask of every block, and a quadrature over its time."""
  length = 6
  c, tokens = of_blocks(block_length), random_tokens(1, length)
  at, point_weights = np.polynomial.legendre.leggauss(16)
  at, point_weights = (at + 1) / 2, point_weights / 2
  mask = np.array(
    [[bool(i >> k & 1) for k in range(length)] for i in range(2**length)]
  )
  blocks = length // block_length

  def of_masks(u):
    """Returns the Canvas of every mask at one time, and its probabilities."""
    rows = Rows(jnp.tile(tokens, (len(mask), 1)))
    draws = jnp.where(mask, 0.0, 1.0)
    lengths = jnp.full(len(mask), length)
    times = jnp.full((len(mask), blocks), u, jnp.float32)
    canvas = block_diffusion.corrupt(c, rows, times, draws, lengths)
    p = np.repeat(np.asarray(canvas.mask_ratio), block_length, axis=1)
    return canvas, np.where(mask, p, 1 - p).prod(axis=1, dtype=np.float64)

  nll = None
  found = 0.0
  for u, point_weight in zip(at, point_weights, strict=True):
    canvas, probability = of_masks(u)
    if nll is None:
      nll = np.asarray(loss(c, TINY, params, canvas)[1], np.float64)
    of_row = (np.asarray(canvas.weights, np.float64) * nll).sum(axis=1)
    found += point_weight * probability @ of_row
  bound = 0.0
  for k in range(blocks):
    block = slice(k * block_length, (k + 1) * block_length)
    count = mask[:, block].sum(axis=1)
    for l in range(1, block_length + 1):
      bound += nll[count == l][:, block].sum(axis=1).mean() / l
  # Times start at eps, and the bound at 0.
  assert found == pytest.approx(bound, rel=2e-3)


# Draws


def test_every_block_has_a_time_in_a_stratum_of_its_own():
  c = of_blocks(4, eps=1e-6, time_sampling='stratified')
  tokens = random_tokens(8, 32)
  canvas = make_canvas(c, tokens, jnp.arange(8), jax.random.key(0), 8)
  assert canvas.mask_ratio.shape == (8, 8)
  strata = np.floor(np.sort(np.asarray(canvas.mask_ratio).ravel()) * 64)
  np.testing.assert_array_equal(strata, np.arange(64))


def test_neighbouring_blocks_are_antithetic():
  c = of_blocks(4, eps=1e-6)
  tokens = random_tokens(8, 32)
  canvas = make_canvas(c, tokens, jnp.arange(8), jax.random.key(0), 8)
  pairs = np.asarray(canvas.mask_ratio).reshape(-1, 2)
  np.testing.assert_allclose(pairs.sum(axis=1), 1, atol=1e-5)


def test_masks_and_weights_follow_the_time_of_the_block():
  c = of_blocks(256)
  tokens = random_tokens(4, 1024)
  canvas = make_canvas(c, tokens, jnp.arange(4), jax.random.key(0), 4)
  masked = np.asarray(canvas.inputs[:, :1024] == MASK).reshape(4, 4, 256)
  ratio = np.asarray(canvas.mask_ratio)
  np.testing.assert_allclose(masked.mean(axis=2), ratio, atol=0.1)
  weights = np.asarray(canvas.weights).reshape(4, 4, 256)
  expected = masked / ratio[..., None]
  np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_only_masked_tokens_of_the_noisy_copy_have_a_loss(params):
  """The clean copy has no loss, but its keys and values have a gradient."""
  c, tokens = of_blocks(4), random_tokens(2, 8)
  canvas = make_canvas(c, tokens, jnp.arange(2), jax.random.key(0), 2)
  assert canvas.weights.shape == (2, 8)
  np.testing.assert_array_equal(
    canvas.weights > 0, canvas.inputs[:, :8] == MASK
  )
  config = dataclasses.replace(TINY, vocab_size=16)
  wide = strong_params(config)
  # Clean tokens have ids of their own, 8 to 11, which are seen by keys only.
  inputs = canvas.inputs.at[:, 8:12].add(8)
  changed = dataclasses.replace(canvas, inputs=inputs)

  @functools.partial(jax.jit, static_argnums=0)
  def gradient(config, params):
    return jax.grad(lambda p: loss(c, config, p, changed)[0])(params)

  rows = np.abs(gradient(config, wide)['embed']).sum(axis=1)
  assert (rows[np.unique(inputs[:, 8:12])] > 0).all()


@pytest.mark.parametrize('attend_within', ['row', 'document'])
def test_labels_of_both_copies_keep_documents_apart(attend_within):
  c = of_blocks(4, attend_within=attend_within)
  doc = jnp.array([[0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1]])
  rows = Rows(random_tokens(1, 12), doc, jnp.ones(doc.shape, bool))
  canvas = make_canvas(c, rows, jnp.arange(1), jax.random.key(0), 2)
  seen = np.asarray(masks.visible(canvas.labels, canvas.labels))[0]
  whole = np.asarray(masks.block_diffusion(jnp.ones((1, 12), bool), 4).doc)
  assert whole.shape == (1, 24)
  same = np.tile(doc[0][:, None] == doc[0], (2, 2))
  text = np.tile(doc[0] >= 0, 2)
  if attend_within == 'row':
    same = text[:, None] & text
  position = np.tile(np.arange(12) // 4, 2)
  noisy = np.arange(24) < 12
  q, k = position[:, None], position[None]
  expected = np.where(
    noisy[None],
    noisy[:, None] & (q == k),
    np.where(noisy[:, None], q > k, q >= k),
  )
  np.testing.assert_array_equal(
    seen[text][:, text], (expected & same)[text][:, text]
  )


def test_block_length_must_divide_the_row():
  config = tiny.config({'objective.name': 'block_diffusion', 'data.length': 48})
  with pytest.raises(UserError, match='block_length=32 does not.*length=16'):
    validate(config)
