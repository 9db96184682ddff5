"""Learning-rate schedules; AdamW against the published algorithm."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskdiff.distributed import mesh
from maskdiff.model import transformer
from maskdiff.training import optimizer

CONSTANT = tiny.OPTIMIZER
TINY = tiny.model(vocab_size=8, embed=8, kv_heads=2, head_dim=4, mlp=8)
AXES = {'matrix': ('embed', 'mlp'), 'gain': ('embed',)}


def check_rates(steps_and_rates, steps=None, **settings):
  """Checks a schedule at some (step, rate) pairs."""
  rate = optimizer.learning_rate(
    dataclasses.replace(CONSTANT, **settings), steps
  )
  for step, expected in steps_and_rates:
    actual = float(rate(jnp.int32(step)))
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-12), step


def draw(scale=1.0, seed=0):
  random = np.random.default_rng(seed)
  shapes = {'matrix': (4, 3), 'gain': (4,)}
  return {
    name: np.asarray(scale * random.normal(size=shape), np.float32)
    for name, shape in shapes.items()
  }


def make(c, axes=AXES):
  return optimizer.make_optimizer(c, 1000, axes)


def walk(c, params, gradients):
  """Returns the parameters after each update."""
  tx = make(c)
  state, trail = tx.init(params), []
  for g in gradients:
    updates, state = tx.update(g, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    trail.append(params)
  return trail


def adamw(c, params, gradients, rate=lambda step: 0.1):
  """Algorithm 2 of arXiv 1711.05101, after clipping by the global norm.

  theta <- theta - rate (m / (sqrt(v) + eps) + weight_decay theta), with m and
  v corrected for their bias towards 0; gains do not decay.
  """
  theta = {name: x.astype(np.float64) for name, x in params.items()}
  m = {name: 0 * x for name, x in theta.items()}
  v = {name: 0 * x for name, x in theta.items()}
  trail = []
  for step, g in enumerate(gradients):
    norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in g.values()))
    for name in theta:
      x = g[name] * min(1, c.clip_norm / norm)
      m[name] = c.b1 * m[name] + (1 - c.b1) * x
      v[name] = c.b2 * v[name] + (1 - c.b2) * x**2
      m_hat = m[name] / (1 - c.b1 ** (step + 1))
      v_hat = v[name] / (1 - c.b2 ** (step + 1))
      decay = c.weight_decay * theta[name] if name == 'matrix' else 0
      direction = m_hat / (np.sqrt(v_hat) + c.eps) + decay
      theta[name] = theta[name] - rate(step) * direction
    trail.append(dict(theta))
  return trail


def assert_close(actual, expected, rtol=1e-5):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=1e-6),
    actual,
    expected,
  )


# Schedules


def test_llada_8b_schedule():
  """arXiv 2502.09992 section 2.2, in steps of 1280 x 4096 tokens.

  Warmup over 2000 steps, 4e-4 up to 1.2T tokens, 1e-4 for 0.8T, decay to 1e-5
  over the last 0.3T. The change to 1e-4 is a jump: they resumed after a NaN.
  """
  check_rates(
    [
      (0, 0),
      (1, 2e-7),
      (1000, 2e-4),
      (2000, 4e-4),
      (100_000, 4e-4),
      (228_881, 4e-4),
      (228_882, 1e-4),
      (381_469, 1e-4),
      (381_470, 1e-4),
      (410_080, 5.5e-5),
      (438_690, 1e-5),
      (500_000, 1e-5),
    ],
    steps=438_690,
    pieces=(
      (2000, 0, 4e-4),
      (228_882, 4e-4, 4e-4),
      (381_470, 1e-4, 1e-4),
      (438_690, 1e-4, 1e-5),
    ),
  )
  tokens = lambda step: step * 1280 * 4096 / 1e12
  assert tokens(228_882) == pytest.approx(1.2, abs=1e-5)
  assert tokens(381_470) == pytest.approx(2.0, abs=1e-5)
  assert tokens(438_690) == pytest.approx(2.3, abs=1e-5)


def test_wsd_schedule():
  check_rates(
    [(0, 0), (5, 0.5), (10, 1), (50, 1), (80, 1), (90, 0.55), (100, 0.1)]
    + [(150, 0.1)],
    steps=100,
    schedule='wsd',
    learning_rate=1.0,
    final_learning_rate=0.1,
    warmup_steps=10,
    decay_steps=20,
  )


@pytest.mark.parametrize(
  'warmup, decay, landmarks',
  [
    (0, 20, [(0, 1), (80, 1), (100, 0.1)]),
    (10, 0, [(0, 0), (10, 1), (100, 1)]),
    (0, 0, [(0, 1), (100, 1)]),
    (50, 50, [(0, 0), (50, 1), (75, 0.55), (100, 0.1)]),
  ],
)
def test_wsd_phases_may_be_empty(warmup, decay, landmarks):
  check_rates(
    landmarks,
    steps=100,
    schedule='wsd',
    learning_rate=1.0,
    final_learning_rate=0.1,
    warmup_steps=warmup,
    decay_steps=decay,
  )


def test_cosine_schedule():
  wave = lambda share: 0.1 + 0.9 * (1 + np.cos(np.pi * share)) / 2
  check_rates(
    [(0, 0), (5, 0.5), (10, 1), (55, 0.55), (100, 0.1), (150, 0.1)]
    + [(10 + 30, wave(1 / 3)), (10 + 60, wave(2 / 3))],
    steps=100,
    schedule='cosine',
    learning_rate=1.0,
    final_learning_rate=0.1,
    warmup_steps=10,
  )


# Update rule


def test_update_is_adamw():
  c, params = dataclasses.replace(CONSTANT, clip_norm=4.0), draw()
  gradients = [draw(scale, n) for n, scale in enumerate((1, 9, 0.1, 1e-3, 5))]
  norms = [np.sqrt(sum((x**2).sum() for x in g.values())) for g in gradients]
  assert min(norms) < c.clip_norm < max(norms)  # clips some
  assert_close(walk(c, params, gradients), adamw(c, params, gradients))


def test_update_follows_the_schedule():
  c = dataclasses.replace(CONSTANT, pieces=((4, 0.0, 0.1), (8, 0.1, 0.02)))
  plan = [0, 0.025, 0.05, 0.075, 0.1, 0.08, 0.06, 0.04]
  params, gradients = draw(), [draw(1, n) for n in range(8)]
  assert_close(
    walk(c, params, gradients), adamw(c, params, gradients, plan.__getitem__)
  )


def test_bfloat16_moments_are_rounded_once_per_step():
  """A float32 step from the stored moments gives the same after rounding."""
  c = dataclasses.replace(CONSTANT, moments='bfloat16')
  params = draw()
  rounded, exact = make(c), make(CONSTANT)
  state, reference = rounded.init(params), exact.init(params)
  adam = lambda state: next(s for s in state if hasattr(s, 'mu'))
  for n in range(20):
    before = adam(state)
    _, state = rounded.update(draw(1, n), state, params)
    # The same step in float32, from the stored moments.
    widened = before._replace(
      mu=jax.tree.map(jnp.float32, before.mu),
      nu=jax.tree.map(jnp.float32, before.nu),
    )
    start = tuple(widened if hasattr(s, 'mu') else s for s in reference)
    _, expected = exact.update(draw(1, n), start, params)
    for stored, full in zip(adam(state)[1:], adam(expected)[1:], strict=True):
      assert {x.dtype for x in jax.tree.leaves(stored)} == {
        jnp.dtype('bfloat16')
      }
      jax.tree.map(
        lambda k, f: np.testing.assert_array_equal(k, f.astype('bfloat16')),
        stored,
        full,
      )


def test_bfloat16_moments_train_like_float32():
  c = dataclasses.replace(CONSTANT, moments='bfloat16')
  params, gradients = draw(), [draw(1, n) for n in range(50)]
  assert_close(
    walk(c, params, gradients)[-1],
    walk(CONSTANT, params, gradients)[-1],
    rtol=0.03,
  )


def test_only_matrices_decay():
  """A zero gradient shrinks matrices by rate x decay and keeps gains."""
  filled = lambda value: jax.tree.map(
    lambda x: np.full(x.shape, value, x.dtype), transformer.shapes(TINY)
  )
  tx = make(CONSTANT, transformer.axes(TINY))

  @jax.jit
  def step(params, gradients):
    return tx.update(gradients, tx.init(params), params)[0]

  updates = step(filled(1), filled(0))
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    gain = path[-1].key.startswith('norm')
    expected = 0 if gain else -0.1 * CONSTANT.weight_decay
    np.testing.assert_allclose(update, expected, rtol=1e-6)


def test_gradients_are_clipped_to_the_clip_norm():
  c = dataclasses.replace(CONSTANT, clip_norm=1.0, eps=0.1)
  params, g = draw(), draw()
  norm = np.sqrt(sum((x**2).sum() for x in g.values()))
  unit = {name: x / norm for name, x in g.items()}
  times = lambda k: {name: k * x for name, x in unit.items()}
  clipped, at_the_norm, shorter = (
    walk(c, params, [times(k)])[0] for k in (10, 1, 0.5)
  )
  assert_close(clipped, at_the_norm, 1e-6)
  assert np.abs(shorter['matrix'] - clipped['matrix']).max() > 1e-3


@pytest.mark.parametrize(
  'sizes', [dict(fsdp=8), dict(fsdp=2, sequence=2, tensor=2)]
)
def test_moments_are_sharded_like_parameters(sizes):
  m = mesh.make_mesh(**sizes)
  shapes, axes = transformer.shapes(TINY), transformer.axes(TINY)
  placed = mesh.param_shardings(m, axes, shapes)
  everywhere = mesh.replicated(m)
  tx = make(CONSTANT, axes)
  shardings = optimizer.state_shardings(tx, shapes, placed, everywhere)
  state = jax.eval_shape(tx.init, shapes)
  assert jax.tree.structure(shardings) == jax.tree.structure(state)
  adam = next(s for s in shardings if hasattr(s, 'mu'))
  assert adam.mu == placed
  assert adam.nu == placed
  assert adam.count == everywhere
