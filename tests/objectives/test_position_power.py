"""Mask ratios that depend on the position of a token in its block."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from objective_cases import (
  CONFIG,
  check_rows_do_not_depend_on_devices_or_parts,
)

from maskdiff.config import validate
from maskdiff.data.rows import Rows
from maskdiff.errors import UserError
from maskdiff.objectives import block_diffusion
from maskdiff.objectives.schedule import SCHEDULES, Schedule
from maskdiff.objectives.time_density import TimeDensity, Weight
from maskdiff.training import evaluation, step

N = 3  # tokens of a block
BLOCK = dataclasses.replace(
  CONFIG, name='block_diffusion', block_length=N, position_power=2.0
)
MASKS = np.array(list(itertools.product([False, True], repeat=N)))


def draw(c, u, masked):
  """Returns the Canvas of rows of two blocks with one u for both blocks.

  Args:
    c: ObjectiveConfig.
    u: [B].
    masked: [B, N] bool, the masks of both blocks; None draws them.
  """
  noise = np.random.default_rng(0).random((len(u), 2 * N))
  if masked is not None:
    noise = np.where(np.tile(masked, 2), 0.0, 1.0)
  return block_diffusion.corrupt(
    c,
    Rows(jnp.zeros((len(u), 2 * N), jnp.int32)),
    jnp.asarray(np.stack([u, u], axis=1), jnp.float32),
    jnp.asarray(noise, jnp.float32),
    jnp.full(len(u), 2 * N),
  )


def exact_nll(joint):
  """Returns the nll in nats of token 0 at masked positions, [masks, N].

  Args:
    joint: [V] * N probabilities of all rows of N tokens.
  """
  nll = np.zeros(MASKS.shape)
  for mask, row in zip(MASKS, nll, strict=True):
    given = joint[tuple(slice(None) if m else 0 for m in mask)]
    given = given / given.sum()
    for axis, i in enumerate(np.flatnonzero(mask)):
      others = tuple(j for j in range(given.ndim) if j != axis)
      row[i] = -np.log(given.sum(axis=others)[0])
  return nll


@pytest.mark.parametrize('schedule', SCHEDULES)
@pytest.mark.parametrize('density', ['uniform', 'importance'])
def test_expected_loss_is_the_log_likelihood_of_exact_predictions(
  schedule, density
):
  """A bound is tight for exact conditionals, whatever the mask ratios.

  All masks and a quadrature over the time: the weights of the positions belong
  to their own mask ratios.
  """
  c = dataclasses.replace(BLOCK, schedule=Schedule(schedule), eps=1e-6)
  if density == 'importance':
    bell = TimeDensity('bell', width=0.3, uniform_share=0.5)
    c = dataclasses.replace(c, time_density=bell, weight=Weight('importance'))
  joint = np.random.default_rng(1).dirichlet(np.ones(3**N) / 2)
  joint = joint.reshape([3] * N)
  nll = exact_nll(joint)
  points = 8192
  # Denser at early times, where later positions have large weights.
  edges = np.linspace(0, 1, points + 1) ** 3
  u, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
  ratio = mask_ratios(c, u)
  found = np.zeros(2)
  for mask, row in zip(MASKS, nll, strict=True):
    canvas = draw(c, u, np.tile(mask, (points, 1)))
    loss = (np.asarray(canvas.weights, np.float64) * np.tile(row, 2)).reshape(
      points, 2, N
    )
    probability = np.where(mask, ratio, 1 - ratio).prod(axis=1)
    found += (width * probability) @ loss.sum(axis=2)
  np.testing.assert_allclose(found, -np.log(joint[0, 0, 0]), rtol=3e-3)


def mask_ratios(c, u):
  """Returns [B, N], the mask ratios of a block, from their definition."""
  d = np.asarray(c.time_density.quantile(jnp.asarray(u, jnp.float32)))
  t = (1 - c.eps) * d.astype(np.float64) + c.eps
  return c.schedule.mask_ratio(t)[:, None] ** np.array([2.0, 1.0, 0.5])


def test_masks_have_the_ratio_of_their_position():
  u = (np.arange(20_000) + 0.5) / 20_000
  canvas = draw(BLOCK, u, None)
  masked = np.asarray(canvas.inputs[:, : 2 * N] == BLOCK.mask_id)
  share = masked.reshape(-1, 2, N).mean(axis=0)
  # The mean of t**e over uniform times.
  np.testing.assert_allclose(
    share, np.tile([1 / 3, 1 / 2, 2 / 3], (2, 1)), atol=0.01
  )
  np.testing.assert_allclose(
    canvas.mask_ratio,
    np.repeat(mask_ratios(BLOCK, u).mean(axis=1)[:, None], 2, axis=1),
    atol=1e-5,
  )


@pytest.mark.parametrize('weight', [Weight(), Weight('power', 1.0)])
def test_expected_weight_of_every_position_is_one(weight):
  c = dataclasses.replace(
    BLOCK, weight=weight, time_density=TimeDensity('bell', width=0.12)
  )
  u = (np.arange(20_000) + 0.5) / 20_000
  canvas = draw(c, u, np.ones((len(u), N), bool))
  weights = np.asarray(canvas.weights, np.float64).reshape(-1, 2, N)
  expected = (weights * mask_ratios(c, u)[:, None]).mean(axis=0)
  np.testing.assert_allclose(expected, 1, rtol=1e-3)


@pytest.mark.slow
def test_positions_are_equal_after_uniform_after():
  c = dataclasses.replace(BLOCK, uniform_after=0.5)
  plain = dataclasses.replace(c, position_power=1.0)
  args = (
    Rows(jnp.zeros((4, 2 * N), jnp.int32)),
    jnp.arange(4),
    jax.random.key(0),
    4,
  )
  at = lambda c, progress: block_diffusion.make_canvas(c, *args, progress)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
    at(c, 0.5),
    at(plain, 0.5),
  )
  assert (at(c, 0.4).weights != at(plain, 0.4).weights).any()
  assert not c.is_bound(0.4) and c.is_bound(0.5)


def test_heldout_bound_has_equal_positions():
  config = tiny.config(
    {
      'objective.name': 'block_diffusion',
      'objective.block_length': 4,
      'objective.position_power': 2.0,
    }
  )
  c = step.step_config(config)
  assert c.objective.position_power == 2
  assert len(c.objective.position_schedules) == 4
  bound = evaluation.eval_config(c).objective
  assert bound.position_power == 1 and bound.is_bound(0)


@pytest.mark.slow
def test_masks_do_not_depend_on_devices_or_parts():
  c = dataclasses.replace(BLOCK, block_length=4)
  draw = jax.jit(
    lambda rows, numbers: block_diffusion.make_canvas(
      c, rows, numbers, jax.random.key(0), 64
    )
  )
  check_rows_do_not_depend_on_devices_or_parts(
    lambda tokens, numbers: draw(
      tokens if isinstance(tokens, Rows) else Rows(tokens), numbers
    )
  )


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'objective.name': 'block_diffusion', 'objective.block_length': 1},
  ],
)
def test_other_objectives_are_refused(changes):
  config = tiny.config({'objective.position_power': 2.0, **changes})
  with pytest.raises(UserError, match='position_power=1$'):
    validate(config)
