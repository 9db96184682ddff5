"""Drawn tokens and their confidence, against LLaDA's draws and NumPy."""

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from maskdiff.sampling import candidates

TEMPERATURES = ['0.0', '0.2', '0.5', '1.0', '1.5']


def keys(n):
  return jax.random.split(jax.random.key(0), n)


def rows(value, number, dtype=jnp.float32):
  return jnp.full((number,), value, dtype)


def draw(logits, temperature, top_k, top_p, row_keys):
  """Draws with the same settings in all rows."""
  n = len(logits)
  k = rows(top_k, n, jnp.int32)
  return candidates.draw(
    logits, rows(temperature, n), k, rows(top_p, n), row_keys
  )


def truncate(logits, top_k, top_p):
  """Truncates logits [n, V], with the same settings in all rows."""
  n = len(logits)
  k, p = rows(top_k, n, jnp.int32), rows(top_p, n)
  return candidates.truncate(jnp.asarray(logits)[:, None], k, p)[:, 0]


def draws(logits, temperature, top_k=0, top_p=1.0, number=6000):
  """Returns how often each token is drawn for one slot."""
  many = jnp.broadcast_to(
    jnp.asarray(logits, jnp.float32), (number, 1, len(logits))
  )
  token = draw(many, temperature, top_k, top_p, keys(number))
  return np.bincount(np.asarray(token)[:, 0], minlength=len(logits))


LOGITS = np.array([0.3, -1.0, 1.2, 0.0, 2.0, 0.8, -0.2])


# The draw


@pytest.mark.parametrize('temperature', TEMPERATURES)
def test_drawn_token_equals_llada_for_the_same_noise(monkeypatch, temperature):
  """LLaDA divides exponentials in float64; `draw` adds noise in float32."""
  with np.load(golden_models.GOLDEN / 'gumbel_op.npz') as file:
    logits, u = file['logits'], file['u']
    recorded = file[f'T{temperature}.argmax']
  noise = jnp.asarray(-np.log(-np.log(u)), jnp.float32)[:, None]
  monkeypatch.setattr(candidates, 'gumbel', lambda keys, shape: noise)
  token = draw(
    jnp.asarray(logits)[:, None], float(temperature), 0, 1.0, keys(len(u))
  )
  np.testing.assert_array_equal(token[:, 0], recorded)


@pytest.mark.parametrize('temperature', TEMPERATURES[1:])
def test_scores_equal_llada_in_log_space(temperature):
  with np.load(golden_models.GOLDEN / 'gumbel_op.npz') as file:
    noise = (-np.log(-np.log(file['u']))).astype(np.float32)
    scores = file['logits'] / np.float32(temperature) + noise
    recorded = file[f'T{temperature}.log_scores_over_T']
  np.testing.assert_allclose(scores, recorded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'temperature, top_k, top_p',
  [
    (0.5, 0, 1.0),
    (1.0, 0, 1.0),
    (2.0, 0, 1.0),
    (0.7, 3, 1.0),
    (1.5, 0, 0.8),
    (1.0, 5, 0.75),
  ],
)
def test_draws_follow_the_truncated_softmax(temperature, top_k, top_p):
  p = scipy.special.softmax(LOGITS / temperature)
  order = np.argsort(-p)
  stay = order[: top_k or len(p)]
  before = np.cumsum(p[stay] / p[stay].sum()) - p[stay] / p[stay].sum()
  stay = stay[before < top_p]
  counts = draws(LOGITS, temperature, top_k, top_p)
  assert counts[stay].sum() == counts.sum()
  expected = p[stay] / p[stay].sum() * counts.sum()
  assert scipy.stats.chisquare(counts[stay], expected).pvalue > 1e-3


def test_nucleus_is_the_smallest_set_that_reaches_top_p():
  logits = jnp.log(jnp.array([0.15, 0.4, 0.05, 0.3, 0.1]))
  for top_p, stay in (
    (0.39, [1]),
    (0.41, [1, 3]),
    (0.69, [1, 3]),
    (0.71, [0, 1, 3]),
    (0.99, [0, 1, 2, 3, 4]),
  ):
    left = truncate(logits[None], 0, top_p)[0]
    assert np.flatnonzero(left > -np.inf).tolist() == stay
    np.testing.assert_array_equal(left[np.array(stay)], logits[np.array(stay)])


