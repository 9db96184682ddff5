"""Complementary masks: a row is in the Canvas twice, with masks exchanged."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from objective_cases import (
  ALL_MASKS,
  CONFIG,
  MASK,
  STORED_ANSWER,
  STORED_DOC,
  TINY,
  TOKENS,
  L,
  check_rows_do_not_depend_on_devices_or_parts,
  enumerated_bound,
  log_probabilities,
  loss,
  make_canvas,
  random_tokens,
  stored,
  strong_params,
)

from maskdiff.config import validate
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.objectives import block_diffusion, masked_diffusion
from maskdiff.objectives.schedule import SCHEDULES, Schedule
from maskdiff.objectives.time_density import TimeDensity, Weight

ROW = dataclasses.replace(CONFIG, complementary_masks=True)
BLOCK = dataclasses.replace(ROW, name='block_diffusion')
BELL = TimeDensity('bell', mean=0.4, width=0.2)


@pytest.fixture(scope='module')
def params():
  return strong_params(TINY)


@pytest.mark.parametrize(
  'name, within',
  [('masked_diffusion', 'row'), ('block_diffusion', 'document')],
)
def test_each_answer_is_masked_in_one_of_two_copies(name, within):
  """Padding and prompts are in neither; all else of the copies is equal."""
  c = dataclasses.replace(ROW, name=name, attend_within=within)
  rows, key = stored(4), jax.random.key(0)
  canvas = make_canvas(c, rows, jnp.arange(4), key, 4)
  length = len(STORED_DOC)
  masked = np.asarray(canvas.inputs[:, :length] == MASK)
  answer = np.broadcast_to(STORED_ANSWER & (STORED_DOC >= 0), (4, length))
  np.testing.assert_array_equal(masked[::2] | masked[1::2], answer)
  assert not (masked[::2] & masked[1::2]).any()
  np.testing.assert_array_equal(canvas.weights > 0, masked)
  np.testing.assert_array_equal(canvas.num_tokens, np.full(8, answer[0].sum()))
  np.testing.assert_allclose(
    canvas.mask_ratio[::2] + canvas.mask_ratio[1::2], 1, atol=1e-6
  )
  plain = dataclasses.replace(c, complementary_masks=False)
  single = make_canvas(plain, rows, jnp.arange(4), key, 4)
  jax.tree.map(
    lambda pair, one: np.testing.assert_array_equal(pair[::2], one),
    canvas,
    single,
  )
  for field in ('targets', 'labels'):
    jax.tree.map(
      lambda x: np.testing.assert_array_equal(x[::2], x[1::2]),
      getattr(canvas, field),
    )
  clean = canvas.inputs[:, length:]
  np.testing.assert_array_equal(clean[::2], clean[1::2])


def test_padding_is_never_seen(params):
  text = STORED_DOC >= 0

  def outputs(rows):
    canvas = make_canvas(BLOCK, rows, jnp.arange(2), jax.random.key(0), 2)
    log_p = log_probabilities(TINY, params, canvas.inputs, canvas.labels)
    return np.asarray(log_p)[:, : len(text)][:, text]

  rows = stored(2)
  other = jnp.where(jnp.asarray(text), rows.tokens, (rows.tokens + 1) % 3)
  np.testing.assert_array_equal(
    outputs(rows), outputs(rows._replace(tokens=other))
  )


# The bound


@pytest.mark.parametrize(
  'schedule, importance',
  [('linear', False), ('cosine', False), ('polynomial', True)],
)
def test_expected_loss_of_both_copies_is_the_bound(
  schedule, importance, params
):
  """L = 4: all masks and a quadrature over the time."""
  changes = dict(schedule=Schedule(schedule), eps=1e-6)
  if importance:
    changes |= dict(time_density=BELL, weight=Weight('importance'))
  c = dataclasses.replace(ROW, **changes)
  assert c.is_bound(0)
  points = 2048
  u = np.repeat((np.arange(points) + 0.5) / points, len(ALL_MASKS))
  mask = np.tile(ALL_MASKS, (points, 1))
  rows = Rows(jnp.asarray(np.tile(TOKENS, (len(u), 1)), jnp.int32))
  canvas = masked_diffusion.corrupt(
    c, rows, u.astype(np.float32), np.where(mask, 0.0, 1.0), np.full(len(u), L)
  )
  # The nll of each mask is computed once.
  first = jax.tree.map(lambda x: x[: 2 * len(ALL_MASKS)], canvas)
  nll = np.asarray(loss(c, TINY, params, first)[1], np.float64)
  of_row = np.asarray(canvas.weights) * np.tile(nll, (points, 1))
  p = np.asarray(canvas.mask_ratio[::2], np.float64)
  probability = np.where(mask, p, 1 - p).prod(axis=1) / points
  bound = enumerated_bound(params)
  for copy in (0, 1):
    found = probability @ of_row[copy::2].sum(axis=1)
    assert found == pytest.approx(bound, rel=3e-3), copy


def test_expected_loss_of_blocks_is_the_bound(params):
  """L = 6: blocks of three, each with a time of its own."""
  size, length = 3, 6
  c = dataclasses.replace(BLOCK, block_length=size)
  mask = np.array(list(itertools.product([False, True], repeat=length)))
  at, point_weights = np.polynomial.legendre.leggauss(16)
  tokens = jnp.tile(random_tokens(1, length), (len(mask), 1))
  found, nll = np.zeros(2), None
  for u, point_weight in zip((at + 1) / 2, point_weights / 2, strict=True):
    canvas = block_diffusion.corrupt(
      c,
      Rows(tokens),
      jnp.full((len(mask), 2), u, jnp.float32),
      jnp.where(mask, 0.0, 1.0),
      jnp.full(len(mask), length),
    )
    if nll is None:
      nll = np.asarray(loss(c, TINY, params, canvas)[1], np.float64)
    of_row = (np.asarray(canvas.weights) * nll).sum(axis=1)
    p = float(canvas.mask_ratio[0, 0])
    probability = np.where(mask, p, 1 - p).prod(axis=1)
    found += point_weight * probability @ of_row.reshape(-1, 2)
  bound, nll = 0.0, nll[::2]
  for block in (slice(size), slice(size, None)):
    count = mask[:, block].sum(axis=1)
    for l in range(1, size + 1):
      bound += nll[count == l][:, block].sum(axis=1).mean() / l
  np.testing.assert_allclose(found, bound, rtol=3e-3)


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('density', [TimeDensity(), BELL], ids=str)
@pytest.mark.parametrize('weight', [Weight(), Weight('power', 0.5)], ids=str)
def test_expected_weight_of_a_token_is_one(weight, density, schedule):
  """The mean over both masks, with weights computed under jit."""
  schedule = Schedule(schedule)
  d = density.quantile(jnp.asarray((np.arange(20_000) + 0.5) / 20_000))
  ratio = schedule.mask_ratio((1 - 1e-3) * d + 1e-3)
  pair = jax.jit(lambda d: weight.of_pair(schedule, density, 1e-3, d))(d)
  mean = np.mean(ratio * pair[0] + (1 - ratio) * pair[1]) / 2
  assert mean == pytest.approx(1, rel=3e-3)


def test_cross_entropy_weighs_both_masks_the_same():
  c = dataclasses.replace(ROW, weight=Weight('power', 0.0))
  canvas = make_canvas(
    c, random_tokens(8, 16), jnp.arange(8), jax.random.key(0), 8
  )
  pairs = np.asarray(canvas.weights).reshape(8, 2, 16).sum(axis=1)
  np.testing.assert_allclose(pairs, 2, rtol=1e-6)


def test_weight_of_a_nearly_empty_mask_is_limited():
  u = np.array([1 - 2.0**-24])
  _, weights = Weight().of_pair(Schedule(), TimeDensity(), 1e-2, u)
  np.testing.assert_allclose(weights, 100, rtol=1e-4)


# Rows, devices and microbatches


@pytest.mark.slow
def test_rows_do_not_depend_on_devices_or_microbatches():
  c = dataclasses.replace(BLOCK, random_length_fraction=0.5)
  draw = lambda rows, numbers: make_canvas(
    c, rows, numbers, jax.random.key(0), 64
  )
  check_rows_do_not_depend_on_devices_or_parts(draw, copies=2)


# Config


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'objective.name': 'autoregressive'}, 'needs random masks'),
    (
      {'objective.name': 'block_diffusion', 'objective.block_length': 1},
      'needs blocks of two or more',
    ),
    (
      {
        'objective.name': 'block_diffusion',
        'objective.block_length': 4,
        'objective.block_plan': ((0.0, 1), (0.5, 4)),
      },
      'needs blocks of two or more',
    ),
  ],
)
def test_config_refuses_masks_without_a_complement(changes, message):
  config = tiny.config({'objective.complementary_masks': True, **changes})
  with pytest.raises(UserError, match=message):
    validate(config)
