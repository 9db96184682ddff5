"""Low-rank adapters: the function they compute, and what is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from maskdiff.distributed import mesh
from maskdiff.model import lora, masks, transformer
from maskdiff.model.lora import LoraConfig
from maskdiff.model.trainable import join

TOKENS = np.random.default_rng(0).integers(0, 24, (2, 8)).astype(np.int32)
ALL = LoraConfig(rank=3, alpha=6.0)
SOME = LoraConfig(rank=2, targets=('value', 'attention_output'))


def model(c, **changes):
  return tiny.model(lora=c, **changes)


def base_params():
  return tiny.strong_params()


def with_adapters(c, std=0.3, seed=3):
  """Returns parameters with random adapters, whose product is not 0."""
  random = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(std * random.normal(size=x.shape), x.dtype)
  adapters = lora.trained(transformer.shapes(model(c)))
  return join(base_params(), jax.tree.map(draw, adapters))


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params):
  network = transformer.bind(config, params)
  labels = masks.bidirectional(jnp.ones(TOKENS.shape, bool))
  return network.logits(network(jnp.asarray(TOKENS), labels))


def test_targets_name_matrices_and_axes_match():
  assert ALL.matrices == ['q', 'k', 'v', 'o', 'gate', 'up', 'down']
  assert SOME.matrices == ['v', 'o'] and not LoraConfig().matrices
  shapes = transformer.shapes(model(ALL))['blocks']
  axes = transformer.axes(model(ALL))['blocks']
  for matrix in ALL.matrices:
    of = axes[matrix][1:]
    inputs, outputs = lora.split_axes(matrix, of)
    assert axes[f'{matrix}_a'] == ('layers', *inputs, 'rank')
    assert axes[f'{matrix}_b'] == ('layers', 'rank', *outputs)
    for axis, size in zip(of, shapes[matrix].shape[1:], strict=True):
      part = 'a' if axis in inputs else 'b'
      name = f'{matrix}_{part}'
      assert shapes[name].shape[axes[name].index(axis)] == size
  adapters = lora.trained(shapes := transformer.shapes(model(SOME)))
  assert set(adapters['blocks']) == {'v_a', 'v_b', 'o_a', 'o_b'}
  plain = transformer.shapes(tiny.MODEL)
  assert lora.base(shapes) == plain and lora.trained(plain) == plain
  assert join(lora.base(shapes), adapters) == shapes


def test_adapters_are_sharded_as_their_matrices():
  m = mesh.make_mesh(fsdp=4, tensor=2)
  config = model(ALL, kv_heads=2)
  placed = mesh.param_shardings(
    m, transformer.axes(config), transformer.shapes(config)
  )['blocks']
  spec = lambda name: tuple(placed[name].spec)
  assert spec('q_a') == (None, mesh.STATE_AXES, None)
  assert spec('q_b') == (None, None, 'tensor', None)
  assert spec('o_a') == (None, 'tensor', None, None)
  assert spec('down_b') == (None, None, mesh.STATE_AXES)


def test_network_starts_as_its_base_to_the_bit():
  config = model(ALL)
  drawn = transformer.init(config, jax.random.key(0))
  params = join(base_params(), lora.trained(drawn))
  assert any(np.any(x) for x in jax.tree.leaves(lora.trained(drawn)))
  expected = logits(tiny.MODEL, base_params())
  np.testing.assert_array_equal(logits(config, params), expected)


@pytest.mark.parametrize('c', [ALL, SOME], ids=['all', 'some'])
def test_merged_parameters_have_the_same_logits(c):
  params = with_adapters(c)
  found = logits(model(c), params)
  merged = lora.merge(c, params)
  assert merged.keys() == base_params().keys()
  expected = logits(tiny.MODEL, merged)
  largest = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=1e-5 * largest)
  assert np.abs(expected - logits(tiny.MODEL, base_params())).max() > 0.1


def test_every_change_of_a_matrix_is_a_product_of_full_rank():
  """The adapters of full rank can compute what full fine-tuning computes."""
  c = LoraConfig(rank=16, alpha=4.0)
  random = np.random.default_rng(5)
  base, blocks = base_params(), {}
  changed = dict(base['blocks'])
  for matrix in c.matrices:
    w = base['blocks'][matrix]
    inputs, outputs = lora.split_axes(matrix, w.shape[1:])
    change = random.normal(size=(2, np.prod(inputs), np.prod(outputs))) / 4
    u, s, v = np.linalg.svd(change, full_matrices=False)
    k = s.shape[1]
    a, b = np.zeros((2, u.shape[1], 16)), np.zeros((2, 16, v.shape[2]))
    a[:, :, :k], b[:, :k] = u * s[:, None], v / c.scale
    blocks[f'{matrix}_a'] = jnp.float32(a.reshape(2, *inputs, 16))
    blocks[f'{matrix}_b'] = jnp.float32(b.reshape(2, 16, *outputs))
    changed[matrix] = w + jnp.float32(change.reshape(w.shape))
  found = logits(model(c), join(base, {'blocks': blocks}))
  expected = logits(tiny.MODEL, {**base, 'blocks': changed})
  largest = np.abs(expected).max()
  np.testing.assert_allclose(found, expected, atol=1e-4 * largest)


def test_adapters_of_full_rank_solve_a_linear_problem_as_full_training():
  """Both reach the least-squares solution; a rank below it does not."""
  random = np.random.default_rng(1)
  x = random.normal(size=(40, 4)).astype(np.float32)
  wanted = random.normal(size=(4, 3)).astype(np.float32)
  y = x @ wanted + 0.1 * random.normal(size=(40, 3)).astype(np.float32)
  w = random.normal(size=(4, 3)).astype(np.float32)
  best = np.linalg.lstsq(x, y, rcond=None)[0]

  def reached(rank):
    c = LoraConfig(rank=rank, alpha=float(rank))
    a = random.normal(size=(4, rank)).astype(np.float32) / 2

    def loss(adapters):
      weights = {'up': w, 'up_a': adapters[0], 'up_b': adapters[1]}
      found = lora.project(c, weights, 'up', 'bld,df->blf', x[None])[0]
      return jnp.mean((found - y) ** 2)

    def step(adapters, _):
      gradient = jax.grad(loss)(adapters)
      return jax.tree.map(lambda p, g: p - 0.1 * g, adapters, gradient), None

    start = (jnp.asarray(a), jnp.zeros((rank, 3)))
    (a, b), _ = jax.lax.scan(step, start, length=3000)
    return w + c.scale * a @ b

  np.testing.assert_allclose(reached(3), best, atol=2e-3)
  assert np.abs(reached(1) - best).max() > 0.1


def test_base_may_be_bfloat16():
  c = dataclasses.replace(ALL, base_dtype='bfloat16')
  config = model(c)
  shapes = transformer.shapes(config)
  drawn = jax.eval_shape(
    functools.partial(transformer.init, config), jax.random.key(0)
  )
  assert drawn == shapes
  for tree, dtype in (
    (lora.base(shapes), jnp.bfloat16),
    (lora.trained(shapes), jnp.float32),
  ):
    assert {x.dtype for x in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
  params = with_adapters(c)
  rounded = lora.cast_base(c, params)
  found = logits(config, rounded)
  again = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)
  np.testing.assert_allclose(found, logits(model(ALL), again), atol=1e-5)