def test_top_p_applies_after_top_k():
  logits = jnp.log(jnp.array([0.15, 0.4, 0.05, 0.3, 0.1]))
  # Of 0.4 and 0.3 the first is 0.57.
  assert (truncate(logits[None], 2, 0.5) > -np.inf).sum() == 1
  assert (truncate(logits[None], 2, 0.6) > -np.inf).sum() == 2


def test_most_probable_token_always_remains():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(50, 9)) * 9)
  for top_k, top_p in ((1, 1.0), (0, 1e-6), (1, 1e-6), (100, 1.0)):
    left = truncate(logits, top_k, top_p)
    np.testing.assert_array_equal(left.argmax(-1), logits.argmax(-1))


def test_suppressed_token_is_never_drawn():
  left = candidates.suppress(jnp.asarray(LOGITS)[None, None], (4, 2))
  for temperature in (0.0, 1.0):
    counts = draws(left[0, 0], temperature, 6, 0.95)
    assert counts[4] == counts[2] == 0


def test_suppression_of_some_rows_leaves_the_others():
  logits = jnp.broadcast_to(jnp.asarray(LOGITS), (3, 2, 7))
  which = jnp.array([[True, False], [False, False], [True, True]])
  some = candidates.suppress(logits, (4, 2), which)
  hidden = [np.flatnonzero(row[1] == -np.inf).tolist() for row in some]
  assert hidden == [[4], [], [2, 4]]
  np.testing.assert_array_equal(some[1], logits[1])
  nan = candidates.suppress(logits.at[1, 0, 4].set(jnp.nan), (4,), which[:, :1])
  assert np.isnan(nan[1, 0, 4])
  each = candidates.suppress_each(
    logits, jnp.array([[4, -1], [-1, -1], [0, 6]])
  )
  hidden = [np.flatnonzero(row[1] == -np.inf).tolist() for row in each]
  assert hidden == [[4], [], [0, 6]]


def counting(function, name):
  """Returns the function, and a list that grows at every run of it."""
  runs = []

  def counted(*args, **kwargs):
    jax.debug.callback(lambda: runs.append(name))
    return function(*args, **kwargs)

  return counted, runs


def test_noise_and_sort_run_only_if_a_row_needs_them(monkeypatch):
  noise, noises = counting(candidates.gumbel, 'noise')
  sort, sorts = counting(jnp.sort, 'sort')
  monkeypatch.setattr(candidates, 'gumbel', noise)
  monkeypatch.setattr(jnp, 'sort', sort)
  drawn = jax.jit(candidates.draw)
  logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (2, 1, 7))

  def counts(temperature, top_k, top_p):
    noises.clear(), sorts.clear()
    settings = map(jnp.array, (temperature, top_k, top_p))
    drawn(logits, *settings, keys(2)).block_until_ready()
    jax.effects_barrier()
    return len(noises), len(sorts)

  assert counts([0.0, 0.0], [0, 3], [0.5, 1.0]) == (0, 0)
  assert counts([0.0, 0.7], [2, 0], [0.5, 1.0]) == (1, 0)
  assert counts([0.0, 0.7], [0, 2], [1.0, 1.0]) == (1, 1)
  assert counts([0.5, 0.7], [0, 0], [1.0, 0.9]) == (1, 1)
  assert drawn._cache_size() == 1


def test_each_row_is_drawn_with_its_own_settings():
  """Equals the draw with the settings of the row in all rows, bit for bit."""
  logits = jnp.asarray(np.random.default_rng(2).normal(size=(6, 3, 40)) * 2)
  logits = logits.astype(jnp.float32)
  settings = [
    (0.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.3, 5, 1.0),
    (0.9, 0, 0.6),
    (2.0, 9, 0.8),
    (0.0, 2, 0.3),
  ]
  temperature, top_k, top_p = map(jnp.array, zip(*settings, strict=True))
  mixed = candidates.draw(logits, temperature, top_k, top_p, keys(6))
  for i, row in enumerate(settings):
    np.testing.assert_array_equal(mixed[i], draw(logits, *row, keys(6))[i])
  np.testing.assert_array_equal(mixed[0], logits[0].argmax(-1))
  np.testing.assert_array_equal(mixed[5], logits[5].argmax(-1))


