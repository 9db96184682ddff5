"""Queries drawn in jit equal those of the host for the same random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from loss_cases import MESHES, set_mesh

from maskdiff.distributed import mesh as mesh_lib
from maskdiff.likelihood import device_queries, estimators
from maskdiff.likelihood.estimators import Estimator

EVERY = [
  Estimator(form, 24, strata, coupled)
  for form in estimators.FORMS
  for strata in (1, 4)
  for coupled in (False, True)
]
name = lambda e: f'{e.form}-{e.strata}' + '-coupled' * e.coupled
# Prompts, suffixes, gaps, padding, a single token, a whole row, no answer.
ANSWER = np.array(
  [[c == 'x' for c in row] for row in (
    '..xxxx......',
    'x.x.x.x.x.x.',
    '...........x',
    'xxxxxxxxxxxx',
    '............',
    '.xxx..xxx...',
  )]
)  # fmt: skip
ROWS = np.arange(len(ANSWER), dtype=np.int32) + 3
KEY = jax.random.key(7)


def host_queries(e, times, noise):
  """Returns the host's queries for the random numbers of one row.

  Args:
    e: Estimator.
    times: [n].
    noise: [n, A].
  """
  times = times.astype(np.float64)
  if e.form == 'bernoulli':
    return estimators.bernoulli(times, noise, e.coupled)
  size = noise.shape[1]
  counts = (
    np.ceil(times * (size + 1)) - 1 if e.coupled else np.ceil(times * size)
  )
  ranks = scipy.stats.rankdata(noise, axis=1, method='ordinal') - 1
  return estimators.exact_count(counts, ranks, e.coupled)


@pytest.mark.parametrize('e', EVERY, ids=name)
def test_queries_equal_those_of_the_host(e):
  length = ANSWER.shape[1]
  times, noise = map(
    np.array, device_queries.random_numbers(e, length, KEY, ROWS)
  )
  found = jax.jit(device_queries.draw, static_argnums=0)(e, ANSWER, KEY, ROWS)
  assert found.weight.dtype == jnp.float32
  for i, answer in enumerate(ANSWER):
    masked = np.array(found.masked[:, i])
    np.testing.assert_array_equal(masked, found.scored[:, i])
    assert not masked[:, ~answer].any()
    if not answer.any():
      assert not np.array(found.weight[:, i]).any()
      continue
    expected = host_queries(e, times[:, i], noise[:, i, answer])
    np.testing.assert_array_equal(masked[:, answer], expected.masked)
    # 1 - t is rounded to float32 before the division.
    np.testing.assert_allclose(found.weight[:, i], expected.weight, rtol=2e-7)


@pytest.mark.parametrize('coupled', [False, True])
def test_times_at_the_ends_have_finite_weights(coupled):
  """The smallest and the largest time that `random_numbers` can return."""
  times = jnp.array([[2.0**-23], [1.0]])
  noise = jnp.full((2, 1, 4), 0.5)
  answer = jnp.ones((1, 4), bool)
  for form in (device_queries.bernoulli, device_queries.exact_count):
    found = form(times, noise, answer, coupled)
    assert np.isfinite(found.weight).all()
    assert found.masked.sum(axis=-1).max() == 4


@pytest.mark.parametrize('strata', [1, 4])
def test_times_of_a_group_are_stratified(strata):
  e = Estimator('count', 64, strata)
  times, noise = device_queries.random_numbers(e, 5, KEY, ROWS)
  assert times.shape == (64, len(ROWS)) and noise.shape == (64, len(ROWS), 5)
  assert 0 < times.min() and times.max() <= 1
  groups = np.array(times).reshape(-1, strata, len(ROWS))
  low = np.arange(strata)[:, None] / strata
  assert ((low < groups) & (groups <= low + 1 / strata)).all()
  assert scipy.stats.kstest(np.ravel(times), 'uniform').pvalue > 1e-3
  assert scipy.stats.kstest(np.ravel(noise), 'uniform').pvalue > 1e-3


def test_draws_of_a_row_depend_on_its_number_only():
  e = Estimator('count', 8, 4)
  draw = lambda answer, rows, key=KEY: (
    device_queries.draw(e, answer, key, rows).masked
  )
  order = np.array([3, 0, 5])
  expected = np.array(draw(ANSWER, ROWS))
  np.testing.assert_array_equal(
    draw(ANSWER[order], ROWS[order]), expected[:, order]
  )
  # Padding on the right changes nothing.
  wider = np.pad(ANSWER, ((0, 0), (0, 4)))
  np.testing.assert_array_equal(draw(wider, ROWS)[..., :12], expected)
  # Equal numbers share masks; other numbers, queries and keys do not.
  full, numbers = np.ones(ANSWER.shape, bool), np.array([4, 4, 5, 6, 7, 8])
  found = np.array(draw(full, numbers))
  np.testing.assert_array_equal(found[:, 0], found[:, 1])
  assert len(np.unique(found[:, 1:].reshape(-1, 12), axis=0)) > 30
  assert (found != draw(full, numbers, jax.random.key(8))).any()


def test_draws_do_not_depend_on_the_mesh():
  e = Estimator('count', 8, 4, coupled=True)
  answer = np.concatenate([ANSWER, ANSWER])[:8]
  rows = np.arange(8, dtype=np.int32)
  draw = jax.jit(device_queries.draw, static_argnums=0)
  expected = draw(e, answer, KEY, rows)
  with set_mesh(MESHES['fsdp8']):
    mesh = mesh_lib.make_mesh(fsdp=8)
    answer = jax.device_put(answer, mesh_lib.batch_sharding(mesh))
    found = draw(e, answer, KEY, rows)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_array_equal(a, b)


def test_causal_query_scores_the_answer_and_masks_nothing():
  masked, scored, weight = device_queries.causal(ANSWER)
  np.testing.assert_array_equal(scored, ANSWER[None])
  assert not np.array(masked).any()
  np.testing.assert_array_equal(weight, np.ones((1, len(ANSWER))))
