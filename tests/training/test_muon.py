"""Muon against the published algorithm, on meshes and in checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from maskdiff.checkpoints.checkpoint import Checkpointer
from maskdiff.checkpoints.manifest import Meta
from maskdiff.checkpoints.restore import targets
from maskdiff.distributed import mesh as mesh_lib
from maskdiff.model import transformer
from maskdiff.training import muon, optimizer, train_state

CONFIG = dataclasses.replace(tiny.OPTIMIZER, name='muon')
# Three shapes of matrices: 16 x 16, 16 x 8 and 16 x 24, in three layers.
MODEL = tiny.model(
  layers=3, heads=4, kv_heads=2, head_dim=4, qkv_bias=True, qk_norm=True
)
AXES = transformer.axes(MODEL)
SHAPES = transformer.shapes(MODEL)
MATRICES = {'q', 'k', 'v', 'o', 'gate', 'up', 'down'}
# The numbers of matrices, 6 to 9, are not divisible by 8.
MESHES = [dict(fsdp=8), dict(replica=2, fsdp=2, tensor=2)]
# A few parameters, for updates without jit.
FEW_AXES = {
  'embed': ('vocab', 'embed'),
  'gain': ('layers', 'embed'),
  'matrix': ('layers', 'embed', 'mlp'),
}


def draw(seed=0, scale=1.0):
  random = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: np.asarray(scale * random.normal(size=x.shape), np.float32),
    SHAPES,
  )


def draw_few(seed):
  random = np.random.default_rng(seed)
  shapes = {'embed': (9, 4), 'gain': (2, 4), 'matrix': (2, 4, 6)}
  return {
    name: np.asarray(random.normal(size=shape), np.float32)
    for name, shape in shapes.items()
  }


def make(axes=AXES, **changes):
  return optimizer.make_optimizer(
    dataclasses.replace(CONFIG, **changes), 1000, axes
  )


def matrix(name, x):
  """Returns the matrices of a weight, [N, rows, columns]."""
  x = np.asarray(x, np.float64)
  if name == 'o':
    return x.reshape(x.shape[0], -1, x.shape[-1])
  return x.reshape(*x.shape[:2], -1)


def polynomial(s):
  """Five iterations of the published polynomial, in float64."""
  for _ in range(5):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
  return s


def orthogonalized(x):
  """The update of one matrix from its singular values, in float64."""
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  scale = 0.2 * np.sqrt(max(x.shape))
  return scale * (u * polynomial(s / np.linalg.norm(s))) @ vt


def of_path(path):
  return path[-1].key


def compare(actual, expected, limit):
  """Checks the relative norm of the difference of every array."""

  def one(path, a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    difference = np.linalg.norm(a - b)
    assert difference <= limit * np.linalg.norm(b), (path, difference)

  jax.tree_util.tree_map_with_path(one, actual, expected)


# One matrix


def test_five_iterations_give_singular_values_of_about_1():
  """The range that the docstring of `muon.COEFFICIENTS` states."""
  found = polynomial(np.linspace(0.01, 1, 100_000))
  assert 0.68 < found.min() < 0.69 and 1.13 < found.max() < 1.14
  assert polynomial(np.linspace(0, 0.01, 100_000)).max() < 1.21
  assert polynomial(1e-9) == pytest.approx(485e-9, rel=1e-3)


@pytest.mark.parametrize('shape', [(12, 12), (12, 40), (40, 12)])
def test_singular_vectors_stay_and_values_become_about_1(shape):
  """The iteration has no decomposition; the reference is a float64 SVD."""
  x = np.random.default_rng(1).normal(size=shape)
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  found = np.asarray(muon.newton_schulz(jnp.float32(x)), np.float64)
  inside = u.T @ found @ vt.T
  expected = polynomial(s / np.linalg.norm(s))
  assert 0.68 < expected.min() and expected.max() < 1.21
  np.testing.assert_allclose(inside, np.diag(expected), atol=1e-4)
  np.testing.assert_allclose(found, u @ inside @ vt, atol=1e-4)


def test_first_update_is_that_of_optax():
  """Later updates of optax have another momentum: its bias is corrected."""
  x = jnp.float32(np.random.default_rng(2).normal(size=(10, 30)))
  tx = optax.contrib.muon(1.0, consistent_rms=muon.RMS)
  expected, _ = tx.update(x, tx.init(x), x)
  found = muon.RMS * np.sqrt(30) * muon.newton_schulz(x)
  np.testing.assert_allclose(-found, expected, atol=1e-5)


def test_zero_and_tiny_matrices_give_finite_updates():
  for size in (0.0, 1e-30, 1e-6):
    found = muon.newton_schulz(jnp.full((4, 4), size))
    assert np.all(np.isfinite(found))
    assert np.any(found) == (size > 0)


# Which parameters, and which sides


def test_matrices_of_the_layers_have_two_sides():
  sides = jax.tree.map(
    muon.matrix_sides, AXES, is_leaf=lambda a: isinstance(a, tuple)
  )
  blocks = sides.pop('blocks')
  assert {name for name, s in blocks.items() if s} == MATRICES
  assert blocks['q'] == blocks['k'] == blocks['v'] == ((1,), (2, 3))
  assert blocks['o'] == ((1, 2), (3,))
  assert blocks['gate'] == blocks['down'] == ((1,), (2,))
  assert not any(sides.values())  # embedding, head and last gain


def test_a_new_matrix_needs_no_name():
  """Square matrices between axes without embed, and a gain per head."""
  axes = {'new': ('layers', 'mlp', 'mlp'), 'g': ('layers', 'heads', 'head_dim')}
  tx = optimizer.make_optimizer(CONFIG, 1000, axes)
  random = np.random.default_rng(0)
  g = {'new': random.normal(size=(2, 5, 7)), 'g': random.normal(size=(2, 3, 4))}
  g = jax.tree.map(np.float32, g)
  zeros = jax.tree.map(np.zeros_like, g)
  updates, _ = tx.update(g, tx.init(zeros), zeros)
  for found, x in zip(updates['new'], g['new'], strict=True):
    np.testing.assert_allclose(found, -0.1 * orthogonalized(x), atol=1e-5)
  np.testing.assert_allclose(updates['g'], -0.1 * np.sign(g['g']), rtol=1e-4)


def test_a_parameter_with_three_sides_is_refused():
  with pytest.raises(ValueError, match="'mlp', 'vocab'.* is not a stack"):
    muon.matrix_sides(('layers', 'embed', 'mlp', 'vocab'))


# Updates


def test_update_is_muon_with_nesterov_momentum():
  """Every layer of every matrix is orthogonalized separately, in float64."""
  tx, params = make(clip_norm=20.0), draw(9)
  state = tx.init(params)
  update = jax.jit(tx.update)
  momentum = {name: 0.0 for name in MATRICES}
  for n in range(4):
    g = draw(n, [0.1, 5, 0.01, 1][n])
    norm = np.sqrt(
      sum((x.astype(float) ** 2).sum() for x in jax.tree.leaves(g))
    )
    updates, state = update(g, state, params)
    for name in MATRICES:
      x = matrix(name, g['blocks'][name]) * min(1, 20 / norm)
      momentum[name] = 0.95 * momentum[name] + 0.05 * x
      directions = 0.95 * momentum[name] + 0.05 * x
      expected = np.stack([orthogonalized(d) for d in directions])
      expected += 0.1 * matrix(name, params['blocks'][name])
      found = matrix(name, updates['blocks'][name])
      np.testing.assert_allclose(found, -0.1 * expected, atol=2e-4)


def test_update_has_the_root_mean_square_of_adamw():
  """0.2 per element, between 0.68 and 1.21 times for random gradients."""
  tx, g = make(weight_decay=0.0), draw()
  updates, _ = jax.jit(tx.update)(g, tx.init(g), g)
  for name in MATRICES:
    layers = matrix(name, updates['blocks'][name])
    rms = np.sqrt((layers**2).mean((1, 2))) / 0.1
    assert np.all((0.68 * 0.2 < rms) & (rms < 1.21 * 0.2)), name


def test_other_parameters_get_the_updates_of_adamw():
  """Bit for bit, from gradients that are clipped together."""
  names = ('adamw', 'muon')
  both = {name: make(FEW_AXES, name=name, clip_norm=5.0) for name in names}
  params = draw_few(9)
  states = {name: tx.init(params) for name, tx in both.items()}
  for n in range(3):
    updates = {}
    for name, tx in both.items():
      found = tx.update(draw_few(n), states[name], params)
      updates[name], states[name] = found
    equal = jax.tree.map(np.array_equal, *updates.values())
    assert equal == {'embed': True, 'gain': True, 'matrix': False}


def momentum_of(state):
  return state[1].inner_states['muon'].inner_state.momentum


def test_bfloat16_momentum_is_rounded_once_per_step():
  """A float32 step from the stored momentum gives the same after rounding."""
  params = draw_few(9)
  rounded, exact = make(FEW_AXES, moments='bfloat16'), make(FEW_AXES)
  state = rounded.init(params)
  adam = state[1].inner_states['adam'].inner_state
  for tree in (momentum_of(state), adam.mu, adam.nu):
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype('bfloat16')}
  for n in range(3):
    before = jax.tree.map(
      lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state
    )
    updates, state = rounded.update(draw_few(n), state, params)
    expected, after = exact.update(draw_few(n), before, params)
    jax.tree.map(
      lambda a, b: np.testing.assert_array_equal(a, b.astype('bfloat16')),
      momentum_of(state),
      momentum_of(after),
    )
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_state_has_one_array_per_matrix_and_two_for_the_rest():
  state = jax.eval_shape(make().init, SHAPES)
  sizes = jax.tree_util.tree_map_with_path(
    lambda path, x: x.size * (1 if of_path(path) in MATRICES else 2), SHAPES
  )
  counts = 2  # the steps of Adam and of the schedule
  found = sum(x.size for x in jax.tree.leaves(state))
  assert found == sum(jax.tree.leaves(sizes)) + counts


# Devices


@functools.cache
def on_mesh(**sizes):
  """Returns shardings, updates of two steps, the program and the last state."""
  devices = jax.devices() if sizes else jax.devices()[:1]
  mesh = mesh_lib.make_mesh(**sizes, devices=devices)
  tx = make(clip_norm=5.0)
  shardings = train_state.shardings(MODEL, tx, mesh)
  place = lambda tree: jax.device_put(tree, shardings.params)
  with jax.set_mesh(mesh):
    params = place(draw(9))
    state = jax.device_put(tx.init(draw(9)), shardings.opt_state)
    update = jax.jit(
      tx.update, out_shardings=(shardings.params, shardings.opt_state)
    )
    update = update.lower(params, state, params).compile()
    trail = []
    for n in range(2):
      updates, state = update(place(draw(n)), state, params)
      trail.append(jax.tree.map(np.asarray, updates))
  return shardings, trail, update, state


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_updates_on_eight_devices_are_those_of_one(sizes):
  """Within float32 rounding."""
  compare(on_mesh(**sizes)[1], on_mesh()[1], 1e-5)


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_momentum_is_sharded_like_the_parameters(sizes):
  shardings = on_mesh(**sizes)[0]
  momentum = momentum_of(shardings.opt_state)['blocks']
  for name in MATRICES:
    assert momentum[name] == shardings.params['blocks'][name]
  assert isinstance(momentum['norm1'], optax.MaskedNode)


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_devices_exchange_shards_for_whole_matrices(sizes):
  """XLA would otherwise gather all matrices in every iteration."""
  text = on_mesh(**sizes)[2].as_text()
  assert ' all-to-all(' in text and ' all-gather(' not in text


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_a_device_stores_its_part_of_one_moment_of_the_matrices(sizes):
  """Plans report the same number, the bytes of the program's arguments."""
  shardings, _, program, _ = on_mesh(**sizes)

  def stored(path, x, sharding):
    size = np.prod(sharding.shard_shape(x.shape)) * 4
    # Matrices of layers: gradient, parameter, momentum. Embedding and head:
    # two moments. Vectors: two moments, and no parameter, because they do not
    # decay.
    return size * (4 if of_path(path) in ('embed', 'head') else 3)

  expected = jax.tree_util.tree_map_with_path(stored, SHAPES, shardings.params)
  expected = sum(jax.tree.leaves(expected)) + 2 * 4  # two counts
  found = program.memory_analysis().argument_size_in_bytes
  assert found == expected


# Checkpoints


def test_training_continues_from_a_checkpoint_bit_for_bit(tmp_path):
  shardings, _, update, state = on_mesh(fsdp=8)
  checkpointer = Checkpointer(tmp_path / 'checkpoints', keep=1)
  checkpointer.save(2, {'opt_state': state}, Meta(position=0))
  checkpointer.finish()
  shapes = jax.eval_shape(make().init, SHAPES)
  (restored,) = checkpointer.restore(
    2,
    checkpointer.read_meta(2),
    opt_state=targets(shapes, shardings.opt_state),
  )
  checkpointer.close()
  assert any(np.any(x) for x in jax.tree.leaves(momentum_of(restored)))
  place = lambda tree: jax.device_put(tree, shardings.params)
  results = [
    update(place(draw(2)), x, place(draw(9))) for x in (state, restored)
  ]
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, *results)