# Confidence


@pytest.fixture
def slots():
  random = np.random.default_rng(1)
  logits = random.normal(size=(3, 4, 6)) * 2
  token = random.integers(0, 6, (3, 4))
  return logits, token, scipy.special.softmax(logits, axis=-1)


def confidence(kind, logits, token):
  return candidates.CONFIDENCES[kind](
    jnp.asarray(logits, jnp.float32), jnp.asarray(token)
  )


def test_probability_is_that_of_the_drawn_token(slots):
  logits, token, p = slots
  expected = np.take_along_axis(p, token[..., None], -1)[..., 0]
  np.testing.assert_allclose(
    confidence('probability', logits, token), expected, rtol=1e-5
  )


def test_entropy_confidence_is_one_minus_normalized_entropy(slots):
  logits, token, p = slots
  expected = 1 - scipy.stats.entropy(p, axis=-1) / np.log(6)
  np.testing.assert_allclose(
    confidence('entropy', logits, token), expected, atol=1e-5
  )


def test_margin_is_between_the_top_two_tokens(slots):
  logits, token, p = slots
  falling = -np.sort(-p, axis=-1)
  np.testing.assert_allclose(
    confidence('margin', logits, token),
    falling[..., 0] - falling[..., 1],
    atol=1e-6,
  )


@pytest.mark.parametrize('kind', candidates.CONFIDENCES)
def test_confidence_of_a_certain_token_is_one(kind):
  logits = jnp.full((1, 1, 5), -jnp.inf).at[..., 2].set(0.3)
  np.testing.assert_allclose(confidence(kind, logits, [[2]]), 1.0, atol=1e-6)


@pytest.mark.parametrize(
  'kind, lowest', [('probability', 0.2), ('entropy', 0), ('margin', 0)]
)
def test_confidence_is_lowest_for_a_uniform_distribution(kind, lowest):
  np.testing.assert_allclose(
    confidence(kind, np.zeros((1, 1, 5)), [[2]]), lowest, atol=1e-6
  )


@pytest.mark.parametrize('kind', candidates.CONFIDENCES)
@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_confidence_is_nan_if_logits_are_not_finite(kind, bad):
  logits = np.zeros((1, 3, 5))
  logits[0, 1, 3] = bad
  logits[0, 2] = bad
  token = draw(jnp.asarray(logits), 0.0, 0, 1.0, keys(1))
  found = np.isnan(confidence(kind, logits, token))
  assert found.tolist() == [[False, True, True]]


def test_guidance_combines_logits_linearly():
  """Rows with scale 0 have the conditional logits, whatever the others are."""
  c = jnp.array([[[1.0, 2.0]], [[1.0, 2.0]], [[0.1, -jnp.inf]]])
  u = jnp.array([[[0.5, 3.0]], [[0.5, 3.0]], [[0.7, jnp.nan]]])
  scale = jnp.array([0.0, 1.5, 0.0])[:, None, None]
  found = candidates.guide(c, u, scale)
  np.testing.assert_array_equal(found[jnp.array([0, 2])], c[jnp.array([0, 2])])
  np.testing.assert_allclose(found[1, 0], [1.75, 0.5])


def test_best_takes_the_lowest_id_on_ties():
  rng = np.random.default_rng(0)
  logits = rng.integers(-3, 3, (4, 5, 40)).astype(np.float32)
  logits[0, 0], logits[0, 1, 7] = -np.inf, np.inf
  logits[0, 2, :39] = -np.inf
  found = jax.jit(candidates.best)(logits)
  assert found.dtype == jnp.int32
  np.testing.assert_array_equal(found, logits.argmax(axis=-1))
